"""Weighted counts over sorted scores: what AUC, EER, AP and every rate are made of.

Samples are sorted once by (group, score). After that a weighting costs two cumulative sums, and many weightings are
counted side by side: the columns of a weight matrix (N, R) are the R replicates of a bootstrap, or the one column of
ones that is the data itself. With whole weights every count and every AUC numerator is exact in float64 (below 2^52),
so a sample of weight 2 and a sample that is there twice give the same number, to the last bit.
"""

from dataclasses import dataclass

import numpy as np

Counts = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Rates:
    """Counts and rates of G groups under R weightings, each (G, R) float64; NaN where the denominator is zero.

    real, fake: number of samples by label; false_fakes, true_fakes: those of them that are called fake;
    auc: area under the ROC curve, ties counted half.
    """

    real: np.ndarray
    fake: np.ndarray
    false_fakes: np.ndarray
    true_fakes: np.ndarray
    auc: np.ndarray

    @property
    def fpr(self) -> np.ndarray:
        """P(called fake | real)."""
        return ratio(self.false_fakes, self.real)

    @property
    def tpr(self) -> np.ndarray:
        """P(called fake | fake)."""
        return ratio(self.true_fakes, self.fake)

    @property
    def acc(self) -> np.ndarray:
        """P(called what it is)."""
        return ratio(self.real - self.false_fakes + self.true_fakes, self.real + self.fake)

    @property
    def pr(self) -> np.ndarray:
        """P(called fake)."""
        return ratio(self.false_fakes + self.true_fakes, self.real + self.fake)


class Ranking:
    """The samples of G groups, sorted by (group, score).

    label, score, codes: (N,); codes in [0, groups), or -1 for samples that belong to no group and are left out;
    a sample is called fake where score >= threshold. Without codes all samples are one group.
    """

    def __init__(self, label: np.ndarray, score: np.ndarray, threshold: float, codes=None, groups: int = 1):
        codes = np.zeros(len(label), dtype=np.int64) if codes is None else codes
        order = np.lexsort((score, codes))
        self.order = order[np.count_nonzero(codes < 0) :]
        codes, score = codes[self.order], score[self.order]
        self._fake = (label[self.order] == 1)[:, None]
        new = np.ones(len(score) + 1, dtype=bool)
        new[1:-1] = (np.diff(score) != 0) | (np.diff(codes) != 0)
        self._edges = np.flatnonzero(new)  # where the runs of equal (group, score) begin, and the end
        ends = np.searchsorted(codes, np.arange(groups), side="right")
        cuts = ends - np.bincount(codes[score >= threshold], minlength=groups)  # where those called fake begin
        starts = np.searchsorted(codes, np.arange(groups))
        self._starts, self._cuts, self._ends = (np.searchsorted(self._edges, place) for place in (starts, cuts, ends))

    def count(self, weights: np.ndarray) -> Counts:
        """Weight of the reals, and of the fakes, below each edge, from weights (N, R): what the other methods take."""
        weights = weights[self.order]
        real, fake = np.where(self._fake, 0.0, weights), np.where(self._fake, weights, 0.0)
        return _running_sum(real)[self._edges], _running_sum(fake)[self._edges]

    def rates(self, counts: Counts) -> Rates:
        """Counts and rates of each group, (G, R)."""
        real, fake = counts
        # Each fake outranks the reals below it, and half of those it ties with.
        wins = _running_sum(np.diff(fake, axis=0) * (real[:-1] + real[1:]))
        n_real, n_fake = self._total(real), self._total(fake)
        outranked = 0.5 * self._total(wins) - n_fake * real[self._starts]
        return Rates(
            real=n_real,
            fake=n_fake,
            false_fakes=real[self._ends] - real[self._cuts],
            true_fakes=fake[self._ends] - fake[self._cuts],
            auc=ratio(outranked, n_real * n_fake),
        )

    def equal_error_rate(self, counts: Counts) -> np.ndarray:
        """EER of all samples as one group, (R,): the FPR of the strictest threshold where |FNR - FPR| is least."""
        false_fakes, true_fakes = _thresholds(counts)
        fpr, tpr = ratio(false_fakes, false_fakes[-1]), ratio(true_fakes, true_fakes[-1])
        gap = np.abs((1 - tpr) - fpr)
        best = np.argmin(np.where(np.isnan(gap), np.inf, gap), axis=0)
        rate = np.take_along_axis(fpr, best[None], axis=0)[0]
        return np.where(np.isnan(gap[-1]), np.nan, rate)

    def average_precision(self, counts: Counts) -> np.ndarray:
        """AP of all samples as one group, (R,): precision at each threshold, weighted by the recall it adds."""
        false_fakes, true_fakes = _thresholds(counts)
        precision = np.nan_to_num(ratio(true_fakes, false_fakes + true_fakes))
        return ratio((np.diff(true_fakes, axis=0) * precision[1:]).sum(axis=0), true_fakes[-1])

    def _total(self, running: np.ndarray) -> np.ndarray:
        """What a running sum gains over each group, (G, R)."""
        return running[self._ends] - running[self._starts]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _thresholds(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Reals and fakes called fake at each distinct threshold, from above all scores downwards, (T + 1, R)."""
    real, fake = counts
    return (real[-1] - real)[::-1], (fake[-1] - fake)[::-1]


def _running_sum(values: np.ndarray) -> np.ndarray:
    """(N + 1, R) with row n the sum of the first n rows."""
    running = np.zeros((len(values) + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, out=running[1:])
    return running
