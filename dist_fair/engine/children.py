"""What forked children must not take over from a rank, and how they end.

A data worker is a copy of its rank, with the rank's signal handlers, sockets and locks. Left so, it would keep a killed
rank's connections open and its run folder locked until it notices that its parent is gone (5 s in torch), and would
answer signals in its rank's name.

Nor may it die of what is not meant for it. `timeout`, Slurm and Ctrl-C send a signal to a whole process group or job;
the rank then works on to the next boundary, for which it needs its workers, and their death would end it with an error
before. But a child that no SIGTERM can end would keep its rank from ending: torch and multiprocessing end workers that
are stuck, as in a file system that does not answer, by SIGTERM, and wait. What tells the two apart is who sends it.
"""

import os
import signal
import threading
import weakref
from typing import Protocol

LOOK = 1.0  # seconds between two looks at whether the parent is still there


class Heirloom(Protocol):
    """Something a rank holds."""

    def disown(self) -> None:
        """Called in a forked child, first thing."""
        ...


_held: weakref.WeakSet = weakref.WeakSet()
_registered = False


def keep_from_children(held: Heirloom) -> None:
    """Has `held` disowned in every child forked from now on, as long as it exists."""
    global _registered
    _held.add(held)
    if not _registered and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_disown)
        _registered = True


def _disown() -> None:
    for held in list(_held):
        held.disown()
    _held.clear()


def end_by_parent_alone(parent: int) -> None:
    """From now on this process ends by a SIGTERM of its parent, by no other, and when the parent is gone.

    Call it in the main thread, before there are others: SIGTERM is blocked in all of them, and a thread waits for it,
    since a handler in Python is not told who the sender is, nor runs while the main thread hangs. Where no thread can
    wait for a signal (macOS), any SIGTERM ends the process.
    """
    waits = hasattr(signal, "sigtimedwait")
    if waits:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if waits:
        threading.Thread(target=_await_end, args=(parent,), name="parent", daemon=True).start()


def _await_end(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait([signal.SIGTERM], LOOK)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)  # as torch's workers do: any other code would be an error to torch in the parent
