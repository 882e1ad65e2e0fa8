"""Hashes of whole arrays of sample numbers: where a generator per sample (25 microseconds each) would cost too much."""

import numpy as np

from dist_fair import keyed

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, the increment of SplitMix64


def mixed(numbers: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each number, uint64 of the same shape: one output of SplitMix64 (Steele, Lea, Flood 2014)."""
    state = numbers.astype(np.uint64) + GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(samples: np.ndarray, epochs: np.ndarray, count: int, *key: keyed.Part) -> np.ndarray:
    """`count` numbers in [0, 1) for each sample, (B, count) float64: a pure function of (key, epoch, sample).

    Row i is the SplitMix64 sequence that starts where the key, epochs[i] and samples[i] say.
    """
    starts = np.empty(len(samples), dtype=np.uint64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        starts[chosen] = mixed(samples[chosen].astype(np.uint64) ^ np.uint64(keyed.integer(*key, epoch)))
    steps = np.arange(count, dtype=np.uint64) * GOLDEN
    return (mixed(starts[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def consumed_hash(samples: np.ndarray) -> int:
    """A hash of the samples read, whatever their order, split and padding (-1): the sum of the hashes of each.

    A signed 64-bit number: sums of int64 wrap modulo 2**64, so the ranks' hashes may simply be all-reduced.
    """
    return int(mixed(samples[samples >= 0]).sum(dtype=np.uint64).astype(np.int64))


def expected_hash(count: int) -> int:
    """The hash of an evaluation that read each of `count` samples exactly once."""
    return consumed_hash(np.arange(count))
