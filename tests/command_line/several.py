"""Several runs, one after another, in one set of ranks forked from a process that has imported torch.

    together(2, [Start(folder / "2", arguments), Start(folder / "no_factor", arguments, bug="no_factor")])

A rank that torchrun starts spends 9 s of CPU on imports, a run of 32 steps 5 s. That the program can be launched as a
person would is shown by test_commands.py.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from dist_fair.errors import DistFairError
from tests.command_line import planted
from tests.ranks import run_ranks

TIMEOUT = 900  # seconds for all runs of a call, on a busy machine


@dataclass(frozen=True)
class Start:
    """One start of `dist_fair.train`.

    out: the run folder; arguments: all but out=; bug: of `planted`. What is printed goes to OUT.log, and a bug that is
    refused leaves the error in OUT.refused.
    """

    out: Path
    arguments: Sequence[str]
    bug: str | None = None


def together(world: int, starts: Sequence[Start]) -> None:
    """The runs in turn on `world` ranks of one thread each, on the CPU. Raises what a run without a bug raises."""
    run_ranks(world, _train, starts, timeout=TIMEOUT)


def _train(comm, starts: Sequence[Start]) -> None:
    """What one rank does, in the environment that torchrun gives it."""
    from dist_fair import train

    rank, world = str(comm.rank), str(comm.world)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, OMP_NUM_THREADS="1")
    for start in starts:
        with (
            open(f"{start.out}.log" if comm.rank == 0 else os.devnull, "a") as log,
            contextlib.redirect_stdout(log),
            mock.patch.object(torch.cuda, "device_count", return_value=0),
            getattr(planted, start.bug)() if start.bug else contextlib.nullcontext(),
        ):
            try:
                train.main([*start.arguments, f"out={start.out}"])
            except DistFairError as error:
                if not start.bug:
                    raise
                Path(f"{start.out}.refused").write_text(str(error))
