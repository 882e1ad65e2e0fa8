"""The test tool itself: order of results, errors of one rank, dead and hung ranks."""

import os
import time

import pytest
import torch

from dist_fair.errors import DistFairError
from tests.ranks import run_ranks


def rank_and_sum(comm, values):
    total = comm.sum(torch.tensor(values[comm.rank]), "test")
    return {"rank": comm.rank, "world": comm.world, "sum": total, "threads": torch.get_num_threads()}


def fail_on(comm, rank):
    if comm.rank == rank:
        raise DistFairError("planted")
    comm.barrier("waiting for the planted one")


def die_on(comm, rank):
    if comm.rank == rank:
        os._exit(3)
    comm.barrier("waiting for the dead")


def hang_on(comm, rank):
    if comm.rank == rank:
        time.sleep(60)
    comm.barrier("waiting for the late")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_in_rank_order(world):
    results = run_ranks(world, rank_and_sum, [1.0, 2.0, 3.0, 4.0])
    assert [result["rank"] for result in results] == list(range(world))
    assert all(result["world"] == world and result["threads"] == 1 for result in results)
    assert all(result["sum"].item() == sum([1.0, 2.0, 3.0, 4.0][:world]) for result in results)


def test_an_error_keeps_its_type_and_names_the_rank():
    with pytest.raises(DistFairError, match="planted") as caught:
        run_ranks(3, fail_on, 1)
    assert "on rank 1 of 3" in caught.value.__notes__[0]
    assert "fail_on" in caught.value.__notes__[0]


def test_a_dead_rank_is_an_error():
    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_ranks(2, die_on, 1)


def test_a_hung_rank_is_named():
    with pytest.raises(TimeoutError, match=r"0 \(last collective: waiting for the late\)"):
        run_ranks(2, hang_on, 1, timeout=4.0)
