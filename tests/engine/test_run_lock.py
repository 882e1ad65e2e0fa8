"""One job at a time in a run folder, and no lock that outlives its holder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from dist_fair.engine import run_lock
from dist_fair.engine.run_lock import NAME, RunLock
from dist_fair.errors import DistFairError

HOLDER = """
import os, sys, time
from pathlib import Path
from dist_fair.engine import children
from dist_fair.engine.run_lock import RunLock
if "bug" in sys.argv:
    children.keep_from_children.__code__ = (lambda held: None).__code__
lock = RunLock(Path(sys.argv[1]), "trained")
lock.acquire()
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def job(monkeypatch):
    """Sets the Slurm job and the number of its restarts that new locks are of."""

    def become(job, restarts):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return become


@pytest.fixture
def holder(tmp_path):
    """Starts a process with a forked child, as a rank with a data worker, that holds the lock of `tmp_path`."""
    started = []

    def start(*arguments):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), *arguments], stdout=subprocess.PIPE,
                                   start_new_session=True)  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path, job, monkeypatch):
    monkeypatch.setenv("USER", "ada")
    job("4711", "2")
    first = RunLock(tmp_path, "trained")
    assert first.acquire() is None
    job("4712", "0")
    since = time.strftime("%Y-%m-%d ")
    with pytest.raises(DistFairError) as refused:
        RunLock(tmp_path, "evaluated").acquire()
    held = f"it is trained by ada on {first.me.host}, Slurm job 4711, process {os.getpid()}, since {since}"
    assert f"{tmp_path} is in use ({held}" in str(refused.value)
    first.release()
    assert not (tmp_path / NAME).exists()
    second = RunLock(tmp_path, "evaluated")
    second.acquire()
    second.release()


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    process = holder()
    with pytest.raises(DistFairError, match=rf"process {process.pid}, since"):
        RunLock(tmp_path, "trained").acquire()
    process.kill()
    process.wait()
    lock = RunLock(tmp_path, "trained")
    lock.acquire()
    lock.release()


def test_children_that_inherit_it_would_hold_it(tmp_path, holder):
    """The naive lock: data workers live on for seconds after their rank was killed."""
    process = holder("bug")
    process.kill()
    process.wait()
    with pytest.raises(DistFairError, match="in use"):
        RunLock(tmp_path, "trained").acquire()


def test_a_requeued_job_takes_over_from_its_former_start(tmp_path, job, monkeypatch):
    """Whose lock may live on where its node was cut off: its processes see that, and stop."""
    monkeypatch.setattr(run_lock, "CHECK", 0.0)
    job("4711", "0")
    former = RunLock(tmp_path, "trained")
    former.acquire()
    former.check()
    job("4711", "1")
    later = RunLock(tmp_path, "trained")
    later.acquire()
    later.check()
    with pytest.raises(DistFairError, match="was taken over by a later start of the same job"):
        former.check()
    former.release()
    assert (tmp_path / NAME).exists(), "the file is the later one's"
    job("4711", "0")
    with pytest.raises(DistFairError, match="in use"):
        RunLock(tmp_path, "trained").acquire()
    later.release()


def test_two_runs_of_one_job_do_not_take_over(tmp_path, job):
    job("4711", "1")
    first = RunLock(tmp_path, "trained")
    first.acquire()
    with pytest.raises(DistFairError, match="in use"):
        RunLock(tmp_path, "trained").acquire()
    first.release()


def test_a_file_system_without_locks_is_told(tmp_path):
    lock = RunLock(tmp_path, "trained")
    with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOSYS, "Function not implemented")):
        assert "lies on a file system without locks (Function not implemented" in lock.acquire()
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_says_nothing_yet_is_one(tmp_path):
    with (tmp_path / NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DistFairError, match="is in use \\(another process has it\\)"):
            RunLock(tmp_path, "trained").acquire()
