"""What a rank's end means for its job: only where the same command goes on is it requeued, and not for ever."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from dist_fair.studies import job
from dist_fair.studies.job import LOST, RankTask


@pytest.fixture
def end(monkeypatch):
    """Ends a rank; returns whether its job was requeued and the exit code of the task (None: it just returned)."""
    requeued = []

    def requeue(number, _):
        requeued.append(number)
        raise SystemExit(255)

    def run(task: RankTask, code: int, rank: int = 0, running: bool = True) -> tuple[bool, int | None]:
        requeued.clear()
        monkeypatch.setattr(submitit, "JobEnvironment",
                            lambda: SimpleNamespace(USR_SIG="USR2", global_rank=rank, job_id="1_0"))  # fmt: skip
        monkeypatch.setattr(RankTask, "_run", lambda self, rank: code)
        monkeypatch.setattr(job, "running", lambda name: running)
        before = signal.signal(signal.SIGUSR2, requeue)
        try:
            task()
        except SystemExit as left:
            return bool(requeued), left.code
        finally:
            signal.signal(signal.SIGUSR2, before)
        return bool(requeued), None

    return run


@pytest.fixture
def task():
    return RankTask(("recipe=erm",), Path("run.log"))


@pytest.mark.parametrize(("code", "expected"), [
    (0, (False, None)), (1, (False, 1)), (2, (False, 2)), (74, (True, 255)), (75, (True, 255)), (76, (True, 255)),
    (-signal.SIGKILL, (True, 255)), (-signal.SIGUSR1, (True, 255)),
])  # fmt: skip
def test_the_exit_code_says_whether_the_same_command_goes_on(end, task, code, expected):
    assert end(task, code) == expected


@pytest.mark.parametrize("code", [0, 2, 74, 75, -9])
def test_rank_0_speaks_for_all(end, task, code):
    """Another rank that left with an exit code of its own would have Slurm end rank 0 before it can requeue."""
    assert end(task, code, rank=1) == (False, None)


def test_what_slurm_has_ended_stays_ended(end, task):
    assert end(task, 75, running=False) == (False, 75)
    assert end(task, -signal.SIGKILL, running=False) == (False, 128 + signal.SIGKILL)


def test_starts_that_save_nothing_are_given_up(end, task):
    for _ in range(LOST):
        assert end(task, 74) == (True, 255)
        task = task.checkpoint().function  # what submitit keeps for the next start
    assert end(task, 74) == (False, 74)


def test_a_start_that_saved_begins_the_count_anew(end, task):
    for code in (74, 74, 75, 74, 74, 74):
        assert end(task, code) == (True, 255)
    assert end(task, 74) == (False, 74)
