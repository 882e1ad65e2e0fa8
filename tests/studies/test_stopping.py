"""A study that is stopped stops what it started, and that alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_fair.studies import runs
from dist_fair.studies.runs import over_seeds, train_all


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_study_stops_what_it_started_and_starts_no_more(erm, tmp_path, started, capsys, number):
    bystander = subprocess.Popen(["sleep", "60"])
    before = signal.getsignal(number)
    processes = started("exec sleep 60", number)
    with pytest.raises(KeyboardInterrupt):
        train_all(over_seeds(tmp_path, "run", erm, range(3)), jobs=3)
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
    assert bystander.poll() is None
    bystander.kill()
    assert "stopping what runs (2)" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored(erm, tmp_path, started):
    """As under nohup."""
    processes = started("true", signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train_all(over_seeds(tmp_path, "run", erm, range(2)), jobs=2)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [process.returncode for process in processes] == [0, 0]


def test_a_run_that_does_not_end_is_killed(erm, tmp_path, started, monkeypatch):
    monkeypatch.setattr(runs, "GRACE", 0.5)
    processes = started("exec sleep 60", signal.SIGINT)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the processes started here inherit
    try:
        with pytest.raises(KeyboardInterrupt):
            train_all(over_seeds(tmp_path, "run", erm, range(2)), jobs=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


MAIN = """
import sys
from pathlib import Path
from dist_fair.cli import guarded
from dist_fair.studies.runs import over_seeds, train_all
runs = over_seeds(Path(sys.argv[1]), "run", sys.argv[2:], range(3))
sys.exit(guarded(lambda _: train_all(runs, ranks=2), []))
"""


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found + [pid for child in found for pid in descendants(child)]


def running(word: str) -> list[int]:
    """Processes with a word on their command line; one that has ended has no command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [int(process.name)] * (word.encode() in (process / "cmdline").read_bytes())
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_the_ranks_of_a_stopped_study_end_with_it(erm, tmp_path):
    """The signal goes to the study alone; in sessions of their own are the launcher and each of its ranks."""
    command = [sys.executable, "-c", MAIN, tmp_path, *erm, "train.steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while len(descendants(process.pid)) < 3:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=90)
    left = running(str(tmp_path))
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert left == []
    assert process.returncode == 130
    assert "stopping what runs (1)" in printed
    assert not (tmp_path / "run-1.log").exists()
