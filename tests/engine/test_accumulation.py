"""Exact gradient accumulation: W ranks times A micro-batches are one big batch, to every intervention.

fp64 and a network with group norm and dropout: what differs is a bug, and every planted bug makes it differ.
"""

import weakref
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_fair.collectives import Communicator
from tests.engine import accumulation_worlds as worlds
from tests.engine.accumulation_worlds import BATCH, BUGS, CASES, STEPS, difference, step, trajectory
from tests.ranks import run_ranks

EXACT, WRONG = 1e-10, 1e-4
PARTS = (1, 2, 4)
TASKS = [(case, parts) for case in CASES if case != "delayed" for parts in PARTS]


@cache
def whole(case):
    """One rank, one batch, no DDP."""
    return step(Communicator(), case, 1)


@cache
def on_ranks(world):
    return run_ranks(world, worlds.steps, TASKS)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("case", "parts"), TASKS)
def test_ranks_times_micro_batches_are_one_big_batch(case, parts, world):
    for found in (answers[TASKS.index((case, parts))] for answers in on_ranks(world)):
        assert difference(whole(case), found) < EXACT
