"""Which samples make up the global batch of a step, and which of them each rank reads.

The plan is a pure function of (index, recipe, seed, step). It has no state that a checkpoint would have to carry:
resuming at step t is asking for plan[t], in O(1), on any number of ranks.

    tape     One epoch is one long tape of samples: shards in shuffled order, samples in shard order. Shuffled anew
             every epoch. Several tapes (real and fake, one per source) with shares make balanced or paired batches.
    lanes    The tape is cut into C lanes of equal length (give or take one sample). Every global batch takes the
             same number of samples from each lane. The number of lanes belongs to the recipe; the number of ranks W
             only has to divide it. Rank r owns lanes [r C/W, (r+1) C/W): the global batch does not know W, one shard
             serves any number of ranks, and each rank reads its own stretches of the shards in order.
    windows  Inside a lane, samples are permuted within windows: near enough for sequential reads, far enough to mix.
    stream   A lane never ends. Its segment of epoch 0 is followed by its segment of epoch 1: nothing is dropped at
             the end of an epoch and nothing repeated to fill the last batch, whatever the sizes are.

        epoch 0 tape   | shard 2 | shard 0 | shard 1 |        lane c of C holds tape positions
                       |  lane 0  |  lane 1  | lane 2|        [floor(c N/C), floor((c+1) N/C)), n_c of them
        lane 0         segment of epoch 0 | segment of epoch 1 | ...          stream position p is in epoch p // n_c
        global batch t b = B/C consecutive stream positions, from t b on, of every lane

Canonical order of a global batch: lane after lane, and inside a lane tape after tape in the order of the recipe. So
rank r's rows are the contiguous slice [r B/W, (r+1) B/W), and a gather in rank order is the global batch itself.

Replicated on every rank: the index, the order of the shards (S numbers an epoch). Per rank: one permuted window of
each lane, kept until the lane leaves it; that is all there is to remember, and it can be forgotten at any time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from dist_fair import keyed
from dist_fair.data.index import Index
from dist_fair.errors import DistFairError, nearest

MOST_LANES = 64
EPOCHS_KEPT = 8


@dataclass(frozen=True)
class TapeSpec:
    """What a tape holds and its share of every batch.

    name: part of the key of its randomness. label: 0 real, 1 fake, None both. where: attribute -> value, all must
    hold. share: whole number; a tape gets share / (sum of shares) of every global batch.
    """

    name: str
    label: int | None = None
    share: int = 1
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """Samples to read: (B,) int64 index rows, -1 for padding, and the epoch of each, (B,) int64."""

    samples: np.ndarray
    epochs: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)


class TrainingPlan:
    """The global micro-batches of a run, and each rank's part of them.

    batch_size: samples of one global micro-batch (train.batch_size / train.accumulate). lanes: C, or None for
    `default_lanes`. window: samples per window. Raises DistFairError for tapes without samples, batches that do not
    divide into tapes and lanes, and more lanes than samples.
    """

    def __init__(
        self,
        index: Index,
        tapes: Sequence[TapeSpec],
        batch_size: int,
        lanes: int | None = None,
        window: int = 1024,
        seed: int = 0,
    ):
        if window < 1:
            raise DistFairError(f"data.window={window}: must be at least 1 sample (1 reads the tape in order)")
        parts = split_batch(batch_size, tapes)
        members = [tape_members(index, tape) for tape in tapes]
        sizes = [len(rows) for rows in members]
        self.lanes = default_lanes(parts, sizes) if lanes is None else lanes
        _check_lanes(self.lanes, batch_size, tapes, parts, sizes)
        self.index, self.specs, self.batch_size = index, tuple(tapes), batch_size
        self.window, self.seed, self.parts = window, seed, tuple(parts)
        self._tapes = [
            _Tape(tape.name, rows, index, self.lanes, part // self.lanes, window, seed)
            for tape, rows, part in zip(tapes, members, parts, strict=True)
        ]

    @property
    def steps_per_epoch(self) -> int:
        """Micro-batches after which every sample of every tape has been read: ceil(N_k / B_k) of the longest tape."""
        return max(-(-len(tape) // part) for tape, part in zip(self._tapes, self.parts, strict=True))

    @property
    def samples(self) -> np.ndarray:
        """All index rows that any tape holds, ascending, int64."""
        return np.unique(np.concatenate([tape.members for tape in self._tapes]))

    @property
    def frequencies(self) -> np.ndarray:
        """How often each index row is drawn, as a part of all draws, (N,) fp64: a tape's samples share B_k / B."""
        frequencies = np.zeros(len(self.index))
        for tape, part in zip(self._tapes, self.parts, strict=True):
            frequencies[tape.members] += part / self.batch_size / len(tape)
        return frequencies

    def __getitem__(self, step: int) -> Selection:
        """The global micro-batch `step`, counted from 0, in canonical order."""
        return self.part(step, 0, 1)

    def part(self, step: int, rank: int, world: int) -> Selection:
        """The slice of micro-batch `step` that `rank` of `world` reads: (B / world,) rows in canonical order."""
        lanes = self.owned(rank, world)
        drawn = [tape.draw(step, lanes) for tape in self._tapes]
        samples, epochs = zip(*drawn, strict=True)
        return Selection(np.concatenate(samples, axis=1).reshape(-1), np.concatenate(epochs, axis=1).reshape(-1))

    def owned(self, rank: int, world: int) -> np.ndarray:
        """The lanes of a rank. Raises DistFairError unless the number of ranks divides the number of lanes."""
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        if self.lanes % world:
            raise DistFairError(
                f"{world} ranks do not divide data.lanes={self.lanes}: start one of {divisors(self.lanes)} ranks, or "
                f"set data.lanes to a multiple of {world} that divides every tape's part of the batch, {self.parts}"
            )
        each = self.lanes // world
        return np.arange(rank * each, (rank + 1) * each)

    def describe(self) -> str:
        """The plan in words, one line per tape, for dry runs."""
        lines = [
            f"{self.batch_size} samples a micro-batch from {self.lanes} lanes, windows of {self.window}, "
            f"{self.steps_per_epoch} micro-batches an epoch; runs on {divisors(self.lanes)} ranks"
        ]
        for spec, tape, part in zip(self.specs, self._tapes, self.parts, strict=True):
            passes = self.steps_per_epoch * part / len(tape)
            lines.append(f"tape {spec.name}: {len(tape)} samples, {part} a micro-batch, {passes:.2f} passes an epoch")
        return "\n".join(lines)


class _Tape:
    """One tape, cut into lanes: answers which samples each lane gives in a step.

    members: (N,) index rows in canonical order. per_lane: samples that a step takes from every lane.
    """

    def __init__(self, name: str, members: np.ndarray, index: Index, lanes: int, per_lane: int, window: int, seed: int):
        self.name, self.members, self.per_lane, self.seed = name, members, per_lane, seed
        counts = np.bincount(index.shard[members], minlength=len(index.shards))
        self._counts, self._first = counts, np.cumsum(counts) - counts  # per shard: members, and where they start
        bounds = np.arange(lanes + 1) * len(members) // lanes
        self._starts, self._sizes = bounds[:-1], np.diff(bounds)
        self._window = min(window, int(self._sizes.max()))
        self._windows = -(-self._sizes // self._window)  # per lane and segment; the last may be shorter
        self._held = np.full(lanes, -1)  # which window of its stream each lane holds
        self._rows = np.zeros((lanes, self._window), dtype=np.int64)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.members)

    def draw(self, step: int, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples and epochs, each (lanes, per_lane), of stream positions [step b, (step + 1) b)."""
        positions = step * self.per_lane + np.arange(self.per_lane)
        epochs, offsets = np.divmod(positions, self._sizes[lanes, None])
        windows, places = np.divmod(offsets, self._window)
        serials = epochs * self._windows[lanes, None] + windows  # windows of the stream, counted from its beginning
        turns = serials - serials[:, :1]
        samples = np.empty_like(serials)
        for turn in range(int(turns.max()) + 1):  # once, or twice when a lane crosses into its next window
            chosen, column = np.nonzero(turns == turn)
            self._hold(lanes[chosen], serials[chosen, column])
            samples[chosen, column] = self._rows[lanes[chosen], places[chosen, column]]
        return samples, epochs

    def order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The samples at some positions of an epoch's tape."""
        if epoch not in self._orders:
            if len(self._orders) >= EPOCHS_KEPT:  # lanes are at most a few epochs apart: their sizes differ by 1
                del self._orders[next(iter(self._orders))]
            shards = keyed.permutation(len(self._counts), self.seed, self.name, "shards", epoch)
            ends = np.cumsum(self._counts[shards])
            self._orders[epoch] = ends, self._first[shards] + self._counts[shards] - ends
        ends, jumps = self._orders[epoch]
        return self.members[positions + jumps[np.searchsorted(ends, positions, side="right")]]

    def _hold(self, lanes: np.ndarray, serials: np.ndarray) -> None:
        stale = self._held[lanes] != serials
        for lane, serial in set(zip(lanes[stale].tolist(), serials[stale].tolist(), strict=True)):
            epoch, window = divmod(serial, int(self._windows[lane]))
            begin = window * self._window
            count = min(self._window, int(self._sizes[lane]) - begin)
            shuffled = keyed.permutation(count, self.seed, self.name, "window", epoch, lane, window)
            self._rows[lane, :count] = self.order(epoch, self._starts[lane] + begin + shuffled)
            self._held[lane] = serial


class EvaluationPlan:
    """Every sample exactly once, in canonical order, on any number of ranks.

    A global batch is the next `batch_size` samples (rounded up to a multiple of `world`); each rank reads a
    contiguous slice of equal length, of which only the end of the last batch is padding, -1.
    """

    def __init__(self, index_length: int, batch_size: int, rank: int = 0, world: int = 1):
        if batch_size < 1:
            raise DistFairError(f"evaluation.batch_size={batch_size}: must be at least 1")
        self.rows, self.rank, self.world = -(-batch_size // world), rank, world
        self.index_length = index_length

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows per rank, padding included, of every global batch."""
        return (self.rows,) * self.world

    def __len__(self) -> int:
        return -(-self.index_length // (self.rows * self.world))

    def __getitem__(self, step: int) -> Selection:
        if not 0 <= step < len(self):
            raise IndexError(step)
        samples = (step * self.world + self.rank) * self.rows + np.arange(self.rows)
        return Selection(np.where(samples < self.index_length, samples, -1), np.zeros(self.rows, dtype=np.int64))


def split_batch(batch_size: int, tapes: Sequence[TapeSpec]) -> list[int]:
    """B_k, the samples of a micro-batch that come from each tape. Raises DistFairError unless all are whole."""
    if not tapes or len({tape.name for tape in tapes}) != len(tapes):
        raise DistFairError(f"data.tapes={[tape.name for tape in tapes]}: name at least one tape, each once")
    for tape in tapes:
        if tape.share < 1:
            raise DistFairError(f"data.tapes.{tape.name}.share={tape.share}: must be a whole number, at least 1")
    total = sum(tape.share for tape in tapes)
    if batch_size < 1 or batch_size % total:
        shares = ":".join(str(tape.share) for tape in tapes)
        raise DistFairError(
            f"a micro-batch of {batch_size} (train.batch_size / train.accumulate) does not divide into tapes "
            f"{', '.join(tape.name for tape in tapes)} with shares {shares}: use a multiple of {total}"
        )
    return [batch_size * tape.share // total for tape in tapes]


def tape_members(index: Index, tape: TapeSpec) -> np.ndarray:
    """The index rows of a tape in canonical order, int64. Raises DistFairError if there are none."""
    chosen = np.ones(len(index), dtype=bool) if tape.label is None else index.labels == tape.label
    for attribute, value in tape.where.items():
        place = f"data.tapes.{tape.name}.where.{attribute}={value}"
        if attribute not in index.attributes:
            raise DistFairError(f"{place}: no such attribute in the data: {nearest(attribute, [*index.attributes])}")
        column = index.attributes[attribute]
        if value not in column.values:
            raise DistFairError(f"{place}: no such value in the data: {nearest(value, [*column.values])}")
        chosen = chosen & (column.codes == column.values.index(value))
    members = np.flatnonzero(chosen)
    if not len(members):
        kind = {None: "", 0: " real", 1: " fake"}.get(tape.label, f" label {tape.label}")
        raise DistFairError(
            f"tape '{tape.name}' is empty: {', '.join(index.folders)} has no{kind} sample"
            f"{' with ' + str(dict(tape.where)) if tape.where else ''}: change data.tapes or data.train"
        )
    return members


def default_lanes(batch_sizes: Sequence[int], tape_sizes: Sequence[int]) -> int:
    """The most lanes, up to 64, that divide every tape's part of the batch and hold at least one sample each."""
    return max(lanes for lanes in divisors(gcd(*batch_sizes)) if lanes <= min(MOST_LANES, *tape_sizes))


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _check_lanes(lanes: int, batch_size: int, tapes: Sequence[TapeSpec], parts: list[int], sizes: list[int]) -> None:
    fitting = [one for one in divisors(gcd(*parts)) if one <= min(sizes)]
    for tape, part, size in zip(tapes, parts, sizes, strict=True):
        if lanes < 1 or part % lanes:
            raise DistFairError(
                f"data.lanes={lanes} does not divide the {part} samples that tape '{tape.name}' gives to a "
                f"micro-batch of {batch_size}: set data.lanes to one of {fitting} (null chooses), or change "
                "train.batch_size"
            )
        if size < lanes:
            raise DistFairError(
                f"data.lanes={lanes}, but tape '{tape.name}' has only {size} samples: every lane needs one; "
                f"set data.lanes to one of {fitting} (null chooses)"
            )
