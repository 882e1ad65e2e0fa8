"""Progress of long work: a live bar on a terminal, plain lines where there is none (logs of Slurm and CI)."""

import time
from functools import cache


@cache
def console():
    """The console that bars and messages share, so that a message goes above a live bar and not through it."""
    from rich.console import Console

    return Console(highlight=False)


def say(text: str, enabled: bool = True) -> None:
    """One message, at once; above the bar where one is live. enabled: false on all ranks but the first."""
    if not enabled:
        return
    if console().is_terminal:
        console().print(text, markup=False, soft_wrap=True)
    else:
        print(text, flush=True)


class Progress:
    """Counts steps, with numbers, pace and time left.

    total: steps in all; label: what is done, e.g. "train"; enabled: false on all ranks but the first; every: a plain
    line each so many steps, and at the last one (on a terminal the bar is always live); start: steps done before, by
    the run that this one resumes.

        with Progress(total=400, label="train", enabled=comm.rank == 0, every=20) as progress:
            for ...:
                progress.step(batch_size, loss=loss, lr=lr)
    """

    def __init__(self, total: int, label: str, enabled: bool = True, every: int = 20, start: int = 0):
        self.total, self.label, self.enabled, self.every = total, label, enabled, max(1, every)
        self.done = self.start = start
        self.samples = 0
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

    def step(self, samples: int, **numbers: float) -> None:
        """One step is done, on so many samples (over all ranks); `numbers` are shown beside it."""
        self.done += 1
        self.samples += samples
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, numbers=self._numbers(numbers))
        elif self.done % self.every == 0 or self.done == self.total:
            left = _clock(self._seconds() / (self.done - self.start) * (self.total - self.done))
            parts = (f"{self.label} {self.done}/{self.total}", self._numbers(numbers), f"ETA {left}")
            print("  ".join(part for part in parts if part), flush=True)

    def _numbers(self, numbers: dict[str, float]) -> str:
        pace = f"{self.samples / self._seconds():.0f} samples/s" if self.samples else ""
        shown = (f"{name} {_short(value)}" for name, value in numbers.items())
        return "  ".join(part for part in (*shown, pace) if part)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)


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


def _short(value: float) -> str:
    """Four significant digits; whole numbers whole."""
    return str(value) if isinstance(value, int | str) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
