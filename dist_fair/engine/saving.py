"""When a checkpoint is due: the state is copied off the device, and written while training goes on."""

import time
from collections.abc import Mapping
from pathlib import Path

from dist_fair.collectives import Communicator
from dist_fair.engine import checkpoint
from dist_fair.engine.backends.base import Backend


class Saver:
    """Writes the checkpoints of a run. All methods are called on all ranks together.

    folder: of the checkpoints. recipe: what a checkpoint must agree with to be resumed. keep: newest ones to keep.
    """

    def __init__(self, folder: Path, recipe: Mapping, comm: Communicator, keep: int):
        self.folder, self.recipe, self.comm, self.keep = folder, recipe, comm, keep

    def save(self, step: int, backend: Backend) -> dict[str, object]:
        """Begins the checkpoint of a step; returns how long training stood still for it, to be logged."""
        began = time.perf_counter()
        parts = backend.state(lambda name: self.comm.rank == 0)
        if self.comm.rank == 0:
            checkpoint.write(self.folder, step, self.recipe, parts)
            checkpoint.prune(self.folder, self.keep)
        self.comm.barrier("checkpoint")
        return {"checkpoint_seconds": time.perf_counter() - began}

    def finish(self) -> None:
        """Waits until everything begun is on disk. Raises what went wrong."""
