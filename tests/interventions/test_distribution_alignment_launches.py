"""What distribution alignment costs a GPU besides arithmetic: see `launches`.

The transport is one operation to torch, as it is one kernel there; test_transport.py looks inside of it.
"""

from contextlib import nullcontext

import pytest
import torch

from dist_fair.collectives import Communicator
from dist_fair.interventions.distribution_alignment import DistributionAlignment
from tests.interventions.launches import build, counted, detected, gradients, loaded, run
from tests.interventions.test_launches import compiled

NAME = "distribution_alignment"
# Kernels forward and backward, with a wire of its own: ceilings, and what they are today.
BUDGETS = {
    "default": ({}, 37),
    "attributes": ({"attributes": ["race"]}, 37),
    "groups": ({"average": "groups"}, 35),
    "debiased": ({"debias": True}, 49),
    "silverman": ({"bandwidth": "silverman"}, 115),
    "samples": ({"support": "samples"}, 35),
    "debiased samples": ({"support": "samples", "debias": True}, 43),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_few_kernels_no_waits_and_always_in_the_same_order(case):
    settings, budget = BUDGETS[case]
    found = counted(build(NAME, settings), loaded(), detected())
    assert found.kernels["entropic_transport"] == 1
    assert found.kernels.total() <= budget, found.kernels.most_common()
    assert not found.waits
    assert not found.unordered


@pytest.mark.parametrize("case", BUDGETS)
def test_nothing_comes_from_the_host_or_goes_there(case, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which there is none of on `meta`
    outputs = detected("meta")
    found = run(build(NAME, BUDGETS[case][0]).to("meta"), loaded().to("meta"), outputs)
    assert found[NAME].is_meta
    assert outputs.logits.grad.shape == outputs.logits.shape


@pytest.mark.parametrize("case", BUDGETS)
def test_each_hook_is_one_graph_and_gives_the_same(case):
    torch.compiler.reset()
    comm, plain, other = Communicator(), detected(), detected()
    expected = run(build(NAME, BUDGETS[case][0]), loaded(), plain)
    found = run(compiled(build(NAME, BUDGETS[case][0]), comm), loaded(), other, comm)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for leaf, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(other)[leaf], gradient, rtol=1e-6, atol=1e-7, msg=leaf)


def test_tables_are_no_part_of_checkpoints():
    assert not build(NAME, {}).state_dict()


# Planted bugs ---------------------------------------------------------------------------------------------------------


def finds_who_is_present(points, q, classes, counts):
    group, label = (counts > 0).nonzero(as_tuple=True)
    return points, q[group, label][:, None].expand(-1, 2, -1), classes, counts[group]


def picks_by_a_mask(points, q, classes, counts):
    return points, q[counts.sum(1) > 0], classes, counts[counts.sum(1) > 0]


def asks_for_a_number(points, q, classes, counts):
    return points, q, classes, counts / max(counts.max().item(), 1)


def brings_the_grid(points, q, classes, counts):
    return torch.tensor(points.tolist(), dtype=points.dtype, device=points.device), q, classes, counts


@pytest.mark.parametrize("bug", [finds_who_is_present, picks_by_a_mask, asks_for_a_number, brings_the_grid])
def test_planted_waits_are_found(bug, monkeypatch):
    original = DistributionAlignment._from_sums
    monkeypatch.setattr(DistributionAlignment, "_from_sums", lambda self, *summary: bug(*original(self, *summary)))
    assert counted(build(NAME, {}), loaded(), detected()).waits


def test_a_planted_sum_by_index_is_found(monkeypatch):
    original = DistributionAlignment.summarise

    def by_index(self, outputs, batch, weights):
        summary = original(self, outputs, batch, weights)
        sums = summary["sums"].tensor
        places = torch.arange(len(sums), device=sums.device)
        summary["sums"].tensor = torch.zeros_like(sums).index_add(0, places, sums)
        return summary

    monkeypatch.setattr(DistributionAlignment, "summarise", by_index)
    assert counted(build(NAME, {}), loaded(), detected()).unordered
