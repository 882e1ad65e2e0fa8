"""How differently groups are treated: one number for each notion of fairness, from the rates of the groups.

Rates are those of `Rates`; g runs over the groups of an attribute set, "all" is every sample, those of unknown groups
included. Called fake is y^ = 1, at the threshold.

    F_FPR   100 sum_g |FPR_g - FPR_all|
    F_EO    100 sum_g (|FPR_g - FPR_all| + |TPR_g - TPR_all|)
    F_MEO   100 max(range_g FPR, range_g TPR)      the ranges of FNR and TNR are the same two
    F_DP    100 range_g PR                         the range of P(called real) is the same
    F_OAE   100 range_g ACC
    es-AUC  AUC_all / (1 + sum_g |AUC_g - AUC_all|)
    Skew(c, g) = ln( [#{y^ = c, g} / #{y^ = c}] / [#{y = c, g} / #{y = c}] ),   c real or fake

Definitions as in the public code of PG-FDD (F_*), FairCLIP (es-AUC) and DAID (Skew, after Geyik et al. 2019).
Units: every F_* is in per cent, as the papers print it (0 is fair; a sum over groups may exceed 100); es-AUC is a
fraction like AUC; Skew is a natural logarithm (0 is fair), and its headline `skew` is max |Skew| over all cells.

A rate whose denominator is zero is NaN and named in `absent`. Sums run over the groups that have the rate; a range
needs two such groups; F_EO and F_MEO need both their rates. A cell that nobody is called into would have Skew = -inf:
its share is then taken as (0 + 1/2) / (#{y^ = c} + G/2), which lies below that of a cell with one member.
"""

from collections.abc import Sequence

import numpy as np

from dist_fair.metrics.ranking import Rates, ratio

DISPARITIES = ("F_FPR", "F_EO", "F_MEO", "F_DP", "F_OAE", "es-AUC", "skew", "skew_max", "skew_min", "skew_range")
CLASSES = ("real", "fake")
GROUP_RATES = {"AUC": "auc", "FPR": "fpr", "TPR": "tpr", "ACC": "acc", "PR": "pr"}


def disparities(groups: Rates, overall: Rates) -> dict[str, np.ndarray]:
    """Every number of DISPARITIES, each (R,), from rates of the groups (G, R) and of all samples (1, R)."""
    fpr_gap = _sum(np.abs(groups.fpr - overall.fpr))
    tpr_gap = _sum(np.abs(groups.tpr - overall.tpr))
    skew = skew_cells(groups, overall).reshape(-1, groups.real.shape[-1])
    largest, smallest = _reduce(np.fmax, skew), _reduce(np.fmin, skew)
    return {
        "F_FPR": 100 * fpr_gap,
        "F_EO": 100 * (fpr_gap + tpr_gap),
        "F_MEO": 100 * np.maximum(_range(groups.fpr), _range(groups.tpr)),
        "F_DP": 100 * _range(groups.pr),
        "F_OAE": 100 * _range(groups.acc),
        "es-AUC": overall.auc[0] / (1 + _sum(np.abs(groups.auc - overall.auc))),
        "skew": _reduce(np.fmax, np.abs(skew)),
        "skew_max": largest,
        "skew_min": smallest,
        "skew_range": largest - smallest,
    }


def skew_cells(groups: Rates, overall: Rates) -> np.ndarray:
    """Skew(c, g), (2, G, R), real first; NaN where group g has no sample of class c, or none at all is called c."""
    called = np.stack(_called(groups))
    called_all = np.stack(_called(overall))
    empty = (called == 0) & (called_all > 0)
    share = ratio(called + 0.5 * empty, called_all + 0.5 * len(groups.real) * empty)
    true_share = ratio(np.stack([groups.real, groups.fake]), np.stack([overall.real, overall.fake]))
    quotient = ratio(share, true_share)
    return np.log(quotient, out=np.full(quotient.shape, np.nan), where=quotient > 0)


def fairness(groups: Rates, overall: Rates, names: Sequence[str]) -> dict:
    """The report of one attribute set, from rates of R = 1; NaN where absent.

    DISPARITIES; `skew_cells` {class: {group: Skew}}; `groups` {group: n, n_real, n_fake, AUC, FPR, TPR, ACC, PR}, the
    rates as fractions; `absent` {rate: [groups without it]}, "skew" with cells as "fake|male/Asian";
    `groups_used` {disparity: number of groups in it}; `unknown`, the number of samples in no group.
    """
    skew = skew_cells(groups, overall)[..., 0].tolist()
    cells = {c: dict(zip(names, row, strict=True)) for c, row in zip(CLASSES, skew, strict=True)}
    table = {name: _group(groups, g) for g, name in enumerate(names)}
    absent = {rate: [name for name in names if np.isnan(table[name][rate])] for rate in GROUP_RATES}
    absent["skew"] = [f"{c}|{name}" for c in CLASSES for name in names if np.isnan(cells[c][name])]
    return {
        **{name: float(value[0]) for name, value in disparities(groups, overall).items()},
        "skew_cells": cells,
        "groups": table,
        "absent": {rate: where for rate, where in absent.items() if where},
        "groups_used": _groups_used(groups, cells),
        "unknown": int(overall.real.item() + overall.fake.item() - groups.real.sum() - groups.fake.sum()),
    }


def _group(groups: Rates, g: int) -> dict[str, float]:
    n_real, n_fake = int(groups.real[g, 0]), int(groups.fake[g, 0])
    rates = {name: float(getattr(groups, field)[g, 0]) for name, field in GROUP_RATES.items()}
    return {"n": n_real + n_fake, "n_real": n_real, "n_fake": n_fake, **rates}


def _groups_used(groups: Rates, cells: dict[str, dict[str, float]]) -> dict[str, int]:
    has = {name: ~np.isnan(getattr(groups, field)[:, 0]) for name, field in GROUP_RATES.items()}
    either = has["FPR"] | has["TPR"]
    skew = ~np.isnan([[*row.values()] for row in cells.values()]).all(axis=0)
    used = {"F_FPR": has["FPR"], "F_EO": either, "F_MEO": either, "F_DP": has["PR"], "F_OAE": has["ACC"]}
    return {name: int(groups.sum()) for name, groups in {**used, "es-AUC": has["AUC"], "skew": skew}.items()}


def _called(rates: Rates) -> tuple[np.ndarray, np.ndarray]:
    """How many are called real, and fake."""
    fake = rates.false_fakes + rates.true_fakes
    return rates.real + rates.fake - fake, fake


def _sum(terms: np.ndarray) -> np.ndarray:
    """Sum over the groups that have the term, (R,); NaN where none has it."""
    return np.where(np.isnan(terms).all(axis=0), np.nan, np.nansum(terms, axis=0))


def _range(values: np.ndarray) -> np.ndarray:
    """Largest minus smallest over groups, (R,); NaN where fewer than two groups have the value."""
    width = _reduce(np.fmax, values) - _reduce(np.fmin, values)
    return np.where((~np.isnan(values)).sum(axis=0) < 2, np.nan, width)


def _reduce(function: np.ufunc, values: np.ndarray) -> np.ndarray:
    return function.reduce(values, axis=0, initial=np.nan)
