"""How a run that does not simply finish ends: the exit codes, and the exceptions that entry points turn into them."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every verb. 74, 75 and 76 are for whoever starts runs again: the same command goes on."""

    DONE = 0, "done, or stopped by train.stop_after"
    BUG = 1, "a bug: the traceback says where"
    REFUSED = 2, "an error that you can mend: the line that begins with 'error' says how"
    LISTED = 3, "done, but not with everything: what is wrong is listed"
    RANK_LOST = 74, "a rank died, froze or failed, or its node went: the same command goes on from the last checkpoint"
    PREEMPTED = 75, "stopped by SIGUSR1, SIGUSR2 or SIGTERM, checkpointed: the same command goes on"
    FORCED_OUT = 76, "such a signal, but the rank hung: the same command goes on from the last checkpoint"
    INTERRUPTED = 130, "interrupted from the keyboard: the same command goes on from the last checkpoint"
    UNREAD = 141, "whoever read the output stopped reading"

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "Exit":
        made = int.__new__(cls, code)
        made._value_, made.meaning = code, meaning
        return made


class DistFairError(ValueError):
    """An error a user can fix. Entry points print its text without a traceback and exit with 2.

    The text names the value, the place (file, key, setting) and the fix.
    everywhere: every rank meets this error at the same place, so that one of them may speak for all.
    """

    everywhere = False


class Preempted(Exception):
    """A signal asked the run to stop, and all ranks do, at the same boundary. The text says where and who was asked."""


class RankLost(Exception):
    """This rank cannot go on because another one does not. The text says which, and what this one was waiting in."""


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """Marks errors raised inside as met by every rank alike."""
    try:
        yield
    except DistFairError as error:
        error.everywhere = True
        raise


def nearest(word: str, known: list[str]) -> str:
    """A "did you mean" clause for an unknown `word`, or the list of what is known where nothing is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(sorted(known)) or 'none'}"
