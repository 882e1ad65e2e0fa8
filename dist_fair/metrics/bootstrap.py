"""Intervals by the bootstrap over videos: how much the numbers would move with other videos of the same kind.

Frames of a video are no independent samples, so whole videos are drawn, with replacement, inside strata of equal label
and attributes: every replicate has as many videos of each group and class as the data, and each rate stays defined.
A replicate is not copied out: how often each video was drawn is the weight of its samples.
"""

from collections.abc import Iterator

import numpy as np

from dist_fair import keyed

PERCENTILES = (2.5, 97.5)
CHUNK = 500_000  # weights held at once: 4 MB, near the size of a cache, and fastest so


def strata_of_videos(of_sample: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
    """The stratum of each video, (V,): videos are together when they agree in every column.

    of_sample: (N,) the video of each sample; columns: (N,) codes each (label, attributes; -1, unknown, is a value too).
    A video whose samples differ in their codes goes where most of them are (of equals, the lowest codes).
    """
    _, kind = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    count = np.zeros((of_sample.max() + 1, kind.max() + 1), dtype=np.int64)
    np.add.at(count, (of_sample, kind.ravel()), 1)
    return count.argmax(axis=1)


class StratifiedDraws:
    """Draws units with replacement inside strata, so that every replicate has as many units of each as the data.

    strata: (V,) of each unit; purpose: a word that keeps these draws apart from others of the same seed.
    """

    def __init__(self, strata: np.ndarray, seed: int, purpose: str):
        self.seed, self.purpose = seed, purpose
        self._order = np.argsort(strata, kind="stable")
        size = np.bincount(strata)
        start = np.cumsum(size) - size
        self._size, self._start = size[strata[self._order]], start[strata[self._order]]

    def counts(self, b: int) -> np.ndarray:
        """How often replicate b draws each unit, (V,) float64; a function of (seed, b) and the strata alone."""
        uniform = keyed.generator(self.seed, self.purpose, b).random(len(self._size))
        drawn = self._start + (uniform * self._size).astype(np.int64)
        counts = np.empty(len(self._size))
        counts[self._order] = np.bincount(drawn, minlength=len(self._size))
        return counts


def video_weights(strata: np.ndarray, replicates: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each video is drawn, (V, R) float64, chunks of replicates of a bounded size, `replicates` in all.

    Column b depends on (seed, b) and the strata alone. samples: samples of the dataset, for the size of a chunk.
    """
    draws, step = StratifiedDraws(strata, seed, "bootstrap"), max(1, CHUNK // samples)
    for begin in range(0, replicates, step):
        yield np.stack([draws.counts(b) for b in range(begin, min(begin + step, replicates))], axis=1)


def interval(values: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 percentiles of the replicates (R,) that have the number; NaN where none has it."""
    values = values[~np.isnan(values)]
    return [float(bound) for bound in np.percentile(values, PERCENTILES)] if len(values) else [np.nan, np.nan]
