"""Saving while training goes on: what is copied, who writes it, and how ranks learn that all of it is on disk.

Training stands still for the copy of the state to host memory. A thread then writes, fsyncs, hashes and renames, all of
which release Python's lock; a process beside it would need the state copied once more. One write is in flight at most:
the next save waits for it, so that memory holds one copy and the disk one checkpoint more than are kept.

A state below SHARD bytes is written by rank 0 alone, and needs no agreement: 512 ranks that write 512 small files wait
longer for the file server's names than for their bytes. A larger one is dealt, tensor by tensor and largest first, to
as many ranks as it has times SHARD, spread evenly over the ranks and so over the nodes and their cables. A rank holds
copies of its own tensors only.

Then somebody must know that every rank is done, before the folder gets its final name. Two ways:

  by files        Each rank leaves a small file when it is done, and rank 0 looks for them. On a file system whose
                  clients cache attributes (NFS: 3 to 60 s) they come late, which a thread could bear. But a file that
                  does not come says nothing: is the rank slow, is its disk full (then it cannot write that either), or
                  is the folder of another node another folder? And a file may be of the run that was killed here.
  by collectives  Exact, and a failure arrives like a success. But a collective in a thread may meet another rank's
                  main thread in another collective: with NCCL that hangs, with gloo it mixes numbers up. So they are
                  made by the main thread, where all ranks are at the same place: between steps.

This is the second. `poll`, after each step, is one all-reduce of four bytes while a dealt write is in flight, and
nothing otherwise. Once all are done the ranks tell each other names, sizes and hashes, and rank 0's thread finishes the
folder, after looking for each file by name: a name that was never looked up is asked of the server and not of a cache.
What failed in any thread is raised on all ranks, by the next `save` or `finish` at the latest; what was newest stays.
"""

import heapq
import math
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.engine import checkpoint, checkpoint_writing
from dist_fair.engine.backends.base import Backend, Tensors
from dist_fair.engine.checkpoint_writing import Best
from dist_fair.errors import DistFairError

SHARD = 2**28  # bytes of parameters and buffers for each rank that writes


class Saver:
    """Writes the checkpoints of a run. All methods are called on all ranks together, by the main thread.

    folder: of the checkpoints. recipe: what a checkpoint must agree with to be resumed. keep: newest ones to keep.
    best: (min or max, name of a value): the best one is kept too. shard: see SHARD.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping,
        comm: Communicator,
        keep: int,
        best: tuple[str, str] | None = None,
        *,
        shard: int = SHARD,
    ):
        self.folder, self.recipe, self.comm, self.keep, self.shard = folder, recipe, comm, keep, shard
        self.best = Best(*best) if best else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._step: int | None = None  # whose checkpoint is in flight
        self._state: dict | None = None  # of a dealt one, until all ranks' files are written
        self._job: Future | None = None  # what this rank's thread does for it
        self._writes = False  # whether this rank has files of it

    def save(self, step: int, backend: Backend, values: Mapping[str, object] | None = None) -> dict[str, object]:
        """Begins the checkpoint of a step; returns how long training stood still for it, to be logged.

        values: told with the last step; numbers are kept beside the state. Raises what went wrong with the checkpoint
        before, and DistFairError if the best one is to be told by something else than these values.
        """
        began = time.perf_counter()
        self.finish()
        waited = time.perf_counter() - began
        shards = deal(sizes(backend.module), self.comm.world, self.shard)
        count = 1 + max(shards.values(), default=0)
        own = written_by(self.comm.rank, self.comm.world, count)
        parts = backend.state(lambda name: shards.get(name, 0) == own)
        state = {"step": step, "recipe": self.recipe, "values": _numbers(values or {}),
                 "writer": {"backend": backend.name, "ranks": self.comm.world}}  # fmt: skip
        self._step, self._writes = step, own is not None
        if count > 1:
            self._begin(parts, state, own, count)
        elif own is not None:
            self._job = self._thread.submit(self._write_whole, parts, state)
        if self.best and (fault := self.best.unknown(values or {})):
            self.finish()
            raise _everywhere(f"{fault} ({checkpoint.name_of(step)} is written)")
        return {"checkpoint_seconds": time.perf_counter() - began, "checkpoint_wait_seconds": waited}

    @property
    def busy(self) -> bool:
        """True while this rank's thread is at work."""
        return self._job is not None and not self._job.done()

    def poll(self) -> None:
        """To be called after each step: completes a checkpoint of several ranks once all have written their files."""
        if self._state is not None and not self.comm.any(self.busy, "checkpoint"):
            self._complete()

    def finish(self) -> None:
        """Waits until everything begun is on disk. Raises what went wrong, on every rank alike."""
        if self._state is not None:
            self._complete()
        if self._step is not None:
            self._settle()
            self._step = None

    def _begin(self, parts: Mapping[str, Tensors], state: dict, own: int | None, count: int) -> None:
        if self.comm.rank == 0:
            self._job = self._thread.submit(checkpoint_writing.begin, self.folder, state["step"])
        self._settle()  # nobody writes into a folder that is yet to be cleared
        self._state = state
        if own is not None:
            self._job = self._thread.submit(self._write_files, parts, state["step"], own, count)

    def _complete(self) -> None:
        """Every rank tells what it has written; rank 0 makes it a checkpoint."""
        files = {name: file for told in self._settle() for name, file in (told or {}).items()}
        if self.comm.rank == 0:
            self._job = self._thread.submit(self._commit, self._state, files)
        self._state = None

    def _settle(self) -> list:
        """What every rank's job gave. Waits for all; if one failed, nothing is in flight and all ranks raise it."""
        cause = self._job.exception() if self._job else None
        given = self._job.result() if self._job and not cause else None
        told = self.comm.objects([given, cause and _described(cause)], "checkpoint")
        self._job = None
        failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(told) if failure]
        if not failures:
            return [given for given, _ in told]
        target = self.folder / checkpoint.name_of(self._step)
        self._step = self._state = None
        if self._writes:
            shutil.rmtree(checkpoint_writing.aside(target), ignore_errors=True)
        if cause and not isinstance(cause, OSError | DistFairError):
            raise cause
        last = checkpoint.newest(self.folder)
        kept = f"the same command goes on from {last.name}" if last else "there is none before it"
        raise _everywhere(f"{target} could not be written ({'; '.join(failures[:3])}): make room or mend that; {kept}")

    # In the thread ----------------------------------------------------------------------------------------------------

    def _write_whole(self, parts: Mapping[str, Tensors], state: dict) -> None:
        checkpoint_writing.write(self.folder, parts=parts, **state)
        checkpoint_writing.prune(self.folder, state["step"], self.keep, self.best)

    def _write_files(self, parts: Mapping[str, Tensors], step: int, number: int, count: int) -> dict[str, dict]:
        folder = checkpoint_writing.aside(self.folder / checkpoint.name_of(step))
        folder.mkdir(parents=True, exist_ok=True)  # where it is missing, the folder is not shared: `commit` says so
        names = {part: checkpoint.file_name(part, number, count) for part in parts}
        return {names[part]: checkpoint_writing.write_file(folder / names[part], parts[part]) for part in parts}

    def _commit(self, state: dict, files: Mapping[str, Mapping]) -> None:
        checkpoint_writing.commit(self.folder, state, files)
        checkpoint_writing.prune(self.folder, state["step"], self.keep, self.best)


def sizes(module: nn.Module) -> dict[str, int]:
    """Bytes of all parameters and buffers by name, the same on all ranks, whoever holds what of them."""
    # DeepSpeed leaves an empty tensor where another rank holds the parameter, and its size in ds_numel.
    return {name: getattr(value, "ds_numel", value.numel()) * value.element_size()
            for name, value in module.state_dict(keep_vars=True).items()}  # fmt: skip


def deal(sizes: Mapping[str, int], world: int, shard: int) -> dict[str, int]:
    """Name of a tensor -> number of the shard, 0 up to at most `world` - 1, that has it, of `shard` bytes or so each.

    The largest first, each to the shard that holds least: the same on all ranks, whatever order `sizes` has.
    """
    count = max(1, min(world, len(sizes), math.ceil(sum(sizes.values()) / shard)))
    held, dealt = [(0, number) for number in range(count)], {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        size, number = held[0]
        dealt[name] = number
        heapq.heapreplace(held, (size + sizes[name], number))
    return dealt


def written_by(rank: int, world: int, count: int) -> int | None:
    """The number of the shard that a rank writes, or None; the writers are spread evenly, rank 0 writes number 0."""
    return next((number for number in range(count) if number * world // count == rank), None)


def _numbers(values: Mapping[str, object]) -> dict[str, int | float]:
    return {name: value for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)}  # fmt: skip


def _described(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) if isinstance(error, DistFairError) else f"{type(error).__name__}: {error}"


def _everywhere(text: str) -> DistFairError:
    error = DistFairError(text)
    error.everywhere = True
    return error
