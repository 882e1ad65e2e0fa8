"""What forked children must not take over from a rank.

A data worker is a copy of its rank, with the rank's signal handlers, sockets and locks. Left so, it would keep a killed
rank's connections open and its run folder locked until it notices that its parent is gone (5 s in torch), and would
ignore the signal that is to end it.
"""

import os
import weakref
from typing import Protocol


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
