"""The average causal effect of fairness on generalisation (DAID, section 3.2, eq. 2-4).

    P(A | do(F=f)) = sum_{dd, mc} P(A | F=f, dd, mc) P(dd, mc) = mu_0 + f ACE

F: the regime of training, 0 plain, 1 fair; dd: the stratum of a held-out sample, an intersection of its attributes;
mc: the capacity of the detector; P(A | F=f, dd, mc): the AUC of the detector of capacity mc trained under f, on the
held-out samples of dd. P(dd, mc) = n_dd / n * 1 / |mc|: strata as frequent as they are, capacities equally.

The interval is a stratified paired bootstrap: units (videos, whose frames depend on each other, or frames) are drawn
with replacement inside every (dd, y), the same ones for all models. It says how much ACE would move with other
held-out samples; it knows nothing of other training seeds.

The treatment is not F itself but a way of training that should raise it. So a study says whether it did: max |Skew|
over the intersections must fall from F=0 to F=1, in every capacity. Where it does not, ACE answers nothing.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dist_fair.collectives import Communicator
from dist_fair.demographics import Groups
from dist_fair.errors import DistFairError
from dist_fair.metrics.bootstrap import PERCENTILES, interval
from dist_fair.metrics.fairness import disparities
from dist_fair.metrics.predictions import Predictions
from dist_fair.metrics.ranking import Ranking
from dist_fair.studies.ace_bootstrap import Draws, GroupAUC, replicate

Model = tuple[str, int]  # (mc, f)
REGIMES = (0, 1)
UNITS = ("video", "frame")
THRESHOLD = 0.5  # of Skew: called fake where the score is no less


def average_causal_effect(
    predictions: Mapping[Model, Predictions],
    attributes: Sequence[str],
    replicates: int = 1000,
    unit: str = "video",
    seed: int = 0,
    comm: Communicator | None = None,
    observe: Callable[[int], None] = lambda count: None,
) -> dict:
    """ACE on one dataset with all that is needed to judge it, ready for JSON; the same on every rank of any number.

    predictions: of every model (mc, f), of the same samples in any order; attributes: whose intersections are the
    strata; unit: what is drawn, "video" or "frame"; comm: the ranks that share the replicates, all of which call this;
    observe: called with 1 per replicate of this rank.

    Samples of unknown group are left out; so are strata that lack a class, by name, and P is taken over the others.

    Returns {"attributes", "samples", "unknown", "left_out": {stratum: counts}, "ACE", "mu_0",
    "capacities": {mc: {"ACE", "interval", "skew": [of F=0, of F=1], "called_fake": [share at F=0, at F=1]}},
    "cells": [{"capacity", "stratum", "n", "n_real", "n_fake", "P", "AUC_0", "AUC_1", "difference", "interval"}],
    "bootstrap": {"replicates", "unit", "seed", "strata", and what `distribution` returns}}; AUC, ACE and mu_0 are
    fractions. A replicate is undefined where the draw left a cell without a class: only where attributes differ inside
    a video.

    Raises DistFairError for models whose samples differ, attributes that are not there, and settings out of range.
    """
    check_replicates(replicates)
    if unit not in UNITS:
        raise DistFairError(f"unit={unit}: one of {', '.join(UNITS)}")
    study = _Study(predictions, attributes)
    draws, curves = study.draws(unit, seed), study.curves()
    auc = np.array([curve(np.ones(draws.samples)) for curve in curves]).reshape(study.shape)
    drawn = replicate(curves, draws, replicates, comm or Communicator(), observe).reshape(replicates, *study.shape)
    settings = {"replicates": replicates, "unit": unit, "seed": seed, "strata": draws.strata}
    return {
        "attributes": [*attributes],
        "samples": len(study.label),
        "unknown": int(np.count_nonzero(study.codes < 0)),
        "left_out": study.left_out(),
        "ACE": float(study.effect(auc)),
        "mu_0": float((auc[:, 0] * study.P).sum()),
        "capacities": study.by_capacity(auc, drawn),
        "cells": study.cells(auc, drawn),
        "bootstrap": settings | distribution(study.effect(drawn)),
    }


def check_replicates(replicates: int) -> None:
    """Raises DistFairError for a number of replicates that says nothing."""
    if replicates < 1:
        raise DistFairError(f"replicates={replicates}: at least 1; intervals want 1000")


def distribution(values: np.ndarray) -> dict:
    """What the replicates (B,) of an effect say of it, for JSON; NaN is a replicate without it."""
    there = values[~np.isnan(values)]
    unsmoothed, smoothed = p_values(there) if len(there) else (None, None)
    return {
        "percentiles": list(PERCENTILES),
        "mean": float(there.mean()) if len(there) else None,
        "interval": bounds(values),
        "p_unsmoothed": unsmoothed,
        "p_smoothed": smoothed,
        "undefined_replicates": len(values) - len(there),
        "values": [None if value != value else value for value in values.tolist()],
    }


def bounds(values: np.ndarray) -> list[float] | None:
    """The percentile interval of the replicates (B,) that are no NaN; None if all are."""
    low, high = interval(values)
    return None if low != low else [low, high]


def p_values(values: np.ndarray) -> tuple[float, float]:
    """Two-sided p of "no effect" from the replicates (B,): unsmoothed 2 k / B, and smoothed 2 (k + 1) / (B + 1).

    k: replicates on the rarer side of zero, those at zero on both. The paper's p < 0.001 with B = 1000 can only be the
    unsmoothed one: the smoothed one (Davison and Hinkley 1997, which counts the data as a replicate) is never below
    2 / 1001.
    """
    k = min(np.count_nonzero(values <= 0), np.count_nonzero(values >= 0))
    return min(1.0, 2 * k / len(values)), min(1.0, 2 * (k + 1) / (len(values) + 1))


def capacities(models: Sequence[Model]) -> tuple[str, ...]:
    """The capacities, in order of mention; raises DistFairError unless each has both regimes."""
    names = tuple(dict.fromkeys(mc for mc, _ in models))
    lacking = [f"{mc}/{f}" for mc in names for f in REGIMES if (mc, f) not in models]
    if lacking or not names:
        raise DistFairError(f"no run {', '.join(lacking) or 'at all'}: every capacity needs F=0 and F=1, as in "
                            "low/0=RUN low/1=RUN")  # fmt: skip
    return names


class _Study:
    """The held-out samples of all models, aligned and cut into strata."""

    def __init__(self, predictions: Mapping[Model, Predictions], attributes: Sequence[str]):
        self.capacities = capacities([*predictions])
        self.models = [(mc, f) for mc in self.capacities for f in REGIMES]
        self.runs = aligned({model: predictions[model] for model in self.models}, attributes)
        samples = self.runs[self.models[0]]
        self.groups = Groups.of(attributes, samples.vocabulary(dict.fromkeys(attributes, ())))
        self.codes, self.label, self.video = samples.codes(self.groups), samples.label, samples.video
        self.count = np.zeros((len(self.groups), 2), dtype=np.int64)  # by stratum and label
        np.add.at(self.count, (self.codes[self.codes >= 0], self.label[self.codes >= 0]), 1)
        strata = np.flatnonzero(self.count.all(axis=1))
        if not len(strata):
            raise DistFairError(f"no group of {self.groups.label} has both real and fake samples: no AUC can be had")
        self.strata, self.used = strata, np.isin(self.codes, strata)
        self.shape = (len(self.capacities), len(REGIMES), len(strata))
        n = self.count[strata].sum(axis=1)
        self.P = n / n.sum() / len(self.capacities)

    def draws(self, unit: str, seed: int) -> Draws:
        """Of the samples used."""
        names = self.video[self.used]
        units = np.unique(names, return_inverse=True)[1] if unit == "video" else np.arange(len(names))
        return Draws(units, [self.label[self.used], self.codes[self.used]], seed)

    def curves(self) -> list[GroupAUC]:
        """AUC by stratum of each model, for weightings of the samples used."""
        label, codes = self.label[self.used], np.searchsorted(self.strata, self.codes[self.used])
        return [GroupAUC(label, self.runs[model].score[self.used], codes, len(self.strata)) for model in self.models]

    def effect(self, auc: np.ndarray) -> np.ndarray:
        """ACE from AUC (..., mc, f, dd)."""
        return ((auc[..., 1, :] - auc[..., 0, :]) * self.P).sum(axis=(-2, -1))

    def called(self, model: Model) -> dict[str, float]:
        """max |Skew| over the intersections and the share called fake, as `dist-fair evaluate` reports them."""
        ones, score = np.ones((len(self.label), 1)), self.runs[model].score
        strata = Ranking(self.label, score, THRESHOLD, self.codes, len(self.groups))
        overall = Ranking(self.label, score, THRESHOLD)
        rates, all_rates = (ranking.rates(ranking.count(ones)) for ranking in (strata, overall))
        return {"skew": float(disparities(rates, all_rates)["skew"][0]), "called_fake": float(all_rates.pr.item())}

    def by_capacity(self, auc: np.ndarray, drawn: np.ndarray) -> dict[str, dict]:
        """The effect at each capacity alone, and how the regimes differ in what they call fake."""
        effect, effects = (((a[..., 1, :] - a[..., 0, :]) * self.P).sum(axis=-1) * self.shape[0] for a in (auc, drawn))
        found = {}
        for place, mc in enumerate(self.capacities):
            plain, fair = (self.called((mc, f)) for f in REGIMES)
            found[mc] = {"ACE": float(effect[place]), "interval": bounds(effects[:, place])}
            found[mc] |= {name: [plain[name], fair[name]] for name in plain}
        return found

    def cells(self, auc: np.ndarray, drawn: np.ndarray) -> list[dict]:
        """Every cell, from its AUC (mc, f, dd), and in every replicate (B, mc, f, dd)."""
        cells = []
        for place, mc in enumerate(self.capacities):
            for column, dd in enumerate(self.strata):
                plain, fair = auc[place, :, column].tolist()
                cells.append({
                    "capacity": mc,
                    "stratum": self.groups.names[dd],
                    **self.counts(dd),
                    "P": float(self.P[column]),
                    "AUC_0": plain,
                    "AUC_1": fair,
                    "difference": fair - plain,
                    "interval": bounds(drawn[:, place, 1, column] - drawn[:, place, 0, column]),
                })  # fmt: skip
        return cells

    def left_out(self) -> dict[str, dict[str, int]]:
        """The strata that lack a class."""
        return {name: self.counts(dd) for dd, name in enumerate(self.groups.names) if not self.count[dd].all()}

    def counts(self, dd: int) -> dict[str, int]:
        """Samples of a stratum."""
        n_real, n_fake = self.count[dd].tolist()
        return {"n": n_real + n_fake, "n_real": n_real, "n_fake": n_fake}


def aligned(predictions: Mapping[Model, Predictions], attributes: Sequence[str]) -> dict[Model, Predictions]:
    """The predictions of every model in order of sample id.

    Raises DistFairError, naming the model and a sample, unless all have the same samples, with the same video, label
    and attributes; and for an attribute that is not there.
    """
    (first, reference), *others = ((model, _sorted(model, found, attributes)) for model, found in predictions.items())
    for model, found in others:
        _check_same(model, found, first, reference, attributes)
    return {first: reference, **dict(others)}


def _sorted(model: Model, predictions: Predictions, attributes: Sequence[str]) -> Predictions:
    try:
        predictions.vocabulary(dict.fromkeys(attributes, ()))
    except DistFairError as error:
        raise DistFairError(f"{_name(model)}: {error}") from error
    order = np.argsort(predictions.sample_id)
    columns = {name: values[order] for name, values in predictions.attributes.items()}
    fields = (predictions.sample_id, predictions.video, predictions.label, predictions.score)
    return Predictions(*(values[order] for values in fields), attributes=columns)


def _check_same(model: Model, found: Predictions, first: Model, reference: Predictions, attributes) -> None:
    mend = "evaluate all runs on the same data"
    odd = np.setxor1d(found.sample_id, reference.sample_id)
    if len(odd):
        has, lacks = (model, first) if odd[0] in found.sample_id else (first, model)
        raise DistFairError(f"{_name(has)} has sample '{odd[0]}' and {_name(lacks)} has not ({len(odd)} such samples): "
                            f"{mend}")  # fmt: skip
    for name in ("video", "label", *attributes):
        ours, theirs = (side.attributes[name] if name in attributes else getattr(side, name)
                        for side in (found, reference))  # fmt: skip
        differ = np.flatnonzero(ours != theirs)
        if len(differ):
            at = differ[0]
            raise DistFairError(f"sample '{found.sample_id[at]}': its {name} is '{ours[at]}' in {_name(model)} and "
                                f"'{theirs[at]}' in {_name(first)} ({len(differ)} such samples): {mend}")  # fmt: skip


def _name(model: Model) -> str:
    return "/".join(map(str, model))
