"""Ranks that may end in any way: by an exit code, a signal, or not at all.

    for ended in endings(2, arguments, Event(1, "step", 3, "SIGUSR1")):
        ended.code, ended.said

As tests.ranks.run_ranks, which kills all ranks when one of them dies; here that is the point. An event happens on one
rank, just as it begins a piece of work.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from tests.ranks import _unnamed_main

TIMEOUT = 300.0  # seconds for all ranks to end, on a busy machine


@dataclass(frozen=True)
class Event:
    """What happens on `rank`, as it begins its `number`-th (from 0) piece of work of a kind.

    kind: "start" (of the program, before the ranks know each other), "worker" (a data worker starts, each number 0),
    "step", "scoring" or "evaluation" (batches), or "checkpoint".
    what: the name of a signal to itself; "group SIGNAL", which somebody else sends to all processes of the rank;
    "sleep SECONDS"; or "raise TEXT".
    """

    rank: int
    kind: str
    number: int
    what: str


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code, negative for a signal; and what it said on both outputs."""

    code: int | None
    said: str


def endings(
    world: int,
    arguments: Sequence[object],
    *events: Event,
    verb: str = "train",
    timeout: float = TIMEOUT,
    **environment: object,
) -> list[Ended]:
    """`dist-fair VERB *arguments` on `world` ranks of one thread each, to the end of all of them.

    environment: set on every rank. A rank that has not ended after `timeout` seconds is killed and has code None; so is
    one that was stopped (SIGSTOP), once the others have ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed", "timm", "accelerate", "pytest", "dist_fair.training", "sklearn.metrics"]
    )
    settings = {name: str(value) for name, value in environment.items()}
    with tempfile.TemporaryDirectory() as folder, _unnamed_main():
        began = time.monotonic()
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, verb, [str(one) for one in arguments],
                                                [event for event in events if event.rank == rank], settings))
            for rank in range(world)
        ]  # fmt: skip
        for rank in ranks:
            rank.start()
        stopped = {event.rank for event in events if event.what == "SIGSTOP"}
        for number, rank in enumerate(ranks):
            if number not in stopped:
                rank.join(max(0.0, began + timeout - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        return [Ended(code, Path(folder, str(number)).read_text()) for number, code in enumerate(codes)]


def _rank(rank, world, folder, verb, arguments, events, settings):
    output = os.open(os.path.join(folder, str(rank)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if any(event.what.startswith("group") for event in events):
        os.setpgid(0, 0)
    if world > 1:
        os.environ.update({name: str(rank) for name in ("RANK", "LOCAL_RANK")})
        os.environ.update({name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")})
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | settings)
    torch.set_num_threads(1)

    from dist_fair import cli
    from dist_fair.engine import launch

    accelerator = launch.accelerator

    def connected():
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.FileStore(os.path.join(folder, "store"), world), rank=rank,
                                    world_size=world)  # fmt: skip
        return accelerator()

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.cuda, "device_count", return_value=0))
        patches.enter_context(mock.patch("dist_fair.session.accelerator", connected))
        for event in events:
            patches.enter_context(_planned(event))
        code = cli.main([verb, *arguments])
    raise SystemExit(code)


def _planned(event: Event):
    """A patch with which the event happens."""
    from dist_fair.data import loading
    from dist_fair.engine.loop import Trainer
    from dist_fair.engine.module import TrainingModule
    from dist_fair.engine.saving import Saver
    from dist_fair.interventions.channel_decoupling import ChannelDecoupling
    from dist_fair.recipe import composition

    owner, name = {
        "start": (composition, "load"),
        "worker": (loading, "_start_worker"),
        "step": (Trainer, "_step"),
        "scoring": (ChannelDecoupling, "_losses"),
        "evaluation": (TrainingModule, "score"),
        "checkpoint": (Saver, "save"),
    }[event.kind]
    real, seen = getattr(owner, name), []

    def observed(*arguments, **named):
        if len(seen) == event.number:
            happen(event.what)
        seen.append(1)
        return real(*arguments, **named)

    return mock.patch.object(owner, name, observed)


def happen(what: str) -> None:
    """Something that befalls this process now."""
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    elif what.startswith("group"):
        kill = ["kill", "-s", what.removeprefix("group SIG"), "--", f"-{os.getpgrp()}"]
        subprocess.run(kill, start_new_session=True, check=True)
    elif what.startswith("sleep"):
        time.sleep(float(what.split()[1]))
    else:
        raise ValueError(what.removeprefix("raise "))
