"""Batches, from a plan and a reader, through torch's DataLoader.

The DataLoader's data set is the plan: its items are whole micro-batches, numbered from the start of training, so
resuming is starting at another number. Workers read and decode, and add the labels and groups from the index: forked,
they share the training process's copy of it, as long as nobody writes.
"""

import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_fair import keyed
from dist_fair.data.augment import Settings, augment, draws
from dist_fair.data.batch import Batch, Packed
from dist_fair.data.index import Index
from dist_fair.data.opencv import opencv
from dist_fair.data.plan import EvaluationPlan, Selection, TrainingPlan
from dist_fair.data.prefetching import prefetched
from dist_fair.data.reading import BadSample, Reader
from dist_fair.errors import DistFairError

# Workers are to be children of the training process (dist_fair.engine.children) and share its index. Python 3.14 has a
# server fork them: each would get a pickle of the index, and all would outlive a training process that is killed.
START = "fork" if sys.platform == "linux" else None


class Loader:
    """This rank's batches of a range of steps, in order; iterate once or again.

    bad: the bad samples met so far by this rank, as batches were handed out. Raises what the reader raises, also
    where a worker process did the reading; DistFairError where a worker died.
    """

    def __init__(self, steps: "_Steps", positions: range, workers: int, device: torch.device | str):
        self.bad: list[BadSample] = []
        self._positions, self._workers = positions, workers
        self._loader = DataLoader(
            steps,
            batch_size=None,
            sampler=positions,
            num_workers=workers,
            multiprocessing_context=START if workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # or it would take its seed from the global generator, and shift dropout
        )

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Batch]:
        return (packed.batch() for packed in self.packed())

    def packed(self) -> Iterator[Packed]:
        """The same batches as they travel, for `prefetched`; pinned if they go to a GPU."""
        for read in self._items():
            if read.batch is None:
                raise DistFairError(read.failure)
            self.bad += read.bad
            yield read.batch

    def _items(self) -> Iterator["_Read"]:
        try:
            yield from self._loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DistFairError(
                f"a loading process died ({str(error).rstrip('.')}): mostly for lack of memory, or of shared memory "
                f"(/dev/shm); try fewer than data.workers={self._workers} processes"
            ) from error


def training_loader(
    plan: TrainingPlan,
    reader: Reader,
    rank: int,
    world: int,
    start: int,
    stop: int,
    workers: int = 0,
    augmentation: Settings | None = None,
    device: torch.device | str = "cpu",
) -> Loader:
    """Micro-batches start, ..., stop - 1 as `rank` of `world` sees them; images uint8 (B/W, S, S, 3), on the CPU.

    augmentation: None for none. device: where batches will go; those for a GPU are pinned.
    """
    plan.owned(rank, world)  # says so now, not in a worker, if W does not divide the lanes
    steps = _TrainingSteps(reader, (plan.batch_size // world,) * world, plan, rank, world, augmentation)
    return Loader(steps, range(start, stop), workers, device)


def evaluation_loader(
    reader: Reader, batch_size: int, rank: int, world: int, workers: int = 0, device: torch.device | str = "cpu"
) -> Loader:
    """Every sample of the reader's index once over all ranks, in canonical order, without augmentation.

    `samples` are the planned rows, -1 for padding, so their hash is that of the index. `valid` is False for padding,
    and, under policy substitute, for bad samples: they are left out and listed in `bad`, since no image can answer
    for another.
    """
    plan = EvaluationPlan(len(reader.index), batch_size, rank, world)
    return Loader(_EvaluationSteps(reader, plan.sizes, plan), range(len(plan)), workers, device)


class Scoring:
    """ScoringData (dist_fair.interventions.base): training samples without augmentation, on the device, normalised.

    rows: which samples take part, for example TrainingPlan.samples; None for all.
    """

    def __init__(
        self,
        reader: Reader,
        rank: int,
        world: int,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        rows: np.ndarray | None = None,
    ):
        self.reader, self.rank, self.world, self.device = reader, rank, world, device
        self.mean, self.std = mean, std
        self.rows = np.arange(len(reader.index)) if rows is None else rows

    def batches(self, size: int, count: int, *key: int | str) -> Iterator[Batch]:
        """`count` global batches of `size` different samples each; this rank's rows, as even a cut as W allows."""
        if not 0 < size <= len(self.rows):
            raise DistFairError(f"a scoring batch of {size} samples: the training data has {len(self.rows)}")
        return prefetched(self._read(size, count, key), self.device, self.mean, self.std)

    def _read(self, size: int, count: int, key: tuple[int | str, ...]) -> Iterator[Packed]:
        bounds = np.arange(self.world + 1) * size // self.world
        sizes = tuple(np.diff(bounds).tolist())
        for number in range(count):
            shuffled = keyed.permutation(len(self.rows), self.reader.seed, "scoring", *key, number)
            mine = self.rows[shuffled[bounds[self.rank] : bounds[self.rank + 1]]]
            read = self.reader.read(mine, np.zeros_like(mine))
            keys = row_keys(self.reader.seed, np.zeros_like(mine), mine)
            batch = _packed(self.reader.index, read.images, read.samples, read.samples >= 0, keys, sizes, number)
            yield batch.pin_memory() if torch.device(self.device).type == "cuda" else batch


@dataclass
class _Read:
    """What travels from a worker: a batch and what was bad in it, or why there is none."""

    batch: Packed | None
    bad: list[BadSample] = field(default_factory=list)
    failure: str = ""

    def pin_memory(self) -> "_Read":
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class _Steps(Dataset):
    """A map from the number of a micro-batch to this rank's part of it, read. sizes: rows per rank."""

    def __init__(self, reader: Reader, sizes: tuple[int, ...]):
        self.reader, self.sizes = reader, sizes

    def __getitem__(self, position: int) -> _Read:
        try:
            return self.read(position)
        except DistFairError as error:  # torch would send its traceback along and lose the text in it
            return _Read(None, failure=str(error))

    def read(self, position: int) -> _Read:
        raise NotImplementedError


class _TrainingSteps(_Steps):
    def __init__(self, reader: Reader, sizes: tuple[int, ...], plan: TrainingPlan, rank: int, world: int,
                 augmentation: Settings | None):  # fmt: skip
        super().__init__(reader, sizes)
        self.plan, self.rank, self.world, self.augmentation = plan, rank, world, augmentation

    def read(self, position: int) -> _Read:
        selection = self.plan.part(position, self.rank, self.world)
        read = self.reader.read(selection.samples, selection.epochs)
        if self.augmentation is not None:
            self._augment(read.images, selection)
        keys = row_keys(self.plan.seed, selection.epochs, selection.samples)
        index, valid = self.reader.index, read.samples >= 0
        return _Read(_packed(index, read.images, read.samples, valid, keys, self.sizes, position), read.bad)

    def _augment(self, images: np.ndarray, selection: Selection) -> None:
        table = draws(self.plan.seed, selection.epochs, selection.samples)
        for image, drawn in zip(images, table, strict=True):
            image[...] = augment(image, self.augmentation, drawn)


class _EvaluationSteps(_Steps):
    def __init__(self, reader: Reader, sizes: tuple[int, ...], plan: EvaluationPlan):
        super().__init__(reader, sizes)
        self.plan = plan

    def read(self, position: int) -> _Read:
        selection = self.plan[position]
        read = self.reader.read(selection.samples, selection.epochs, replace=False)
        keys = row_keys(self.reader.seed, selection.epochs, selection.samples)
        index, valid = self.reader.index, read.samples >= 0
        return _Read(_packed(index, read.images, selection.samples, valid, keys, self.sizes, position), read.bad)


def row_keys(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The random key of each row, (B,) int64: a function of (seed, epoch, sample) alone."""
    rows = zip(epochs.tolist(), samples.tolist(), strict=True)
    return np.array([keyed.integer(seed, "row", epoch, sample) for epoch, sample in rows], dtype=np.int64)


def _packed(index: Index, images: np.ndarray, samples: np.ndarray, valid: np.ndarray, keys: np.ndarray,
            sizes: tuple[int, ...], position: int) -> Packed:  # fmt: skip
    """A batch, with what the index knows of its rows. Padding gets label 0 and unknown attributes."""
    padding = samples < 0

    def column(codes: np.ndarray, missing: int) -> np.ndarray:
        return np.where(padding, missing, codes[samples])

    columns = [column(index.labels, 0), column(index.manipulations.codes, -1), samples, valid, keys]
    columns += [column(one.codes, -1) for one in index.attributes.values()]
    together = torch.from_numpy(np.stack(columns, dtype=np.int64))
    return Packed(torch.from_numpy(images), together, tuple(index.attributes), sizes, position)


def _unchanged(read: _Read) -> _Read:
    return read


def _start_worker(_: int) -> None:
    """One thread per worker, and no opinion of its own about signals.

    Ctrl-C and Slurm's warnings reach the whole process group; the training process decides what they mean, and needs
    its workers until then. SIGTERM is dist_fair.engine.children's to answer, or torch's where no signals are kept.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _tell
    opencv().setNumThreads(0)
    torch.set_num_threads(1)


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of errors in a worker's threads. A training process that is interrupted as it takes a batch is none."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)
