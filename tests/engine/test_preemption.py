"""Signals are kept, agreed on by all ranks, and cannot hang a rank for good."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from unittest import mock

import pytest

from dist_fair.collectives import Communicator
from dist_fair.engine.preemption import SIGNALS, Preemption, passed_on
from dist_fair.errors import DistFairError, Exit, Preempted
from tests.ranks import run_ranks


def received(preemption):
    """The signal a Preemption knows of, after its thread had time to hear of it."""
    deadline = time.monotonic() + 10
    while preemption.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return preemption.received


@pytest.fixture(autouse=True)
def handlers():
    """As they were, whatever a test leaves."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_the_next_boundary_and_not_before(number):
    comm, done = Communicator(), []
    comm.place = "step 3"

    def work(item):
        if item == 1:
            os.kill(os.getpid(), number)
        done.append(item)

    asked = pytest.raises(Preempted, match=rf"^step 3: stopped by {number.name} on rank 0$")
    with Preemption() as preemption, asked:
        [work(item) for item in preemption.between(range(3), comm)]
    assert done == [0, 1]
    assert comm.counts["stop"].calls == 3


def test_the_first_of_many_signals_is_the_reason():
    with Preemption() as preemption:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(Preempted, match="SIGUSR2"):
            preemption.check(Communicator())


def test_handlers_are_put_back_and_late_signals_do_not_hide_the_exit_code():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3


def test_what_was_not_entered_keeps_nothing():
    Preemption().check(Communicator())


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_grace_that_is_no_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("DIST_FAIR_GRACE", text)
    with pytest.raises(DistFairError, match=f"DIST_FAIR_GRACE={text}: seconds, such as 90"):
        Preemption()


# Between ranks


def only_here(self, comm):
    """The naive bug: each rank looks at its own flag."""
    if self.received:
        raise Preempted("")


def boundaries(comm, planted):
    """How many of five pieces of work this rank does, when rank 1 gets a signal in its third; and how it is told."""
    with mock.patch.object(Preemption, "check", only_here) if planted else nullcontext(), Preemption() as preemption:
        for done in range(5):
            try:
                preemption.check(comm)
            except Preempted as stopped:
                return done, str(stopped)
            if done == 2 and comm.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        return 5, ""


def test_all_ranks_stop_at_the_same_boundary():
    assert run_ranks(3, boundaries, False) == [(3, "starting: stopped by SIGUSR1 on rank 1")] * 3


def test_a_flag_that_is_not_agreed_on_stops_one_rank():
    assert [done for done, _ in run_ranks(2, boundaries, True)] == [5, 3]


# The deadline, and children


def script(body, **environment):
    """Runs lines of Python in a process of its own, which has `preemption` entered."""
    lines = ["import ctypes, os, signal, subprocess, sys, time", "from dist_fair.engine.preemption import Preemption",
             "preemption = Preemption().__enter__()", *body]  # fmt: skip
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60,
                          env=os.environ | environment)  # fmt: skip


HANG = ["libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)", "libc.pthread_mutex_init(mutex, None)",
        "libc.pthread_mutex_lock(mutex)", "libc.pthread_mutex_lock(mutex)"]  # fmt: skip


def test_a_rank_that_hangs_outside_python_is_forced_out():
    """As in a collective: no Python handler runs there."""
    killer = "subprocess.Popen(['sh', '-c', f'sleep 0.2; kill -USR1 {os.getpid()}'])"
    done = script([killer, "preemption.whereabouts = lambda: 'rank 3 of 4, step 12'", *HANG], DIST_FAIR_GRACE="0.2")
    assert done.returncode == Exit.FORCED_OUT
    assert "rank 3 of 4, step 12: SIGUSR1 came 0.2 s ago (DIST_FAIR_GRACE): forced out" in done.stderr
    assert 'File "<string>"' in done.stderr, "where it hung"


def test_a_rank_that_ends_in_time_is_not_forced_out():
    body = ["os.kill(os.getpid(), signal.SIGTERM)", "preemption.__exit__()", "time.sleep(0.5)", "sys.exit(75)"]
    assert script(body, DIST_FAIR_GRACE="0.2").returncode == 75


def test_signals_after_the_first_say_nothing():
    """Ends of data workers among them, which torch listens to."""
    body = ["os.kill(os.getpid(), signal.SIGTERM)", "time.sleep(0.2)", "os.kill(os.getpid(), signal.SIGUSR1)",
            "preemption.__exit__()"]  # fmt: skip
    done = script(body)
    assert (done.returncode, done.stderr) == (0, "")


# A child that signals itself, then hangs where no signal handler of Python runs.
FORK = [
    "ready, told = os.pipe()",
    "child = os.fork()",
    "if child == 0:",
    "    for number in (2, 10, 12, 15): os.kill(os.getpid(), number)",
    "    os.write(told, b'.')",
    *(f"    {line}" for line in HANG),
    "os.read(ready, 1)",
]


def test_a_child_survives_what_its_group_is_sent_and_ends_when_its_rank_says():
    """The rank hears of no signal that is not sent to it."""
    body = [
        *FORK,
        "for name in ('INT', 'USR1', 'USR2', 'TERM', 'TERM'):",
        "    subprocess.run(['kill', f'-{name}', str(child)], check=True)",
        "time.sleep(0.2)",
        "assert os.waitpid(child, os.WNOHANG) == (0, 0), 'it died'",
        "os.kill(child, signal.SIGTERM)",
        "assert os.waitpid(child, 0)[1] == 0, 'its end was an error'",
        "sys.exit(preemption.received)",
    ]
    done = script(body)
    assert done.returncode == 0, done.stderr


def test_a_child_ends_with_its_rank():
    """The child has the rank's output, which is read until everybody has closed it."""
    done = script([*FORK, "print('ready', flush=True)", "os.kill(os.getpid(), signal.SIGKILL)"])
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "ready\n")


def test_a_launcher_passes_signals_on_to_its_ranks():
    ends_with_7 = (
        "import signal, sys, time; signal.signal(10, lambda *_: sys.exit(7)); print(1, flush=True); time.sleep(60)"
    )
    with passed_on(lambda words: words[-1] == "rank"):
        ranks = [subprocess.Popen([sys.executable, "-c", ends_with_7, "rank"], stdout=subprocess.PIPE) for _ in "12"]
        other = subprocess.Popen(["sleep", "60"])
        assert [rank.stdout.readline() for rank in ranks] == [b"1\n"] * 2
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT).si_status for rank in ranks] == [7, 7]
        os.kill(os.getpid(), signal.SIGTERM)  # too late to matter
        assert other.poll() is None
        other.kill()


def test_a_launcher_that_has_no_ranks_yet_stops():
    with pytest.raises(Preempted, match="stopped by SIGTERM before the ranks started"), passed_on(lambda words: False):
        os.kill(os.getpid(), signal.SIGTERM)
