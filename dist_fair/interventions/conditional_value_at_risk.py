"""Conditional value at risk (DAG-FDD, DAW-FDD, PG-FDD): the loss of the worst part of the batch, or of its groups."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from dist_fair.data.batch import Batch
from dist_fair.demographics import Groups
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Gather, Intervention, Summary, Weighted, register
from dist_fair.interventions.heads import lifted
from dist_fair.interventions.known_gradient import with_gradient
from dist_fair.interventions.order_statistics import smoothed_worst_part, worst_parts

OUTERS = ("hinge", "smoothed", "guarded")


@register("conditional_value_at_risk")
class ConditionalValueAtRisk(Intervention):
    """Mean cross-entropy of the worst part: L_DAG and L_DAW of "Improving Fairness in Deepfake Detection" (WACV 2024),
    L_fuse of "Preserving Fairness Generalization in Deepfake Detection" (CVPR 2024, PG-FDD).

        without attributes   CVaR_alpha of all w_i l_i                                              DAG-FDD
        with attributes      CVaR_alpha over the groups g of CVaR_inner_alpha of their w_i l_i      DAW-FDD, PG-FDD

    CVaR_alpha is the mean of the alpha n largest, see `order_statistics`; l_i is the cross-entropy of logits (B, 2).
    Groups are those that have samples in the global batch; a sample of unknown group is left out, and without a known
    one the loss is 0 and so are its gradients. Sample weights w_i scale the losses before they are sorted, so that
    alpha = 1 without attributes is the weighted mean of `cross_entropy`.

    outer: hinge      CVaR_alpha as defined, in closed form.
           smoothed   PG-FDD's, with tau_1 = 1e-3 in place of the hinge's corner and tau_2 = 1e-4: close to the former.
           guarded    what PG-FDD's released code computes. It searches lambda in fp32 and takes overflow for a bad
                      lambda, so lambda stays above the worst group's loss - 0.0887. Where losses differ by more, only
                      the worst group has a gradient, of weight 1 / (alpha G), and the loss is not the minimum over
                      lambda. Not a CVaR; to compare with that code.
    Without attributes `outer` is about samples: each is a group of its own.

    On the wire: 3 floats a sample. Each rank sorts the global batch, in canonical order, in fp64; equal losses go by
    their place in it. Term: conditional_value_at_risk.

    Measure: conditional_value_at_risk_at_chance, what a constant prediction would have got: the best one for w = 1. It
    is the entropy of that share of fakes, of all that the worst part may have, which is nearest to a half.
    """

    terms = ("conditional_value_at_risk",)
    measures = ("conditional_value_at_risk_at_chance",)

    @dataclass
    class Settings(Weighted):
        """attributes: [] for none. inner_alpha: the part of each group, null without attributes.

        alpha: the part of the groups that are there, or of the batch without attributes. outer: see above.
        """

        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        inner_alpha: float | None = 0.9
        alpha: float = 0.5
        outer: str = "hinge"

        def __post_init__(self):
            super().__post_init__()
            place = "conditional_value_at_risk: "
            if not 0 < self.alpha <= 1:
                raise DistFairError(f"{place}alpha={self.alpha}: a part, above 0 and at most 1")
            if self.outer not in OUTERS:
                raise DistFairError(f"{place}outer={self.outer}: one of {', '.join(OUTERS)}")
            if not self.attributes and self.inner_alpha is not None:
                raise DistFairError(f"{place}inner_alpha={self.inner_alpha} has no effect with attributes=[]: set "
                                    "inner_alpha=null, or name attributes")  # fmt: skip
            if self.attributes and (self.inner_alpha is None or not 0 < self.inner_alpha <= 1):
                raise DistFairError(f"{place}inner_alpha={self.inner_alpha}: the part of each group of "
                                    f"attributes={list(self.attributes)}, above 0 and at most 1")  # fmt: skip

    settings: Settings

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.groups = facts.groups(settings.attributes) if settings.attributes else None
        if self.groups is not None and len(self.groups) < 2:
            raise DistFairError(f"conditional_value_at_risk: the data has {len(self.groups)} value of "
                                f"{self.groups.label}, so there is no worst group: name other attributes, or "
                                "attributes=[] and inner_alpha=null")  # fmt: skip
        # Made anew by whoever builds the recipe: not a part of checkpoints.
        for name, table in _tables(self.groups).items():
            self.register_buffer(name, table, persistent=False)

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Per sample, (B, 3): w l, w, and 2 g + y."""
        logits = lifted(outputs.logits)
        weights = weights.to(logits)
        losses = (self.minus[batch.labels] * weights[:, None] * logits.log_softmax(1)).sum(1)
        columns = () if self.groups is None else self.groups.columns(batch.attributes)
        return {"samples": Gather(torch.stack([losses, weights, self.keys[(*columns, batch.labels)]], dim=1))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        samples = summary["samples"]
        with torch.no_grad():
            (risk, chance), slopes = self._risks(samples.double())
        risk = with_gradient(risk, samples, slopes[:, None] * self.first)
        return {"conditional_value_at_risk": risk, "conditional_value_at_risk_at_chance": chance}

    def _risks(self, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of samples (n, 3) the risk and what it is at chance, (2,), and the derivatives of the former by w l, (n,)."""
        losses, weights, keys = samples.unbind(1)
        keys, alpha = keys.long(), self.settings.alpha
        members, kinds = self.members[keys].T, self.kinds[keys]
        counts, labels = kinds[:, :-2].sum(0).view(-1, 2), kinds[:, -2:]
        number = counts.sum(1, keepdim=True)

        def with_chance(most: torch.Tensor) -> torch.Tensor:
            return torch.stack([losses, weights * (labels @ _log_shares(most))])

        if self.groups is None:  # each sample is a group of its own
            k = alpha * number
            risks, slopes = self._outer(with_chance(_most(counts, k)[:, 0]), members, k)
            return risks, slopes[0]
        inner, present = self.settings.inner_alpha * number, number.clamp_max(1).T
        outer = alpha * present.sum(1, keepdim=True)
        most, _ = worst_parts(_most(counts, inner), present, outer)
        means, parts = worst_parts(with_chance(most[:, 0]), members, inner)
        risks, slopes = self._outer(means, present, outer)
        return risks, slopes[0] @ parts[0]

    def _outer(self, values: torch.Tensor, present: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Risks (R,) of the values (R, n) that are present, (1, n) ones, and their derivatives (R, n)."""
        if self.settings.outer != "hinge":
            return smoothed_worst_part(values, present, self.settings.alpha, self.settings.outer == "guarded")
        means, weights = worst_parts(values, present, k)
        return means[:, 0], weights[:, 0]


def _tables(groups: Groups | None) -> dict[str, torch.Tensor]:
    """What a sample is, by its codes or by its key, 2 g + y. Keys -2 and -1, of unknown groups, are the last rows.

    keys: by attribute codes and label. members: (2 G + 2, G), one at its group. kinds: (2 G + 2, 2 G + 2), one at its
    group and label, and behind these columns minus one at its label. minus: (2, 2), that by label alone. first: (3,),
    which of the columns on the wire is the loss. Without groups all are of one.
    """
    number = 1 if groups is None else len(groups)
    codes = np.append(np.arange(number), -1)
    keys = (2 * codes[:, None] + np.arange(2)).astype(np.float32)
    kinds, minus = torch.eye(2 * number + 2, 2 * number), -torch.eye(2)
    return {
        "keys": torch.from_numpy(keys[0] if groups is None else groups.table(keys)),
        "members": kinds.view(-1, number, 2).sum(2).double(),
        "kinds": torch.cat([kinds, minus.repeat(number + 1, 1)], dim=1).double(),
        "minus": minus,
        "first": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
    }


def _most(counts: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The largest share of reals, and of fakes, that the k worst of each group can have, (2, G). counts: (G, 2)."""
    return (counts / k.clamp_min(torch.finfo(k.dtype).tiny)).clamp_max(1).T


def _log_shares(most: torch.Tensor) -> torch.Tensor:
    """log(1 - p) and log p, (2,), of the best constant prediction p, for the hinge and sample weights of 1.

    most: (2,), the largest share of reals, and of fakes, that the worst part can have. CVaR is the largest mean over
    some set of reweighted batches, whose shares of fakes q are an interval. min over p and max over q of
    -q log p - (1 - q) log(1 - p) may change places: the largest entropy, and p is its q.
    """
    shares = torch.minimum((1 - most.flip(0)).clamp_min(0.5), most)
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
