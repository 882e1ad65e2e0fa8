"""Training as Slurm jobs that are stopped, killed and moved: each ends in the trajectory of one undisturbed process."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.command_line.runs import QUICK, TOLERANCE, card, difference, predictions
from tests.command_line.several import Start, together
from tests.slurm import events

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sh"
SAVED = 10  # steps to the first checkpoint, see QUICK


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """SFD + GDA on a small data set: channels masked three times, groups aligned, checkpoints every ten steps."""
    return ["recipe=sfd_gda", *QUICK, f"data={card(tmp_path_factory.mktemp('drawn'))}"]


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """The run in one process, without Slurm."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    together(1, [Start(out, recipe)])
    return out


@pytest.fixture
def train(cluster, recipe, tmp_path):
    """train(*flags, overrides=...): the number of a job that trains into tmp_path/run."""

    def submitted(*flags: str, overrides: list[str] = (), **environment: str) -> int:
        # A rank that a test stops for a while is not to be taken for lost.
        settings = {"DIST_FAIR_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DIST_FAIR_SILENCE": "600"}
        return cluster.submit(SCRIPT, *recipe, "out=run", *overrides, flags=flags, cwd=tmp_path,
                              **settings | environment)  # fmt: skip

    return submitted


def equal(run: Path, undisturbed: Path) -> bool:
    """Losses, learning rates and what was scored, of every step and sample."""
    assert difference(undisturbed, run) < TOLERANCE
    for name in ("near", "far"):
        one, other = predictions(undisturbed, name), predictions(run, name)
        assert one["sample_id"] == other["sample_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    return True


def step(cluster, job: int, run: Path, count: int) -> None:
    """Waits until so many steps of the run are logged. A start drops those after the checkpoint it goes on from."""
    log = run / "metrics.jsonl"
    cluster.until(lambda: log.is_file() and log.read_text().count("\n") >= count, f"step {count}", 240, job)


def test_two_nodes_of_two_ranks_are_one_process(cluster, train, undisturbed, tmp_path):
    job = train("--nodes=2", "--ntasks-per-node=2")
    cluster.wait(job, "COMPLETED", timeout=300)
    assert equal(tmp_path / "run", undisturbed)
    assert "4 rank" in (tmp_path / f"slurm-{job}.out").read_text()


def test_refused_beside_stopped_and_killed(cluster, train, undisturbed, tmp_path):
    """Slurm signals all processes of a step: data workers are to outlive it until their rank has stopped."""
    run = tmp_path / "run"
    job = train("--nodes=2", overrides=["data.workers=1"])
    step(cluster, job, run, 3)
    os.kill(cluster.ranks(job)[1], signal.SIGSTOP)
    second = train("--nodes=1")
    ended = cluster.wait(second, "FAILED", timeout=240)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    refusal = (tmp_path / f"slurm-{second}.out").read_text()
    assert "run is in use (it is trained by" in refusal
    assert f"Slurm job {job}" in refusal

    cluster.run("scancel", "--signal=TERM", str(job))
    os.kill(cluster.ranks(job)[1], signal.SIGCONT)
    cluster.wait(job, "PENDING", timeout=240)
    output = tmp_path / f"slurm-{job}.out"
    assert "stopped by SIGTERM on rank 1; checkpointed" in output.read_text()
    step(cluster, job, run, SAVED + 3)
    events.kill_rank(cluster, job)
    cluster.wait(job, "COMPLETED", timeout=300)
    assert cluster.job(job)["Restarts"] == "2"
    assert "rank 1" in output.read_text()
    assert equal(run, undisturbed)


@pytest.mark.long  # a minute each
@pytest.mark.parametrize(
    "event",
    [events.to_all_ranks, events.to_the_script, events.requeue, events.pre_empt, events.lose_node],
    ids=lambda event: event.__name__,
)
def test_wherever_it_is_stopped_it_goes_on(cluster, train, undisturbed, tmp_path, event):
    run = tmp_path / "run"
    job = train("--nodes=2", overrides=["data.workers=1"])
    step(cluster, job, run, SAVED + 3)
    event(cluster, job)
    cluster.wait(job, "COMPLETED", timeout=400)
    assert cluster.job(job)["Restarts"] == "1"
    assert equal(run, undisturbed)


@pytest.mark.long
def test_a_cancelled_job_has_its_last_step_saved_for_the_next(cluster, train, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = train("--nodes=2", overrides=["data.workers=1"])
    step(cluster, job, run, 3)
    cluster.run("scancel", str(job))
    cluster.wait(job, "CANCELLED")
    cluster.until(lambda: not cluster.at_work(job), "the script to end")
    assert "checkpointed" in (tmp_path / f"slurm-{job}.out").read_text()
    again = train("--nodes=1", overrides=["data.workers=1"])
    cluster.wait(again, "COMPLETED", timeout=400)
    assert "goes on from step-" in (tmp_path / f"slurm-{again}.out").read_text()
    assert equal(run, undisturbed)


@pytest.mark.long
def test_a_frozen_rank_is_lost_to_the_others(cluster, train, undisturbed, tmp_path):
    job = train("--nodes=2", DIST_FAIR_SILENCE="10")
    step(cluster, job, tmp_path / "run", SAVED + 3)
    os.kill(cluster.ranks(job)[1], signal.SIGSTOP)
    cluster.wait(job, "COMPLETED", timeout=400)
    assert cluster.job(job)["Restarts"] == "1"
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "a rank was lost (exit code 74); requeued" in output
    assert "rank 1" in output
    assert equal(tmp_path / "run", undisturbed)


@pytest.mark.long  # Slurm's limits are whole minutes
def test_before_its_time_is_up_it_is_checkpointed(cluster, train, undisturbed, tmp_path):
    """A rank is frozen until Slurm tells it, which wakes it: these 32 steps would be done before."""
    job = train("--nodes=2", "--time=3", "--signal=USR1@60")
    step(cluster, job, tmp_path / "run", 3)
    os.kill(cluster.ranks(job)[1], signal.SIGSTOP)
    cluster.wait(job, "COMPLETED", timeout=400)
    assert cluster.job(job)["Restarts"] == "1"
    assert "stopped in time, all is saved; requeued" in (tmp_path / f"slurm-{job}.out").read_text()
    assert equal(tmp_path / "run", undisturbed)
