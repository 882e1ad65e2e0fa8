"""Where the time of a step goes, by the clock of the device, without waiting for it.

A GPU runs behind the host; what it does when is told by events in its stream, which cost a microsecond each and are
read when the step's numbers are. On the CPU a moment is the host's clock. A stretch of time is that between two marks:

    data        the device has nothing to do: the batch is not there, or the host is late with launching
    forward     forward passes, losses included
    backward    backward passes, and what lies between passes: gradient all-reduces that they hide, SAM's ascent
    optimizer   clipping, and the step itself
    collectives our own collectives, wherever they lie; a part of the others, not beside them
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

STRETCHES = ("data", "forward", "backward", "optimizer")
Moment = float | torch.cuda.Event


class Stopwatch:
    """Marks moments of one step after the other; `lap` hands over those of the step that ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, Moment]] = []
        self._spans: list[tuple[Moment, Moment]] = []

    def mark(self, name: str) -> None:
        """From here on it is `name` that takes time."""
        self._marks.append((name, self._now()))

    @contextmanager
    def collective(self) -> Iterator[None]:
        """What runs within is a collective."""
        begun = self._now()
        yield
        self._spans.append((begun, self._now()))

    def lap(self) -> "Lap":
        """The step ends here."""
        lap = Lap(self._marks, self._now(), self._spans)
        self._marks, self._spans = [], []
        return lap

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Lap:
    """The moments of one step, to be read once the device has passed them all."""

    def __init__(self, marks: list[tuple[str, Moment]], end: Moment, spans: list[tuple[Moment, Moment]]):
        self._marks, self._end, self._spans = marks, end, spans

    def seconds(self) -> dict[str, float]:
        """Stretch -> seconds, those of STRETCHES and "collectives", which is part of them."""
        total = defaultdict(float, dict.fromkeys(STRETCHES, 0.0))
        ends = [moment for _, moment in self._marks[1:]] + [self._end]
        for (name, begun), ended in zip(self._marks, ends, strict=True):
            total[name] += _between(begun, ended)
        total["collectives"] = sum((_between(*span) for span in self._spans), 0.0)
        return dict(total)


def shares(values: Mapping[str, object]) -> str:
    """What a step's values say of its time, as parts of it: "data 2%, forward 33%, backward 62%, optimizer 3%"."""
    return ", ".join(f"{name} {values[f'seconds/{name}'] / values['seconds']:.0%}" for name in STRETCHES)


def _between(begun: Moment, ended: Moment) -> float:
    return ended - begun if isinstance(begun, float) else begun.elapsed_time(ended) / 1000
