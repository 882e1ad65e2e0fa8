"""Sharpness-aware minimisation: what it computes, and that ranks, micro-batches and restarts do not change it."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Sam
from tests.engine.sharpness_worlds import (
    BUGS,
    OF_GROUPS,
    Run,
    difference,
    oracle,
    train,
    train_all,
    train_bugs,
    trainer,
)
from tests.ranks import run_ranks

WHOLE = Run(Sam(0.05))
GROUPS = Run(Sam(0.05, scope=4), norm="group", methods="pairs", steps=6)
RUNS = {
    "whole": WHOLE,
    "adaptive": Run(Sam(0.5, adaptive=True), accumulate=2, clip=0.5, steps=8),
    "exact": Run(Sam(0.05), norm="group", accumulate=2, exact=True, steps=8),
    "groups": GROUPS,
    "groups, accumulated": replace(GROUPS, accumulate=2, steps=3),
}


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    """Trains in this process without leaving accelerate's choice of a device behind."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@cache
def expected(run):
    return oracle(replace(run, accumulate=1, exact=False) if run.exact else run)


# The whole step, on ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_train_what_one_process_does(world, tmp_path):
    ranks = run_ranks(world, train_all, RUNS, str(tmp_path), timeout=120)
    for name, run in RUNS.items():
        for rank in ranks:
            assert difference(expected(run), rank[name]) < 1e-10, name


def test_stop_and_resume_on_other_ranks_is_the_undisturbed_run(tmp_path):
    runs, values = {"whole": WHOLE, "groups": replace(GROUPS, steps=WHOLE.steps)}, {"whole": [], "groups": []}
    for world, stop in ((2, 7), (4, 13), (1, None)):
        for name, (told, state) in run_ranks(world, train_all, runs, str(tmp_path), stop)[0].items():
            values[name] += told
            last = state if name == "whole" else last
    assert difference(expected(WHOLE), (values["whole"], last)) < 1e-10
    assert [line["loss"] for line in values["groups"]] == pytest.approx(
        [line["loss"] for line in expected(runs["groups"])[0]], rel=1e-10
    )


def test_planted_bugs_are_found(tmp_path):
    whole, groups = replace(WHOLE, steps=3), replace(GROUPS, steps=3)
    runs = {name: groups if bug in OF_GROUPS else whole for name, bug in BUGS.items()}
    (found, *_) = run_ranks(2, train_bugs, runs, str(tmp_path))
    for name, run in runs.items():
        assert difference(expected(run), found[name]) > 1e-5, name


def test_it_is_another_method(tmp_path):
    """The comparisons above say something: plain descent, each scope and each rho train differently."""
    group_norm = replace(GROUPS, steps=3)
    one, other, wide, adaptive = (
        expected(replace(group_norm, sam=sam)) for sam in (Sam(0.05), Sam(0.05, scope=4), Sam(0.1), Sam(0.05, True))
    )
    assert all(difference(one, found) > 1e-3 for found in (other, wide, adaptive))
    plain = train(Communicator(), replace(group_norm, sam=Sam()), tmp_path)
    assert [line["loss"] for line in plain[0]] != pytest.approx([line["loss"] for line in one[0]], rel=1e-3)


def test_a_group_of_all_rows_is_the_whole(tmp_path):
    one = train(Communicator(), replace(GROUPS, sam=Sam(0.05)), tmp_path / "a")
    other = train(Communicator(), replace(GROUPS, sam=Sam(0.05, scope=32)), tmp_path / "b")
    assert difference(one, other) < 1e-12


def test_without_distance_it_is_plain_descent(tmp_path):
    """The second pass sees the same rows, dropout and batch statistics as the first."""
    for number, run in enumerate((replace(WHOLE, steps=3), replace(GROUPS, steps=3))):
        plain = train(Communicator(), replace(run, sam=Sam()), tmp_path / f"{number}")
        still = train(Communicator(), replace(run, sam=replace(run.sam, rho=1e-12)), tmp_path / f"{number}, still")
        assert all(abs(line["sam/sharpness"]) < 1e-10 for line in still[0])
        if run is not GROUPS and run.sam.scope == "global":
            assert [line["loss"] for line in plain[0]] == pytest.approx([line["loss"] for line in still[0]], rel=1e-10)
            for name, value in plain[1].items():
                torch.testing.assert_close(still[1][name], value, rtol=1e-9, atol=1e-10)


def test_collectives_are_those_of_two_plain_steps(tmp_path):
    plain, twice = (train(Communicator(), replace(WHOLE, sam=sam, steps=3), tmp_path / str(sam.rho))[0]
                    for sam in (Sam(), Sam(0.05)))  # fmt: skip
    for one, other in zip(plain, twice, strict=True):
        names = [name for name in one if name.startswith(("calls/", "bytes/"))]
        assert names == [name for name in other if name.startswith(("calls/", "bytes/"))]
        assert "calls/norm/forward" in names
        assert all(other[name] == 2 * one[name] for name in names)


def test_half_precision(tmp_path):
    run = replace(WHOLE, precision="bf16", steps=4)
    assert difference(expected(run), train(Communicator(), run, tmp_path)) < 1e-3  # of 8 bits, a few sums apart


# What is not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "poison", "message"),
    [
        (1e300, None, r"step 1: loss 1\.[0-9]+, gradient_norm nan, sam/sharpness nan"),
        (0.05, "image", r"step 1: loss nan, .*Samples whose logits are not finite: [0-9]"),
        (0.05, "gradient", r"step 1: loss 1\.[0-9]+, gradient_norm (nan|inf), sam/sharpness .*, sam/ascent_norm (nan|inf)"),
    ],
)  # fmt: skip
def test_what_is_not_finite_does_not_reach_the_weights(rho, poison, message, tmp_path):
    made, stream = trainer(replace(WHOLE, sam=Sam(rho if rho < 1 else 0.05)), Communicator(), tmp_path)
    before = {}

    def observe(step, values):
        before.update({name: value.clone() for name, value in made.module.named_parameters()})
        made.sam = Sam(rho)
        if poison == "gradient":
            made.module.detector.first.weight.register_hook(lambda gradient: gradient * float("nan"))

    def poisoned(first, last):
        for number, batch in enumerate(stream(first, last)):
            if number == 1 and poison == "image":
                batch.images[3, 0, 0, 0] = float("nan")
            yield batch

    with pytest.raises(DistFairError, match=message) as error:
        made.run(poisoned, None, [observe])
    assert "Lower optimizer.lr, or optimizer.sam.rho, or set train.clip" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in made.module.named_parameters())
    assert all(part.track_running_stats for part in made.module.modules() if hasattr(part, "track_running_stats"))
