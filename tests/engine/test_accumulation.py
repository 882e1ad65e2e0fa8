"""Exact gradient accumulation: W ranks times A micro-batches are one big batch, to every intervention.

fp64 and a network with group norm and dropout: what differs is a bug, and every planted bug makes it differ.
"""

import math
import weakref
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from dist_fair.collectives import Communicator
from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.engine import assembly
from dist_fair.engine import module as engine
from dist_fair.engine.accumulation import accumulation_note, batch_statistics
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import registered
from dist_fair.recipe.schema import DetectorSettings, Recipe, Train
from tests.command_line.runs import QUICK_WITHOUT_METHODS, card, final_model, losses, metrics, on_ranks
from tests.command_line.runs import difference as apart
from tests.data.making import bare_index
from tests.engine import accumulation_worlds as worlds
from tests.engine.accumulation_worlds import BATCH, CASES, STEPS, difference, step, trainer, trajectory
from tests.engine.planted_accumulation_bugs import BUGS
from tests.ranks import run_ranks

EXACT, WRONG = 1e-10, 1e-2
PARTS = (1, 2, 4)
TASKS = [(case, parts) for case in CASES if case != "delayed" for parts in PARTS]
COUPLED = [case for case in CASES if case not in ("plain", "delayed")]
# The order of rows shows where somebody looks at neighbours; PG-FDD's dropout is its own.
NOTICED = {"by_micro_batch": ["neighbours"], "redrawn": [case for case in COUPLED if case != "pg_fdd"]}


@cache
def whole(case):
    """One rank, one batch, no DDP."""
    return step(Communicator(), case, 1)


@cache
def on_world(world):
    return run_ranks(world, worlds.steps, TASKS, timeout=300)  # 5 s of CPU a rank, and others may be at work


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("case", "parts"), TASKS)
def test_ranks_times_micro_batches_are_one_big_batch(case, parts, world):
    for answers in on_world(world):
        assert difference(whole(case), answers[TASKS.index((case, parts))]) < EXACT


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug):
    for case in NOTICED.get(bug, COUPLED):
        with BUGS[bug]():
            found = step(Communicator(), case, 4)
        assert difference(whole(case), found) > WRONG, case


# What runs how often, and what it holds -----------------------------------------------------------------------------


def test_plain_means_run_the_detector_once_a_sample():
    assert step(Communicator(), "plain", 4)["rows"] == [BATCH // 4] * 4


def test_coupled_samples_run_it_again_but_for_the_last_micro_batch():
    found = step(Communicator(), "pg_fdd", 4)
    assert found["rows"] == [BATCH // 4] * (4 + 3)
    assert found["decoded"] == [BATCH // 4] * 2 * (4 + 4)  # each of two kinds of reconstruction is run again


def test_joining_begins_with_the_coupling_and_the_trajectory_is_that_of_big_batches():
    once, again = [BATCH // 4] * 4, [BATCH // 4] * 7
    found, naive = trajectory("delayed", 4), trajectory("delayed", 4, exact=False)
    assert [one["rows"] for one in found] == [once] * (STEPS // 2) + [again] * (STEPS // 2)
    for number, one in enumerate(trajectory("delayed", 1)):
        assert difference(one, found[number]) < EXACT
        assert (difference(one, naive[number]) < EXACT) == (number < STEPS // 2)


class Peak(TorchDispatchMode):
    """Counts the bytes that operations allocate, forward and backward, and the most at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.known.update(storages(arguments, keywords))
        made = function(*arguments, **(keywords or {}))
        for storage in storages(made) - {*self.known}:
            self.known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.freed, storage.nbytes())
        self.most = max(self.most, self.live)
        return made

    def freed(self, count):
        self.live -= count


def storages(*values):
    return {tensor.untyped_storage() for tensor in tree_leaves(values) if isinstance(tensor, torch.Tensor)}


def test_the_activations_of_one_micro_batch_are_held():
    peaks = {}
    for parts in (1, 4):
        plan, made = trainer("all pairs", Communicator(), parts)
        loaded = worlds.batches(plan, 0, 1, 0, parts, side=32)
        with Peak() as peak:
            made._backward(loaded)
        peaks[parts] = peak.most
    # A quarter would be 0.25: in so small a network the images and the maps of all rows, joined, are a part of it.
    assert peaks[4] < 0.45 * peaks[1]


@pytest.mark.parametrize("case", ["daid", "pg_fdd"])
def test_a_re_run_in_half_precision_is_the_run(case, monkeypatch):
    found = step(Communicator(), case, 4, precision="bf16")
    monkeypatch.setattr(engine, "checkpoint", lambda function, *arguments, use_reentrant: function(*arguments))
    kept = step(Communicator(), case, 4, precision="bf16")
    assert len(kept["rows"]) < len(found["rows"])
    assert difference(kept, found) < 1e-6


# What a recipe is told ----------------------------------------------------------------------------------------------


def recipe(norm="synced", arguments=None, **train):
    small = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32], **(arguments or {})}
    return Recipe(
        detector=DetectorSettings(name="resnet18", norm=norm, arguments=small),
        interventions={"cross_entropy": registered()["cross_entropy"].Settings()},
        train=Train(**{"steps": STEPS, "batch_size": BATCH, "accumulate": 4, **train}),
    )


def built(chosen):
    return assembly.build_module(chosen, worlds.plan("plain", 4), STEPS, Communicator())


@pytest.mark.parametrize("norm", ["synced", "local"])
def test_batch_statistics_are_refused(norm):
    with pytest.raises(DistFairError) as error:
        built(recipe(norm, accumulate_exact=True))
    for part in ("train.accumulate_exact=true", "layer 'backbone.bn1' (and 12 more)", f"detector.norm={norm}",
                 "detector.norm=frozen", "resnet50_gn", "train.accumulate_exact=false"):  # fmt: skip
        assert part in str(error.value)


def test_frozen_statistics_and_other_norms_pass():
    built(recipe("frozen", accumulate_exact=True))
    built(recipe(arguments={"norm_layer": "groupnorm"}, accumulate_exact=True))
    built(recipe("synced"))
    assert batch_statistics(nn.Sequential(FrozenBatchNorm2d(3), nn.LayerNorm(3), nn.InstanceNorm2d(3))) == []
    assert batch_statistics(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.BatchNorm1d(3))) == [
        "0",
        "1",
    ]


def test_plain_accumulation_says_what_it_means():
    def note(case, **train):
        return accumulation_note(recipe(**train), worlds.module(case, worlds.plan(case, 4), Communicator()))

    assert note("daid").startswith("train.accumulate=4: to subgroup_norm and pair_alignment each smaller batch of 8 ")
    assert "train.accumulate_exact=true makes them one" in note("delayed")
    silent = [note("plain"), note("daid", accumulate=1), note("daid", accumulate_exact=True)]
    assert silent == [None, None, None]


def test_the_note_names_what_the_way_out_needs():
    chosen = recipe()
    chosen.interventions["pair_alignment"] = registered()["pair_alignment"].Settings()
    note = accumulation_note(chosen, built(chosen))
    assert "to pair_alignment each" in note
    assert "train.accumulate_exact=true, with detector.norm=frozen, or group norm (resnet50_gn" in note


@pytest.mark.parametrize("epochs", [0.4, 1, 2, 3.3])
def test_the_number_of_steps_does_not_depend_on_accumulation(epochs):
    """Nine samples, eight a step: two steps an epoch, though nine quarters of a step would do for two epochs."""
    found = {
        assembly.total_steps(
            recipe(steps=None, epochs=epochs, batch_size=8, accumulate=parts),
            TrainingPlan(bare_index([9]), [TapeSpec("all")], 8 // parts, 1),
        )
        for parts in PARTS
    }
    assert found == {math.ceil(2 * epochs)}


# The program --------------------------------------------------------------------------------------------------------


def test_two_ranks_of_two_micro_batches_train_what_one_rank_trains(tmp_path):
    arguments = [
        "recipe=daid", *QUICK_WITHOUT_METHODS, f"data={card(tmp_path)}", "train.steps=8", "data.lanes=4",
        "train.precision=fp64", "evaluation.at_end=false", "interventions.low_rank_projection.rank=16",
        "interventions.pair_alignment.pairs=hardest", "interventions.pair_alignment.hardest=2",
        "detector.arguments={layers: [1, 1, 1, 1], channels: [32, 32, 32, 32], smooth: false, norm_layer: groupnorm}",
    ]  # fmt: skip
    on_ranks((1,), arguments, tmp_path)
    on_ranks((2,), [*arguments, "train.accumulate=2", "train.accumulate_exact=true"], tmp_path)
    one, two = tmp_path / "1", tmp_path / "2"
    assert losses(one, "loss/pair_alignment")[-1] > 0
    assert metrics(two)[-1]["calls/summaries/gather"] == 1
    assert apart(one, two) < EXACT
    first, second = final_model(one), final_model(two)
    assert max(float((value - second[name]).abs().max()) for name, value in first.items()) < 1e-9
