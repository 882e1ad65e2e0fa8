"""The one exception that people see: what is wrong, where, and how to mend it."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager


class DistFairError(ValueError):
    """An error a user can fix. Entry points print its text without a traceback and exit with 2.

    The text names the value, the place (file, key, setting) and the fix.
    everywhere: every rank meets this error at the same place, so that one of them may speak for all.
    """

    everywhere = False


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
