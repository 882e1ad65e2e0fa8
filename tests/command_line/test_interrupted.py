"""A run that is stopped, by whatever and at whatever moment, ends as the run that was not."""


import numpy as np
import pytest

from dist_fair.errors import Exit
from tests.command_line.interrupted import Event, endings
from tests.command_line.runs import TOLERANCE, difference, final_model, metrics

STEPS = 8
SFD = [
    "recipe=sfd_gda", f"train.steps={STEPS}", "train.batch_size=16", "data.window=8", "data.image_size=32",
    "checkpoint.every=3", "checkpoint.keep=9", "evaluation.bootstrap=0", "evaluation.batch_size=16",
    "evaluation.figures=false", "wandb.mode=disabled", "log.every=1", "optimizer.lr=5e-4",
    "interventions.channel_decoupling.batch_size=30", "interventions.channel_decoupling.batches=2",
    "interventions.channel_decoupling.keep=last",
    "interventions.distribution_alignment.grid=16", "interventions.distribution_alignment.weight=0.1",
    "detector.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}",
]  # fmt: skip
TRAINING_ONLY = "evaluation.at_end=false"


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The run that nothing happens to, on two ranks; tests only read it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [ended.code for ended in endings(2, [*SFD, f"data={data}", f"out={folder}"])] == [0, 0]
    return folder


@pytest.fixture
def command(data, tmp_path):
    """The command line of the same run, into a folder of its own."""
    return [*SFD, f"data={data}", f"out={tmp_path / 'run'}"]


def same(run, undisturbed):
    """Each step told once, with the same losses; the same weights, evaluation and masks at the end."""
    lines = metrics(run, range(STEPS))
    assert len(metrics(run)) == STEPS
    assert difference(undisturbed, run) < TOLERANCE
    for line, other in zip(lines, metrics(undisturbed), strict=True):
        assert line.get("restructured") == other.get("restructured")
    one, other = final_model(run), final_model(undisturbed)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6)
    assert (run / "evaluation.json").exists() == (undisturbed / "evaluation.json").exists()
    return True


def steps_kept(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def codes(ended):
    return [one.code for one in ended]


# A signal on one rank


@pytest.mark.parametrize(
    ("event", "kept", "told"),
    [
        (Event(1, "start", 0, "SIGTERM"), [], "step 0: stopped by SIGTERM on rank 1; nothing was trained yet"),
        (Event(1, "step", 4, "SIGUSR1"), [3, 5], "step 5: stopped by SIGUSR1 on rank 1; checkpointed"),
        (Event(0, "step", 2, "SIGUSR2"), [3], "step 3: stopped by SIGUSR2 on rank 0; checkpointed"),
        (Event(0, "checkpoint", 0, "SIGTERM"), [3], "step 3: stopped by SIGTERM on rank 0; checkpointed"),
        (Event(1, "scoring", 2, "SIGUSR1"), [2], "step 2: stopped by SIGUSR1 on rank 1; checkpointed"),
        (Event(1, "evaluation", 1, "SIGTERM"), [3, 6, 8], "evaluation: stopped by SIGTERM on rank 1"),
    ],
    ids=["start", "step", "step_with_a_checkpoint", "checkpoint", "scoring", "evaluation"],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_boundary(command, undisturbed, tmp_path, event, kept, told):
    stopped = endings(2, command, event)
    assert codes(stopped) == [Exit.PREEMPTED] * 2, [one.said for one in stopped]
    assert f"{told}; the same command goes on\n" in stopped[0].said
    assert "stopped by" not in stopped[1].said
    assert steps_kept(tmp_path / "run") == kept
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert codes(endings(2, command)) == [0, 0]
    assert same(tmp_path / "run", undisturbed)
