"""How a run is asked to stop: a signal to any one rank, agreed on by all of them between two pieces of work.

Slurm asks before it takes nodes away (`--signal=USR1@120`, SIGTERM), submitit by SIGUSR2, people by `kill`. The signal
reaches one rank, some or all of them, at any moment, and what has to stop is one run. So

    any moment    the rank remembers the signal and works on
    boundary      before every training step, scoring batch and evaluation batch one all-reduce of one integer tells
                  each rank whether any of them has been asked: all stop there, or none
    deadline      a rank that hangs comes to no boundary: DIST_FAIR_GRACE seconds after the signal it is forced out

The deadline is kept by a thread, since a rank that waits in a collective runs no Python, hence no Python signal
handler. What does run is the handler's part in C, which writes the signal's number into a pipe; the thread reads it.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from dist_fair.engine.children import end_by_parent_alone, keep_from_children
from dist_fair.errors import DistFairError, Exit, Preempted

if TYPE_CHECKING:
    from dist_fair.collectives import Communicator

Item = TypeVar("Item")
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGTERM") if hasattr(signal, name))
GRACE = 90.0  # seconds; slurm/train.sh asks Slurm for 120 between signal and kill


class Preemption:
    """Keeps the signals that come while it is entered, and has all ranks act on them together.

    Enter it as early as possible, in the main thread (elsewhere no signal is kept), and before data workers start. Not
    entered, it never stops anything; its boundaries are the same. Signals after the first change nothing.
    Raises DistFairError for a DIST_FAIR_GRACE that is no number of seconds.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.grace = seconds("DIST_FAIR_GRACE", GRACE)
        self.whereabouts: Callable[[], str] = lambda: "starting"
        self._before: dict[int, object] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._process = os.getpid()
        self._pipe, written = os.pipe()
        os.set_blocking(written, False)
        self._written = written
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        keep_from_children(self)
        threading.Thread(target=self._force_out, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Handlers are as before; after a signal those to come are ignored: they would hide the exit code."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup)
        self._ended.set()
        os.close(self._written)  # ends the thread

    def check(self, comm: "Communicator") -> None:
        """A boundary. Raises Preempted, on every rank, if a signal has come to one of them."""
        import torch

        asked = torch.tensor(int(self.received or 0) * comm.world + comm.rank, device=comm.device)
        number, rank = divmod(int(comm.maximum(asked, "stop")), comm.world)
        if number:
            raise Preempted(f"{comm.place}: stopped by {signal.Signals(number).name} on rank {rank}")

    def between(self, items: Iterable[Item], comm: "Communicator") -> Iterator[Item]:
        """The items, with a boundary before each. All ranks have equally many."""
        for item in items:
            self.check(comm)
            yield item

    def disown(self) -> None:
        """A signal to all processes of a group or job is for the rank to answer; a child ends when the rank wants."""
        if self._before:
            signal.set_wakeup_fd(-1)
            for number in {signal.SIGINT, *SIGNALS} - {signal.SIGTERM}:
                signal.signal(number, signal.SIG_IGN)
            end_by_parent_alone(self._process)

    def _receive(self, number: int, _: object = None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)

    def _force_out(self) -> None:
        with os.fdopen(self._pipe, "rb", buffering=0) as pipe:
            while self.received is None:
                for number in pipe.read(1) or b"\0":
                    if number in SIGNALS:
                        self._receive(number)
                    elif number == 0:
                        return
            if self._ended.wait(self.grace):  # with the pipe open: later signals are still written to it
                return
        told = f"{self.received.name} came {self.grace:g} s ago (DIST_FAIR_GRACE)"
        end(Exit.FORCED_OUT, f"{self.whereabouts()}: {told}: forced out; the same command goes on from the last "
                             "checkpoint")  # fmt: skip


def end(code: Exit, text: str) -> None:
    """Ends this process at once, from any thread, saying why and what every thread was doing."""
    with suppress(Exception):
        faulthandler.dump_traceback(sys.__stderr__)
        print(text, file=sys.__stderr__, flush=True)
        sys.stdout.flush()
    os._exit(code)


@contextmanager
def passed_on(belongs: Callable[[list[str]], bool]) -> Iterator[None]:
    """Hands signals on to the child processes whose command line `belongs`; how they end is then theirs to say.

    A launcher of its own mind would kill them 30 s later. A signal that comes before there are children raises
    Preempted.
    """
    import psutil

    seen = False

    def hand_on(number: int, _: object) -> None:
        nonlocal seen
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # of one that has ended, and waits to be asked how
                if belongs(child.cmdline()):
                    seen = True
                    child.send_signal(number)
        if not seen:
            raise Preempted(f"stopped by {signal.Signals(number).name} before the ranks started")

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds(variable: str, default: float) -> float:
    """A number of seconds from the environment."""
    text = os.environ.get(variable, "")
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise DistFairError(f"{variable}={text}: seconds, such as {default:g}")
    return value
