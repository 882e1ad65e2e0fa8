"""Sharpness-aware minimisation: what it computes, and that ranks, micro-batches and restarts do not change it."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.engine import sharpness
from dist_fair.engine.module import Losses
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Sam
from tests.engine.planted_sharpness_bugs import BUGS, OF_GROUPS
from tests.engine.sharded_worlds import descend, descend_sharded
from tests.engine.sharpness_worlds import ALL, PAIRED, Run, build, difference, oracle, plan, train, trainer
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
RESUMED = {"whole": WHOLE, "groups": GROUPS}
STOPS = {2: 2, 4: 5, 1: None}  # one after the other, on so many ranks up to this step
SHARDED = (Sam(0.05), Sam(0.5, adaptive=True))


@dataclass
class Session:
    """What a rank has found."""

    runs: dict
    resumed: dict
    planted: dict
    sharded: list


def session(comm, folder):
    """All that is to be done on a number of ranks, at once: starting them takes longer."""
    runs = {name: train(comm, run, f"{folder}/{comm.world}/{name}") for name, run in RUNS.items()}
    resumed = {name: train(comm, run, f"{folder}/{name}", STOPS[comm.world]) for name, run in RESUMED.items()}
    planted, sharded = {}, []
    if comm.world == 2:
        planted = {name: train(comm, short(bug), f"{folder}/{name}", bug=bug) for name, bug in BUGS.items()}
        sharded = [descend_sharded(comm, SHARDED), descend_sharded(comm, SHARDED, norm_of_own_shard=True)]
    return Session(runs, resumed, planted, sharded)


def short(bug):
    return replace(GROUPS if bug in OF_GROUPS else WHOLE, steps=3)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    done = {world: run_ranks(world, session, folder, timeout=150) for world in (2, 4)}
    return done | {1: [session(Communicator(), folder)]}


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    """Trains in this process without leaving accelerate's choice of a device behind."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@cache
def expected(run):
    return oracle(replace(run, accumulate=1, exact=False) if run.exact else run)


# The whole step, on ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_what_one_process_does(sessions, world, name):
    for rank in sessions[world]:
        assert difference(expected(RUNS[name]), rank.runs[name]) < 1e-10


@pytest.mark.parametrize("name", RESUMED)
def test_stop_and_resume_on_other_ranks_is_the_undisturbed_run(sessions, name):
    values = [line for world in STOPS for line in sessions[world][0].resumed[name][0]]
    assert difference(expected(RESUMED[name]), (values, sessions[1][0].resumed[name][1])) < 1e-10


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(sessions, name):
    for rank in sessions[2]:
        assert difference(expected(short(BUGS[name])), rank.planted[name]) > 1e-4


def test_sharded_parameters_descend_as_whole_ones(sessions):
    whole = [descend(Communicator(), sam, sharded=False) for sam in SHARDED]
    assert sum(rank.sharded[0][0]["held"] for rank in sessions[2]) == whole[0]["held"]
    for rank in sessions[2]:
        for one, right, wrong in zip(whole, *rank.sharded, strict=True):
            for key in ("norms", "weights"):
                torch.testing.assert_close(right[key], one[key], rtol=1e-12, atol=1e-12)
                assert (wrong[key] - one[key]).abs().max() > 1e-2


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
    plain = train(Communicator(), replace(WHOLE, sam=Sam(), steps=3), tmp_path / "plain")
    still = train(Communicator(), replace(WHOLE, sam=Sam(1e-12), steps=3), tmp_path / "still")
    assert all(abs(line["sam/sharpness"]) < 1e-10 for line in still[0])
    for name, value in plain[1].items():
        torch.testing.assert_close(still[1][name], value, rtol=1e-9, atol=1e-10)


def test_collectives_are_those_of_two_plain_steps(tmp_path):
    plain, twice = (train(Communicator(), replace(WHOLE, sam=sam, steps=3), tmp_path / str(sam.rho))[0]
                    for sam in (Sam(), Sam(0.05)))  # fmt: skip
    for one, other in zip(plain, twice, strict=True):
        names, others = ([name for name in line if name.startswith(("calls/", "bytes/"))] for line in (one, other))
        assert names == others
        assert one["calls/stop"] == other["calls/stop"] == 1  # once before each step, whatever is in it
        names = [name for name in names if not name.endswith("/stop")]
        assert "calls/subgroup_norm" in names
        assert "calls/norm/forward" not in names  # one rank asks nobody for the statistics of its norm
        assert all(other[name] == 2 * one[name] for name in names)


def test_half_precision(tmp_path):
    run = replace(WHOLE, precision="bf16", steps=4)
    assert difference(expected(run), train(Communicator(), run, tmp_path)) < 1e-3  # of 8 bits, a few sums apart


# What is not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "poison", "message"),
    [
        (1e300, None, r"step 1: loss [0-9]\.[0-9]+, gradient_norm nan, sam/sharpness nan"),
        (0.05, "image", r"step 1: loss nan, .*Samples whose logits are not finite: [0-9]"),
        (0.05, "gradient", r"step 1: loss [0-9.]+, gradient_norm nan, sam/sharpness -?[0-9.e-]+, sam/ascent_norm nan"),
    ],
)  # fmt: skip
def test_what_is_not_finite_does_not_reach_the_weights(rho, poison, message, tmp_path):
    made, stream = trainer(replace(WHOLE, sam=Sam(rho if rho < 1 else 0.05)), Communicator(), tmp_path)
    before, told = {}, []

    def poisoned(first, last):
        """Step 1 alone is not finite. Step 2 is, and is launched before step 1 is read: it must not be taken either."""
        for number, batch in enumerate(stream(first, last)):
            made.sam = Sam(rho if number == 1 else 0.05)
            if number == 1:
                before.update({name: value.clone() for name, value in made.module.named_parameters()})
            if number == 1 and poison == "image":
                batch.images[3, 0, 0, 0] = float("nan")
            if number == 1 and poison == "gradient":
                weight = made.module.detector.first.weight
                hook = weight.register_hook(lambda gradient: gradient * float("nan"))
            elif number == 2 and poison == "gradient":
                hook.remove()
            yield batch

    with pytest.raises(DistFairError, match=message) as error:
        made.run(poisoned, None, [lambda step, values: told.append(step)])
    assert told == [0]
    assert "Lower optimizer.lr, or optimizer.sam.rho, or set train.clip" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in made.module.named_parameters())
    assert all(part.track_running_stats for part in made.module.modules() if hasattr(part, "track_running_stats"))


# Parts ----------------------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """L(w) = w'Aw / 2 with its closed form; w in two tensors."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        root = torch.randn(5, 5, dtype=torch.float64, generator=random)
        self.matrix, start = root @ root.T, torch.randn(5, dtype=torch.float64, generator=random)
        self.head, self.tail = nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())

    def backward(self):
        w = torch.cat([self.head, self.tail])
        loss = w @ self.matrix @ w / 2
        loss.backward()
        return [Losses(loss, {"loss/own": loss.detach()}, w, w)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_quadratic(adaptive):
    module, rho = Quadratic(), 0.3
    w = torch.cat([module.head, module.tail]).detach().clone()
    g = module.matrix @ w
    size = w.abs() if adaptive else torch.ones_like(w)
    e = rho * size**2 * g / ((size * g).norm() + 1e-12)
    (losses,) = sharpness.climbed(module, Sam(rho, adaptive), module.backward)
    torch.testing.assert_close(torch.cat([module.head.grad, module.tail.grad]), module.matrix @ (w + e))
    torch.testing.assert_close(losses.loss.detach(), w @ module.matrix @ w / 2)
    torch.testing.assert_close(losses.numbers["sam/sharpness"], e @ g + e @ module.matrix @ e / 2)
    torch.testing.assert_close(losses.numbers["sam/ascent_norm"], (size * g).norm())
    assert list(losses.numbers) == ["loss/own", *sharpness.MEASURES]
    assert torch.equal(torch.cat([module.head, module.tail]), w)  # to the bit


def test_weights_come_back_after_an_error():
    module = Quadratic()
    module.backward()
    before = [parameter.detach().clone() for parameter in module.parameters()]

    def fail():
        with sharpness.perturbed(list(module.parameters()), Sam(0.1)):
            assert not any(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))


def test_a_gradient_of_zero_moves_nothing():
    module = nn.Linear(2, 1)
    module.weight.grad, before = torch.zeros(1, 2), module.weight.detach().clone()
    with sharpness.perturbed(list(module.parameters()), Sam(0.1)) as norm:
        assert torch.equal(module.weight, before)
    assert norm == 0


# What is refused ------------------------------------------------------------------------------------------------------


REFUSED = [
    # scope, norm, methods, ranks, micro-batches a step -> message
    (8, "synced", "pairs", 1, 1, r"scope=8: 'detector.norm' has statistics of the batch, .* detector.norm=frozen, or"),
    (8, "local", "moments", 1, 1, r"scope=8: 'detector.norm' \(and 1 more\) has statistics"),
    (8, "group", "moments", 1, 1, r"scope=8: 'interventions.subgroup_norm' has statistics"),
    (12, "group", "pairs", 1, 1, r"scope=12: the 32 rows that each of 1 rank\(s\) .* to one of \[8, 16, 32\]$"),
    (16, "group", "pairs", 4, 1, r"the 8 rows .* no whole groups of 16, .* one of \[8\], or .* ranks of \[1, 2\]"),
    (16, "group", "pairs", 2, 2, r"the 8 rows .* micro-batch of 16 .* one of \[4, 8\], or .* ranks of \[1\]"),
    (4, "group", "pairs", 1, 1, r"no whole groups of 4, each of whole lanes, 8 paired reals and fakes"),
]


@pytest.mark.parametrize(("scope", "norm", "methods", "world", "accumulate", "message"), REFUSED)
def test_groups_that_cannot_be(scope, norm, methods, world, accumulate, message):
    run = Run(Sam(0.05, scope=scope), norm=norm, methods=methods)
    chosen = plan(accumulate)
    module = build(run, chosen, Communicator())
    with pytest.raises(DistFairError, match=message):
        sharpness.refuse_inexact_sam(run.sam, module, chosen, world)
    for sam in (Sam(), Sam(0.05)):
        sharpness.refuse_inexact_sam(sam, module, chosen, world)


def test_groups_that_can_be():
    for scope, tapes in ((8, PAIRED), (16, PAIRED), (4, ALL), (2, ALL), (1, ALL)):
        run = Run(Sam(0.05, scope=scope), norm="group", methods="pairs")
        chosen = plan(tapes=tapes)
        sharpness.refuse_inexact_sam(run.sam, build(run, chosen, Communicator()), chosen, 2)
