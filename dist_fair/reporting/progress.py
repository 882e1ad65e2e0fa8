"""Progress of long work: a live bar on a terminal, plain lines where there is none (logs of Slurm and CI)."""

import time
from functools import cache

LOG_COLUMNS = 120


@cache
def console():
    """The console that bars and messages share, so that a message goes above a live bar and not through it."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_COLUMNS)


def say(what, enabled: bool = True) -> None:
    """One message or table, at once; above the bar where one is live. enabled: false on all ranks but the first."""
    if not enabled:
        return
    if isinstance(what, str) and not console().is_terminal:
        print(what, flush=True)
    else:
        console().print(what, markup=False, soft_wrap=isinstance(what, str))
        console().file.flush()


class Progress:
    """How far the work is, with numbers, pace and time left.

    total: the whole of the work, in steps or samples; label: what is done, e.g. "train"; enabled: false on all ranks
    but the first; every: a plain line each so many calls of `step`, and at the end (on a terminal the bar is always
    live); start: what was done before, by the run that this one resumes; unit: "samples" for a pace in samples/s.

        with Progress(total=8000, label="evaluate", enabled=comm.rank == 0, every=20, unit="samples") as progress:
            for batch in batches:
                progress.step(len(batch), data=name)
    """

    def __init__(
        self, total: int, label: str, enabled: bool = True, every: int = 20, start: int = 0, unit: str | None = None
    ):
        self.total, self.label, self.enabled, self.every, self.unit = total, label, enabled, max(1, every), unit
        self.done = self.start = start
        self._calls = 0
        self._bar = None

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if self.enabled and console().is_terminal:
            self._bar, self._task = _bar(self.label, self.total, self.start)
            self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, count: int = 1, **numbers: float | str) -> None:
        """`count` more is done; `numbers` are shown beside it."""
        self.done += count
        self._calls += 1
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, numbers=self._numbers(numbers))
        elif self._calls % self.every == 0 or self.done == self.total:
            rest = _clock((self.total - self.done) / self._pace()) if self.done > self.start else "?"
            parts = (f"{self.label} {self.done}/{self.total}", self._numbers(numbers), f"ETA {rest}")
            print("  ".join(part for part in parts if part), flush=True)

    def say(self, text: str) -> None:
        """A message among the progress."""
        say(text, self.enabled)

    def _numbers(self, numbers: dict[str, float | str]) -> str:
        pace = [f"{self._pace():.0f} {self.unit}/s"] if self.unit else []
        return "  ".join([*(f"{name} {_short(value)}" for name, value in numbers.items()), *pace])

    def _pace(self) -> float:
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)


def _bar(label: str, total: int, done: int):
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[numbers]}", markup=False),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        console=console(),
    )
    return bar, bar.add_task(label, total=total, completed=done, numbers="")


def _short(value: float | str) -> str:
    """Four significant digits; whole numbers and words as they are."""
    return str(value) if isinstance(value, int | str) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
