"""train.backend through the program: checkpoints, pruning, evaluation; all of DESIGN 8.4 behind `long`."""

import pytest
import torch

from tests.command_line.runs import (
    QUICK,
    QUICK_WITHOUT_METHODS,
    TOLERANCE,
    difference,
    final_model,
    metrics,
    norm_difference,
    predictions,
)
from tests.command_line.several import Start, together
from tests.command_line.trajectory import scores_apart

STEPS = 6
SHORT = ("recipe=sfd_gda", *QUICK, f"train.steps={STEPS}", "train.clip=0.5", "checkpoint.every=3", "data.image_size=32",
         "interventions.channel_decoupling.at=[0.4]", "detector.arguments.channels=[8, 8, 16, 32]")  # fmt: skip


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Run folders of two ranks: a run by ddp, one by zero3, and one that is ddp's, then zero3's, then fsdp's."""
    folder = tmp_path_factory.mktemp("backends")
    whole = [*SHORT, f"data={data}"]
    relay = [Start(folder / "relay", [*whole, f"train.backend={backend}", f"train.stop_after={steps}"])
             for backend, steps in (("ddp", 2), ("zero3", 2), ("fsdp", "null"))]  # fmt: skip
    together(2, [*(Start(folder / one, [*whole, f"train.backend={one}"]) for one in ("ddp", "zero3")), *relay])
    return folder


@pytest.mark.parametrize("name", ["zero3", "relay"])
def test_a_run_is_that_of_ddp(runs, name):
    assert [line["step"] for line in metrics(runs / name)] == list(range(STEPS))
    assert difference(runs / "ddp", runs / name) < TOLERANCE
    assert norm_difference(runs / "ddp", runs / name) < 1e-3
    assert models_apart(runs / "ddp", runs / name) < TOLERANCE


@pytest.mark.parametrize("name", ["zero3", "relay"])
def test_it_ends_in_the_same_evaluation(runs, name):
    assert predictions(runs / "ddp", "near")["sample_id"] == predictions(runs / name, "near")["sample_id"]
    assert scores_apart(runs / "ddp", runs / name) < TOLERANCE


def test_the_same_channels_are_masked(runs):
    masks = [final_model(runs / name)["detector.channel_mask"] for name in ("ddp", "zero3", "relay")]
    assert (masks[0] == 0).any()
    assert all(torch.equal(mask, masks[0]) for mask in masks)


METHODS = {
    "erm": ("recipe=erm", *QUICK_WITHOUT_METHODS),
    "sfd_gda": ("recipe=sfd_gda", *QUICK, "interventions.channel_decoupling.at=[0.2, 0.4]"),
    "daid": ("recipe=daid", *QUICK_WITHOUT_METHODS, "interventions.low_rank_projection.rank=16",
             "interventions.pair_alignment.delay=0.2", "interventions.subgroup_norm.minimum=4",
             "interventions.subgroup_norm.delay=0.1", "interventions.inverse_propensity.delay=0.1",
             "optimizer.lr=1e-4"),
    "pg_fdd": ("recipe=pg_fdd", *(one for one in QUICK_WITHOUT_METHODS if not one.startswith("detector.")),
               "detector.arguments.channels=[8, 16, 32, 64]", "detector.arguments.width=32", "data.image_size=32",
               "optimizer.lr=1e-4", "optimizer.sam.rho=null"),
}  # fmt: skip
SHARED = ("ddp", "fsdp", "zero1", "zero2", "zero3")


@pytest.mark.long
@pytest.mark.parametrize("recipe", METHODS)
def test_every_backend_on_1_2_and_4_ranks_is_the_same_run(data, tmp_path, recipe):
    arguments = [*METHODS[recipe], f"data={data}", "train.steps=12", "train.clip=0.5", "train.accumulate=2",
                 "evaluation.at_end=false"]  # fmt: skip
    for world in (1, 2, 4):
        together(world, [Start(tmp_path / f"{backend}-{world}", [*arguments, f"train.backend={backend}"])
                         for backend in SHARED])  # fmt: skip
    one = tmp_path / "ddp-1"
    apart = {(backend, world): (difference(one, run), models_apart(one, run))
             for backend in SHARED for world in (1, 2, 4) if (run := tmp_path / f"{backend}-{world}")}  # fmt: skip
    print("\n".join(f"{recipe} {pair}: losses {found[0]:.1e}, weights {found[1]:.1e}" for pair, found in apart.items()))
    assert max(max(found) for found in apart.values()) < TOLERANCE


def models_apart(one, other):
    """The norm of the difference of two runs' last weights and statistics, relative to that of the first."""
    left, right = (final_model(run) for run in (one, other))
    assert left.keys() == right.keys()
    floats = [name for name in sorted(left) if left[name].is_floating_point()]
    assert all(torch.equal(left[name], right[name]) for name in left.keys() - floats)
    flat = [torch.cat([model[name].double().flatten() for name in floats]) for model in (left, right)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())
