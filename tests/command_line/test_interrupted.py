"""A run that is stopped, by whatever and at whatever moment, ends as the run that was not."""

import re

import numpy as np
import pytest
from safetensors.torch import load_file

from dist_fair import cli
from dist_fair.engine.run_lock import NAME, RunLock
from dist_fair.errors import Exit
from tests.command_line.interrupted import Event, endings
from tests.command_line.runs import TOLERANCE, difference, final_model, metrics

STEPS = 6
SFD = [
    "recipe=sfd_gda", f"train.steps={STEPS}", "train.batch_size=12", "data.lanes=12", "data.window=8",
    "data.image_size=32", "checkpoint.every=3", "checkpoint.keep=9", "optimizer.lr=5e-4", "wandb.mode=disabled",
    "evaluation.bootstrap=0", "evaluation.batch_size=16", "evaluation.figures=false", "log.every=1",
    "interventions.channel_decoupling.batch_size=30", "interventions.channel_decoupling.batches=2",
    "interventions.channel_decoupling.keep=last", "interventions.channel_decoupling.at=[0.3,0.7]",
    "interventions.distribution_alignment.grid=16", "interventions.distribution_alignment.weight=0.1",
    "detector.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}",
]  # fmt: skip
TRAINING_ONLY = "evaluation.at_end=false"
SILENCE = 5  # seconds; on a busy machine a living rank has a beat late by 1


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The run that nothing happens to, on one rank; tests only read it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert codes(endings(1, [*SFD, f"data={data}", f"out={folder}"])) == [0]
    return folder


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def command(data, run):
    """The command line of the same run, read by a worker, into a folder of its own, without its evaluation."""
    return [*SFD, f"data={data}", "data.workers=1", f"out={run}", TRAINING_ONLY]


def codes(ended):
    return [one.code for one in ended]


def steps_kept(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def masked(run, step):
    """How many channels a checkpoint has masked; the iterations are before steps 2 and 4."""
    mask = load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")["detector.channel_mask"]
    return int((mask == 0).sum())


def assert_same(run, undisturbed):
    """Each step told once, with the same losses and masks; the same weights at the end."""
    assert [line["step"] for line in metrics(run)] == [*range(STEPS)]
    assert difference(undisturbed, run) < TOLERANCE
    for line, other in zip(metrics(run), metrics(undisturbed), strict=True):
        masks = [told.get("restructured", {}).get("channel_decoupling", {}).get("hash") for told in (line, other)]
        assert masks[0] == masks[1]
    one, other = final_model(run), final_model(undisturbed)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)


# A signal to one rank, or to all its processes, as Slurm, `timeout` and Ctrl-C send it: data workers are to outlive it.


@pytest.mark.parametrize(
    ("event", "kept", "told"),
    [
        (Event(1, "start", 0, "SIGTERM"), [], "step 0: stopped by SIGTERM on rank 1; nothing was trained yet"),
        (Event(1, "worker", 0, "group SIGTERM"), [1], "step 1: stopped by SIGTERM on rank 1; checkpointed"),
        (Event(0, "step", 2, "SIGUSR2"), [3], "step 3: stopped by SIGUSR2 on rank 0; checkpointed"),
        (Event(0, "checkpoint", 0, "group SIGTERM"), [3], "step 3: stopped by SIGTERM on rank 0; checkpointed"),
    ],
    ids=["start", "worker_starts", "step_with_a_checkpoint", "checkpoint"],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_boundary(command, run, event, kept, told):
    stopped = endings(2, command, event)
    assert codes(stopped) == [Exit.PREEMPTED] * 2, [one.said for one in stopped]
    assert f"{told}; the same command goes on\n" in stopped[0].said
    assert "stopped by" not in stopped[1].said
    assert not any("Traceback" in one.said for one in stopped)
    assert steps_kept(run) == kept
    assert not (run / NAME).exists()


@pytest.mark.parametrize(
    ("event", "kept", "told"),
    [
        (Event(1, "step", 3, "group SIGTERM"), [3, 4], "step 4: stopped by SIGTERM on rank 1; checkpointed"),
        (Event(1, "scoring", 2, "group SIGUSR1"), [3, 4], "step 4: stopped by SIGUSR1 on rank 1; checkpointed"),
    ],
    ids=["step", "scoring"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(command, run, undisturbed, event, kept, told):
    """Scoring opens the channels that it closed before: stopped in the midst of it, they must be closed again."""
    stopped = endings(2, command, event)
    assert codes(stopped) == [Exit.PREEMPTED] * 2, [one.said for one in stopped]
    assert f"{told}; the same command goes on\n" in stopped[0].said
    assert steps_kept(run) == kept
    assert masked(run, 4) == masked(undisturbed, 3) > 0
    assert codes(endings(1, command)) == [0]
    assert_same(run, undisturbed)


def test_an_evaluation_that_is_stopped_is_made_again(command, run, undisturbed):
    command.remove(TRAINING_ONLY)
    stopped = endings(2, command, Event(1, "evaluation", 1, "group SIGTERM"), Event(0, "evaluation", 1, "SIGUSR1"))
    assert codes(stopped) == [Exit.PREEMPTED] * 2, [one.said for one in stopped]
    assert "evaluation: stopped by SIG" in stopped[0].said
    assert not (run / "evaluation.json").exists()
    again = endings(1, [run, "data.workers=0"], verb="evaluate")
    assert codes(again) == [0], again[0].said
    assert (run / "evaluation.json").read_text() == (undisturbed / "evaluation.json").read_text()


@pytest.mark.parametrize(("kind", "number", "kept"), [("step", 4, [3]), ("evaluation", 1, [3, 6])])
def test_from_the_keyboard_it_ends_at_once_and_without_a_traceback(command, run, kind, number, kept):
    command.remove(TRAINING_ONLY)
    interrupted = endings(2, command, *(Event(rank, kind, number, "group SIGINT") for rank in range(2)))
    assert codes(interrupted) == [Exit.INTERRUPTED] * 2, [one.said for one in interrupted]
    for one in interrupted:
        assert one.said.endswith("interrupted\n")
        assert "Traceback" not in one.said
    assert steps_kept(run) == kept


# A rank that is lost


def test_a_killed_rank_is_named_and_the_run_goes_on(command, run, undisturbed):
    first, killed, last = endings(3, command, Event(1, "step", 4, "SIGKILL"), DIST_FAIR_SILENCE=SILENCE)
    assert killed.code == -9
    for rank, one in ((0, first), (2, last)):
        assert one.code == Exit.RANK_LOST, one.said
        assert f"rank {rank} of 3, step 4, collective '" in one.said
        assert "stopped, since rank 1 died without a word (killed, out of memory?)" in one.said
        assert "goes on from the last checkpoint" in one.said
    assert steps_kept(run) == [3]
    assert codes(endings(2, command)) == [0, 0]
    assert_same(run, undisturbed)


def test_an_error_of_one_rank_is_told_by_the_others(command, run):
    other, failed = endings(2, command, Event(1, "step", 4, "raise planted"), DIST_FAIR_SILENCE=SILENCE)
    assert failed.code == Exit.BUG
    assert "Traceback" in failed.said
    assert other.code == Exit.RANK_LOST
    assert "stopped, since rank 1 ended: ValueError: planted" in other.said
    assert "rank 0 of 2, step 4, collective '" in other.said
    assert steps_kept(run) == [3]


def test_a_slow_rank_is_waited_for_and_a_frozen_one_is_not(command, run):
    slow, frozen = Event(1, "step", 1, f"sleep {1.6 * SILENCE}"), Event(1, "step", 4, "SIGSTOP")
    other, _ = endings(2, command, slow, frozen, DIST_FAIR_SILENCE=SILENCE)
    assert other.code == Exit.RANK_LOST, other.said
    assert f"since rank 1 has been silent for {SILENCE} s (frozen, or its node or network is down)" in other.said
    assert re.search(r"last heard: rank 1 of 2, step [1-4]\b", other.said)  # by a heartbeat of a moment ago
    assert [line["step"] for line in metrics(run)] == [0, 1, 2]  # step 3 is told while step 4 runs
    assert steps_kept(run) == [3]


def test_a_frozen_first_rank_is_noticed_too(command):
    _, other = endings(2, command, Event(0, "step", 2, "SIGSTOP"), DIST_FAIR_SILENCE=SILENCE)
    assert other.code == Exit.RANK_LOST
    assert "rank 1 of 2, step 2, collective '" in other.said
    assert f"since rank 0 has been silent for {SILENCE} s" in other.said


# Two starts in one folder


def test_a_second_start_is_refused(command, run, undisturbed, capsys):
    run.mkdir()
    lock = RunLock(run, "trained")
    lock.acquire()
    refused = endings(2, command)
    assert codes(refused) == [Exit.REFUSED] * 2
    assert f"error: {run} is in use (it is trained by " in refused[0].said
    assert refused[1].said.count("in use") == 0
    assert [path.name for path in run.iterdir()] == [NAME]
    assert cli.main(["evaluate", str(undisturbed), "--out", str(run)]) == Exit.REFUSED
    assert f"error: {run} is in use (it is trained by " in capsys.readouterr().err
    lock.release()
