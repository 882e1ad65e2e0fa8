"""Kernels and host waits of every intervention: what a step pays for it on a GPU, held where there is none."""

from contextlib import nullcontext

import pytest
import torch

from dist_fair.collectives import Communicator
from dist_fair.interventions.base import registered
from dist_fair.interventions.cross_entropy import CrossEntropy
from dist_fair.interventions.subgroup_norm import SubgroupNorm
from tests.interventions.launches import build, counted, detected, gradients, loaded, run

# Kernels forward and backward with a wire of their own, 4 of them: 64 samples, 8 groups, 2,048 features. Ceilings, and
# what they are today. The number behind each is that of plain autograd through the formulas as they are printed.
BUDGETS = {
    "cross_entropy": ("cross_entropy", {}, 23),  # 38
    "class balanced": ("cross_entropy", {"reduction": "class_balanced"}, 22),  # 36
    "inverse_propensity": ("inverse_propensity", {}, 1),
    "subgroup_norm": ("subgroup_norm", {}, 48),  # 155
    "subgroup_norm, detached": ("subgroup_norm", {"detach": True}, 35),  # 101
    "low_rank_projection": ("low_rank_projection", {}, 10),  # 15
    "low_rank_projection, normalised": ("low_rank_projection", {"normalise": True}, 17),  # 33
    "pair_alignment": ("pair_alignment", {}, 31),  # 96
    "pair_alignment, manipulations": ("pair_alignment", {"match": "manipulation"}, 31),  # 103
    "pair_alignment, opposite": ("pair_alignment", {"pairs": "opposite:gender"}, 31),  # 104
    "pair_alignment, balanced": ("pair_alignment", {"balanced": True}, 34),  # 96
    "pair_alignment, hardest": ("pair_alignment", {"pairs": "hardest", "hardest": 3}, 57),  # 89
    "daw_fdd": ("conditional_value_at_risk", {}, 68),  # 290
    "daw_fdd, smoothed": ("conditional_value_at_risk", {"outer": "smoothed"}, 136),  # 694
    "daw_fdd, guarded": ("conditional_value_at_risk", {"outer": "guarded"}, 135),  # 694
    "dag_fdd": ("conditional_value_at_risk", {"attributes": [], "inner_alpha": None}, 44),  # 155
    "margin_loss": ("margin_loss", {}, 21),  # 43
    "shared_forgery": ("shared_forgery", {}, 16),  # 23
    "specific_forgery": ("specific_forgery", {}, 16),  # 30
    "contrastive_loss": ("contrastive_loss", {}, 168),  # 364
    "contrastive_loss, local": ("contrastive_loss", {"scope": "local"}, 170),  # 364
    "contrastive_loss, self pairs": ("contrastive_loss", {"self_pairs": True}, 167),  # 386
    "reconstruction_loss": ("reconstruction_loss", {}, 58),  # 99
}
ELSEWHERE = {"distribution_alignment", "channel_decoupling"}  # a test of its own; works between steps
DEFAULTS = [case for case in BUDGETS if "," not in case]


def test_every_intervention_has_a_budget():
    assert {name for name, *_ in BUDGETS.values()} | ELSEWHERE == registered().keys()


@pytest.mark.parametrize("case", BUDGETS)
def test_few_kernels_no_waits_and_always_in_the_same_order(case):
    name, settings, budget = BUDGETS[case]
    found = counted(build(name, settings), loaded(), detected())
    assert found.kernels.total() <= budget, found.kernels.most_common()
    assert not found.waits
    assert not found.unordered


@pytest.mark.parametrize("case", BUDGETS)
def test_nothing_comes_from_the_host_or_goes_there(case, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which there is none of on `meta`
    name, settings, _ = BUDGETS[case]
    found = run(build(name, settings).to("meta"), loaded().to("meta"), detected("meta"))
    assert all(value.is_meta for value in found.values())


STATE = {
    "subgroup_norm": ["frequencies", "running_count", "running_mean", "running_variance"],
    "low_rank_projection": ["basis"],
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_tables_are_no_part_of_checkpoints(case):
    name, settings, _ = BUDGETS[case]
    assert list(build(name, settings).state_dict()) == STATE.get(name, [])


# Compiled -------------------------------------------------------------------------------------------------------------


def compiled(intervention, comm):
    """Each hook as one graph; transform of subgroup norm has the wire in the middle."""
    for verb in ("replicated_sum", "replicated_gather", "shared_sum"):
        setattr(comm, verb, torch.compiler.disable(getattr(comm, verb)))
    for hook in ("transform", "weigh", "summarise", "objective"):
        if hook in vars(type(intervention)):
            whole = (type(intervention), hook) != (SubgroupNorm, "transform")
            function = torch.compile(getattr(intervention, hook), backend="aot_eager", fullgraph=whole, dynamic=False)
            setattr(intervention, hook, function)
    return intervention


@pytest.mark.parametrize("case", [*DEFAULTS, "pair_alignment, hardest", "daw_fdd, smoothed"])
def test_each_hook_is_one_graph_and_gives_the_same(case):
    name, settings, _ = BUDGETS[case]
    torch.compiler.reset()
    comm, plain, other = Communicator(), detected(), detected()
    expected = run(build(name, settings), loaded(), plain)
    found = run(compiled(build(name, settings), comm), loaded(), other, comm)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for leaf, gradient in gradients(plain).items():
        if gradient is None:
            assert gradients(other)[leaf] is None, leaf
            continue
        largest = gradient.abs().max().item()
        assert largest > 1e-6, leaf
        torch.testing.assert_close(gradients(other)[leaf], gradient, rtol=1e-6, atol=1e-6 * largest, msg=leaf)


# Planted bugs ---------------------------------------------------------------------------------------------------------


def asks_for_a_number(self, sums):
    return sums / max(sums.sum().item(), 1)


def picks_by_a_mask(self, sums):
    return sums[sums[:, 2] > 0]


def finds_places(self, sums):
    return sums[sums[:, 2].nonzero()[:, 0]]


def brings_numbers(self, sums):
    return sums * torch.tensor([1.0, 1.0, 2.0], device=sums.device)


def picks_by_a_list(self, sums):
    return sums[[1, 0]]


def adds_by_index(self, sums):
    return torch.zeros_like(sums).index_add(0, torch.arange(2, device=sums.device), sums)


def looks_on_the_host(self, sums):
    return sums / max(sums.detach().cpu().numpy().sum(), 1)


def takes_many_small_steps(self, sums):
    return torch.stack([row * 1.0 for row in sums.flatten()]).view_as(sums)


@pytest.fixture
def planted(monkeypatch):
    """Plants a function of what goes into the objective of cross-entropy."""
    objective = CrossEntropy.objective

    def plant(bug):
        monkeypatch.setattr(
            CrossEntropy, "objective", lambda self, summary: objective(self, {"classes": bug(self, summary["classes"])})
        )

    return plant


@pytest.mark.parametrize(
    "bug", [asks_for_a_number, picks_by_a_mask, finds_places, brings_numbers, picks_by_a_list]
)  # fmt: skip
def test_planted_waits_are_found(planted, bug):
    planted(bug)
    assert counted(build("cross_entropy", {}), loaded(), detected()).waits


def test_planted_disorder_and_planted_kernels_are_found(planted):
    planted(adds_by_index)
    assert counted(build("cross_entropy", {}), loaded(), detected()).unordered
    planted(takes_many_small_steps)
    assert counted(build("cross_entropy", {}), loaded(), detected()).kernels.total() > BUDGETS["cross_entropy"][2]


@pytest.mark.parametrize("bug", [looks_on_the_host, asks_for_a_number, finds_places])
def test_planted_looks_at_the_host_are_found(planted, bug):
    planted(bug)
    with pytest.raises((NotImplementedError, RuntimeError)):
        run(build("cross_entropy", {}).to("meta"), loaded().to("meta"), detected("meta"))


def test_planted_constants_of_the_host_are_found(planted):
    """Made on the CPU, where the sums are not."""
    planted(lambda self, sums: sums * torch.ones(3))
    with pytest.raises((NotImplementedError, RuntimeError)):
        run(build("cross_entropy", {}).to("meta"), loaded().to("meta"), detected("meta"))
