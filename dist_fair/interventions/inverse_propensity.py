"""Inverse propensity weights (DAID): rare demographics count as much as frequent ones."""

from dataclasses import dataclass, field
from functools import reduce
from itertools import product

import numpy as np
import torch

from dist_fair.data.batch import Batch
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Delayed, Facts, Intervention, register

PROPENSITIES, UNKNOWNS = ("product_marginals", "inverse_joint", "one_minus_joint"), ("one", "marginals")


@register("inverse_propensity")
class InversePropensity(Intervention):
    """Sample weights from the frequencies of the training plan ("Fair Deepfake Detectors Can Generalize", eq. 5).

        product_marginals   w = 1 / prod_k P(s_k)      the paper; equal mass for every value of an attribute if the
                                                       attributes are independent, and for no intersection otherwise
        inverse_joint       w = 1 / P(s_1, ..., s_K)   equal mass for every group
        one_minus_joint     w = 1 - P(s_1, ..., s_K)   what the paper's released code does

    P is how often the plan draws a value among the draws where it is known: exact, known before the first step, the
    same for every batch and rank. Weights are scaled to the mean 1 over the draws whose weight is known.
    """

    @dataclass
    class Settings(Delayed):
        """propensity: see above. clip: the largest weight before a last scaling to mean 1, or null.

        unknown: samples of which an attribute is unknown weigh "one", or what is expected if the unknown values follow
        their "marginals".
        """

        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        propensity: str = "product_marginals"
        clip: float | None = None
        unknown: str = "one"

        def __post_init__(self):
            super().__post_init__()
            place = "inverse_propensity: "
            if self.propensity not in PROPENSITIES:
                raise DistFairError(f"{place}propensity={self.propensity}: one of {', '.join(PROPENSITIES)}")
            if self.unknown not in UNKNOWNS:
                raise DistFairError(f"{place}unknown={self.unknown}: one of {', '.join(UNKNOWNS)}")
            if self.clip is not None and self.clip <= 1:
                raise DistFairError(f"{place}clip={self.clip}: above 1, which is the mean weight, or null")

    couples = False
    settings: Settings

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        groups = facts.groups(settings.attributes)
        codes = [facts.index.attributes[name].codes for name in groups.attributes]
        shape = [len(values) for values in groups.values]
        table = self._table(codes, facts.frequencies, shape)
        # Made anew from the plan by whoever builds the recipe: not a part of checkpoints.
        self.register_buffer("table", torch.from_numpy(table), persistent=False)

    def weigh(self, batch: Batch) -> torch.Tensor:
        return self.table[tuple(batch.attributes[name] for name in self.settings.attributes)]

    def _table(self, codes: list[np.ndarray], frequencies: np.ndarray, shape: list[int]) -> np.ndarray:
        """Weight by the codes of all attributes, (V_1 + 1, ..., V_K + 1) fp64; the last of each axis is code -1."""
        drawn, known = np.zeros([size + 1 for size in shape]), (slice(-1),) * len(shape)
        np.add.at(drawn, tuple(codes), frequencies)
        if not drawn[known].any():
            raise DistFairError(f"inverse_propensity: attributes={self.settings.attributes}: no training sample has "
                                "a known value of each; name other attributes")  # fmt: skip
        marginals = [_marginal(drawn, axis) for axis in range(len(shape))]
        weights, weighted = np.ones_like(drawn), np.zeros_like(drawn, dtype=bool)
        weights[known], weighted[known] = self._weights(drawn[known] / drawn[known].sum(), marginals), True
        if self.settings.unknown == "marginals":
            _impute(weights, drawn[known] > 0, marginals)
            weighted[:] = True
        weights = _scale(weights, drawn * weighted)
        if self.settings.clip is not None:
            weights = _scale(np.minimum(weights, self.settings.clip), drawn * weighted)
        return np.where(weighted, weights, 1.0)

    def _weights(self, joint: np.ndarray, marginals: list[np.ndarray]) -> np.ndarray:
        """Unscaled weights of the groups; 0 where a group is never drawn."""
        if self.settings.propensity == "one_minus_joint":
            return 1 - joint
        propensity = joint if self.settings.propensity == "inverse_joint" else _product(marginals)
        return np.divide(1, propensity, out=np.zeros_like(joint), where=propensity > 0)


def _marginal(drawn: np.ndarray, axis: int) -> np.ndarray:
    """P of each known value of one attribute, whether or not the others are known."""
    others = tuple(one for one in range(drawn.ndim) if one != axis)
    counts = drawn.sum(axis=others)[:-1]
    return counts / max(counts.sum(), np.finfo(float).tiny)


def _product(marginals: list[np.ndarray]) -> np.ndarray:
    """prod_k P(s_k) of every group, (V_1, ..., V_K)."""
    return reduce(np.multiply.outer, marginals)


def _impute(weights: np.ndarray, there: np.ndarray, marginals: list[np.ndarray]) -> None:
    """Fills the places of unknown values with the mean over the groups that exist, values by their marginals."""
    known = weights[(slice(-1),) * weights.ndim].copy()
    chances = _product(marginals) * there
    for missing in product((False, True), repeat=weights.ndim):
        axes = tuple(axis for axis, gone in enumerate(missing) if gone)
        if not axes:
            continue
        mass = chances.sum(axis=axes)
        mean = np.divide((known * chances).sum(axis=axes), mass, out=np.zeros_like(mass), where=mass > 0)
        weights[tuple(-1 if gone else slice(-1) for gone in missing)] = mean


def _scale(weights: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Weights with mean 1 over the draws."""
    mean = (weights * drawn).sum() / drawn.sum()
    if not mean > 0:
        raise DistFairError("inverse_propensity: every weight is 0 (propensity=one_minus_joint and a single group): "
                            "name attributes that differ between samples")  # fmt: skip
    return weights / mean
