"""The AUC of every stratum under several models, again and again on the same draws of samples.

A replicate is not copied out: how often a sample was drawn is its weight. Weights are whole, so all counts are exact
in float64, and a replicate is the same number to the last bit whoever computes it, in whatever company.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dist_fair.collectives import Communicator
from dist_fair.metrics.bootstrap import StratifiedDraws, strata_of_videos
from dist_fair.metrics.ranking import ratio


class Draws:
    """Draws units as `StratifiedDraws` does, and tells of the samples in them.

    of_sample: (N,) the unit (a video, or the sample itself) of each sample; columns: (N,) codes each; units of equal
    codes are a stratum (of a unit whose samples differ, most of them decide, as in `strata_of_videos`).
    """

    def __init__(self, of_sample: np.ndarray, columns: Sequence[np.ndarray], seed: int):
        strata = strata_of_videos(of_sample, list(columns))
        self.units, self._of_sample = StratifiedDraws(strata, seed, "ace"), of_sample
        self.samples, self.strata = len(of_sample), len(np.unique(strata))

    def weights(self, b: int) -> np.ndarray:
        """How often replicate b draws each sample, (N,) float64; a function of (seed, b) and the units alone."""
        return self.units.counts(b)[self._of_sample]


class GroupAUC:
    """AUC of each of G groups, ties counted half, for one weighting after another.

    label, score, codes: (N,), codes in [0, G); every group has a real and a fake sample. Sorted once; after that a
    weighting costs one running sum over the reals and two look-ups a fake: 1 ms for 100,000 samples, where
    `Ranking`, which counts for every rate there is, takes 5.
    """

    def __init__(self, label: np.ndarray, score: np.ndarray, codes: np.ndarray, groups: int):
        self.groups = groups
        order = np.lexsort((score, codes))
        self._real, self._fake = order[label[order] == 0], order[label[order] == 1]
        edges = np.arange(groups + 1)
        self._reals, self._fakes = (np.searchsorted(codes[rows], edges) for rows in (self._real, self._fake))
        self._below, self._below_or_tied = (self._outranked(score, side) for side in ("left", "right"))

    def _outranked(self, score: np.ndarray, side: str) -> np.ndarray:
        """Where among the sorted reals those end that each fake outranks, or, from the right, also ties with."""
        reals, fakes = (np.split(score[rows], cuts[1:-1]) for rows, cuts in
                        ((self._real, self._reals), (self._fake, self._fakes)))  # fmt: skip
        found = [np.searchsorted(real, fake, side) for real, fake in zip(reals, fakes, strict=True)]
        return np.concatenate(found) + np.repeat(self._reals[:-1], np.diff(self._fakes))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """AUC of each group, (G,), under the weights (N,); NaN where a class has no weight."""
        running = np.zeros(len(self._real) + 1)
        np.cumsum(weights[self._real], out=running[1:])
        fake = weights[self._fake]
        wins = fake * (running[self._below] + running[self._below_or_tied])
        starts, n_real = self._fakes[:-1], np.diff(running[self._reals])
        n_fake = np.add.reduceat(fake, starts)
        outranked = 0.5 * np.add.reduceat(wins, starts) - n_fake * running[self._reals[:-1]]
        return ratio(outranked, n_real * n_fake)


def replicate(
    curves: Sequence[GroupAUC], draws: Draws, replicates: int, comm: Communicator, observe: Callable[[int], None]
) -> np.ndarray:
    """AUC of each group under M models in every replicate, (B, M, G), the same on every rank.

    Rank b mod W computes replicate b, with the same draw for all models. observe: called with 1 per own replicate.
    """
    own = [range(rank, replicates, comm.world) for rank in range(comm.world)]
    rows = []
    for b in own[comm.rank]:
        weights = draws.weights(b)
        rows.append([curve(weights) for curve in curves])
        observe(1)
    local = torch.tensor(np.array(rows).reshape(len(rows), len(curves), curves[0].groups), device=comm.device)
    gathered = comm.gather(local, "ace/replicates", [len(part) for part in own]).cpu().numpy()
    return gathered[np.argsort([b for part in own for b in part])]
