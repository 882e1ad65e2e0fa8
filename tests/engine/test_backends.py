"""DDP, FSDP and ZeRO 1 to 3 take the same steps, on any number of ranks, and each goes on from the state of any other.

All that a backend could get wrong is in the few steps of a run: clipping, accumulation, pruning between steps, synced
norm, moments per group, parameters of interventions, a decoder that runs twice. The planted bugs are those of sharding.
"""

import re

import numpy as np
import pytest

from dist_fair.recipe.schema import Sam
from tests.engine import backends_worlds as worlds
from tests.engine.backends_worlds import Task
from tests.ranks import run_ranks

TOLERANCE = 1e-5  # relative, fp32, DESIGN 8.4
SHARDED = ("fsdp", "zero1", "zero2", "zero3")
ADAM, SGD = {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05}, {"name": "sgd", "lr": 0.05, "momentum": 0.9}
CASES = {
    "erm": {},
    "erm climbing in fp64": {"optimizer": ADAM | {"sam": Sam(rho=0.05)}, "train": {"precision": "fp64"}},
    "sfd_gda by sgd": {"optimizer": SGD},
    "daid in two": {"train": {"accumulate": 2}},
    "pg_fdd": {},
    "pg_fdd_frozen in two as one": {"train": {"accumulate": 2, "accumulate_exact": True}},
    "tokens run again": {"train": {"checkpoint_activations": True}},
}
GRID = [(case, backend) for case in CASES for backend in SHARDED if backend == "fsdp" or "climbing" not in case]
TWICE = ("pg_fdd_frozen in two as one", "tokens run again")
QUICK = [*(("daid in two", backend) for backend in SHARDED), ("erm climbing in fp64", "fsdp"),
         *((case, backend) for case in ("sfd_gda by sgd", *TWICE) for backend in ("fsdp", "zero3"))]  # fmt: skip
OFFLOADED = ("fsdp", "zero2", "zero3")
REFUSING = ("ddp", "fsdp", "zero3")
# Backends on 1, 2 and 4 ranks, of which each goes on from the state of the one before.
RELAYS = [("ddp", "fsdp", "zero3"), ("zero3", "zero2", "fsdp"), ("fsdp", "ddp", "zero1")]
RELAYED = "daid in two"
# What tells of a bug: the first norm of the run "erm", or its later losses where it goes on from a state.
BUGS = {"gradients_summed": "norms", "norm_of_own_part": "norms", "buffers_left_behind": "channel_mask",
        "moments_of_the_next_rank": "later losses", "steps_one_ahead": "later losses"}  # fmt: skip
BUGGY = [("gradients_summed", "fsdp"), ("gradients_summed", "zero2"), ("norm_of_own_part", "zero3"),
         ("buffers_left_behind", "zero3"), ("moments_of_the_next_rank", "fsdp"), ("moments_of_the_next_rank", "zero2"),
         ("steps_one_ahead", "zero2")]  # fmt: skip


def task(case, backend="ddp", **more):
    return Task(backend, case.partition(" ")[0], **(CASES[case] | more))


def together(world, tasks):
    """{name: result} of {name: task}; the ranks must end with the same state."""
    first, *others = run_ranks(world, worlds.run, [*tasks.values()], timeout=600)
    for result, *rest in zip(first, *others, strict=True):
        assert "model" not in result or all(
            np.array_equal(result["model"][name], one["model"][name]) for one in rest for name in one["model"]
        )
    return dict(zip(tasks, first, strict=True))


@pytest.fixture(scope="module")
def runs():
    """{(number of ranks, name): result}"""
    one = {case: task(case) for case in CASES if case != "pg_fdd"} | {"begun": task("erm", stop=1)}
    one |= {relay: task(RELAYED, relay[0], stop=1) for relay in RELAYS}
    found = {(1, name): result for name, result in together(1, one).items()}

    two = {pair: task(*pair) for pair in QUICK}
    two |= {("offload", backend): task("erm", backend, train={"offload": True}) for backend in OFFLOADED}
    two |= {relay: task(RELAYED, relay[1], stop=2, start=found[1, relay]) for relay in RELAYS}
    two |= {("misfits", backend): task("erm", backend, misfits=True, stop=1) for backend in REFUSING}
    for bug, backend in BUGGY:
        start = found[1, "begun"] if BUGS[bug] == "later losses" else None
        case = "sfd_gda by sgd" if BUGS[bug] == "channel_mask" else "erm"
        two[bug, backend] = task(case, backend, bug=bug, start=start, stop=1 if BUGS[bug] == "norms" else worlds.STEPS)
    found |= {(2, name): result for name, result in together(2, two).items()}

    four = {relay: task(RELAYED, relay[2], start=found[2, relay]) for relay in RELAYS}
    return found | {(4, name): result for name, result in together(4, four).items()}


@pytest.mark.parametrize(("case", "backend"), QUICK)
def test_it_is_the_run_of_one_rank(runs, case, backend):
    assert_same(runs[1, case], runs[2, (case, backend)], 1e-9 if "fp64" in case else TOLERANCE)


@pytest.mark.parametrize("backend", OFFLOADED)
def test_with_its_parts_on_the_cpu_too(runs, backend):
    assert_same(runs[1, "erm"], runs[2, ("offload", backend)])


@pytest.mark.parametrize("relay", RELAYS)
def test_each_goes_on_from_the_state_of_any_other(runs, relay):
    undisturbed, legs = runs[1, RELAYED], [runs[world, relay] for world in (1, 2, 4)]
    told = {kind: np.concatenate([leg[kind] for leg in legs]) for kind in ("losses", "norms")}
    assert_same(undisturbed, legs[-1] | told)


@pytest.mark.parametrize(("bug", "backend"), BUGGY)
def test_a_planted_bug_is_noticed(runs, bug, backend):
    found, sign = runs[2, (bug, backend)], BUGS[bug]
    if sign == "channel_mask":
        masks = [run["model"]["detector.channel_mask"] for run in (runs[1, "sfd_gda by sgd"], found)]
        assert (masks[0] == 0).any()
        assert (masks[1] == 1).all()
    elif sign == "later losses":
        assert apart(runs[1, "erm"]["losses"][1:], found["losses"]) > 10 * TOLERANCE
    else:
        assert apart(runs[1, "erm"]["norms"][:1], found["norms"]) > 0.1


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_of_them_in_all_cases(world):
    one, many = together(1, {case: task(case) for case in CASES}), together(world, {pair: task(*pair) for pair in GRID})
    for (case, backend), found in many.items():
        loss, norm = (apart(one[case][kind], found[kind]) for kind in ("losses", "norms"))
        print(f"{case}, {backend}, {world} ranks: losses {loss:.1e}, norms {norm:.1e}")
        assert_same(one[case], found, 1e-9 if "fp64" in case else TOLERANCE)


def test_each_says_what_a_rank_holds(runs):
    told = {backend: runs[2, (RELAYED, backend)]["tells"] for backend in SHARDED}
    whole = int(re.search(r"all ([\d,]+) parameters", runs[1, RELAYED]["tells"])[1].replace(",", ""))
    for backend, text in told.items():
        assert text.startswith(f"{backend}: 2 ranks, ")
        held, total = (int(number.replace(",", "")) for number in re.search(r"([\d,]+) of ([\d,]+)", text).groups())
        assert total == whole
        assert abs(held - whole / 2) <= 2
    assert "moments and gradients of" in told["zero2"]
    assert "gradients and weights of" in told["zero3"]


@pytest.mark.parametrize("backend", REFUSING)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(runs, backend):
    texts = runs[2, ("misfits", backend)]["refusals"]
    assert "missing ['detector.classifier.bias']" in texts["a tensor less"]
    assert "'detector.classifier.bias' is float32 (3,), the recipe has float32 (2,)" in texts["another shape"]
    assert "'exp_avg/detector.classifier.bias' is float32 (3,)" in texts["another moment"]
    assert "it has 'exp_avg/detector.other'" in texts["a moment more"]
    assert "it is damaged" in texts["a moment less"]
    assert runs[2, ("misfits", backend)]["changed"] == []


def assert_same(one, other, tolerance=TOLERANCE):
    """Losses, norms and scores number by number; weights and each kind of moments by their norm as a whole."""
    for kind in ("losses", "norms", "scores"):
        assert one[kind].shape == other[kind].shape
        assert apart(one[kind], other[kind]) < tolerance, kind
    for part in ("model", "optimizer"):
        assert one[part].keys() == other[part].keys()
        for kind in {kind_of(part, name) for name in one[part]}:
            left, right = (np.concatenate([np.ravel(run[part][name]).astype(np.float64) for name in sorted(run[part])
                                           if kind_of(part, name) == kind]) for run in (one, other))  # fmt: skip
            assert np.linalg.norm(left - right) <= tolerance * np.linalg.norm(left), (part, kind)


def kind_of(part, name):
    """Whose norm is taken together: weights and running statistics, counts of batches, a moment of all weights."""
    if part == "optimizer":
        return name.partition("/")[0]
    return "counts" if name.endswith("num_batches_tracked") else "weights"


def apart(one, other):
    """Largest relative difference."""
    return float((np.abs(one - other) / np.abs(one)).max())
