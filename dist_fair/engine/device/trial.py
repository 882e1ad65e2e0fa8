"""Real steps before a run, or beside one: what they take, and what of them cannot be done.

What only kernels know no check of settings finds: an operation without a backward pass on this device, a batch that
does not fit, images that a detector refuses. So steps are taken, by the loop that trains, with batches of the run's own
loader, on its device and backend, by all ranks together; and at the end of the run, where all interventions act. Not
taken is what lies between steps, restructuring and checkpoints. Nothing is written.

The first step also makes what the others find: kernels are chosen, or compiled, and moments begin. So there are two,
and the second one is what each step of the run costs.

Weights, moments and running statistics are those of a trained step afterwards. To put them back would take a copy of
them all, in the memory that is to be measured, and of what sharding backends cannot copy: whoever takes steps here
trains nothing with the same module later.
"""

import math
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_fair.data.batch import Batch
from dist_fair.data.plan import TrainingPlan
from dist_fair.engine.device.memory import Memory, Use
from dist_fair.engine.device.stopwatch import Stopwatch, shares
from dist_fair.engine.loop import Trainer, Values
from dist_fair.errors import DistFairError, Preempted
from dist_fair.interventions.base import ScoringData

STRETCHES = {"data": "reading a batch", "forward": "the forward pass", "backward": "the backward pass",
             "optimizer": "the optimizer's step"}  # fmt: skip
MENDED = {  # what an exception says -> what to do, with what was found in it
    r"out of memory|can't allocate memory|not enough memory": "the step takes more memory than there is: a smaller "
    "train.batch_size; or train.accumulate=2, the same batch in two parts; train.checkpoint_activations=true; "
    "train.precision=bf16; over several ranks train.backend=fsdp",
    r"[Ii]nput \w+ \(?(\d+).*doesn't match model \(?(\d+)": "the detector wants {1} pixels: data.image_size={1}, or "
    "+detector.arguments.img_size={0} where it takes that",
    r"[Kk]ernel size can't be greater than actual input size|[Oo]utput size is too small": "the images are too small "
    "for this detector: a larger data.image_size",
}
WIRE = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection")  # what an error says that another rank's end is behind


class Rehearsal(Trainer):
    """A Trainer whose steps are all at the end of the run; it writes no checkpoint and restructures nothing.

    subject: of what the steps are, for error messages.
    """

    def __init__(self, *arguments: object, subject: str, **settings: object):
        super().__init__(*arguments, **settings)
        self.subject = subject
        self.memory = Memory(self.stopwatch.device)
        self.stopwatch = _Attentive(self.stopwatch.device, self.memory)

    def take(self, stream: Iterator[Batch], count: int) -> tuple[list[Values], float]:
        """Takes `count` steps: what each has told, see Trainer, and the seconds of all, until the device is done.

        stream: micro-batches, as many as that takes or more. Called on all ranks together. Raises DistFairError,
        naming the stretch, where a step cannot be taken; as they are, errors that the loss of another rank is behind.
        """
        told: list[Values] = []
        self.rhythm.stop = self.step + count
        began = self._settled()
        try:
            self.run(lambda first, last: stream, None, [lambda step, values: told.append(dict(values))])
            return told, self._settled() - began
        except (DistFairError, Preempted):
            raise
        except Exception as error:
            if self.comm.world > 1 and WIRE.search(str(error)):
                raise
            raise DistFairError(f"{self.subject}: {account(error, self.stopwatch.stretch, self.device)}") from error

    @property
    def device(self) -> torch.device:
        """Where the steps are taken."""
        return self.stopwatch.device

    @property
    def _progress(self) -> float:
        return math.nextafter(1.0, 0.0)

    def _restructure(self, scoring: ScoringData) -> Values:
        return {}

    def _save(self, values: Values) -> Values:
        return {}

    def _keep(self, values: Values) -> str:
        return "nothing is kept of a trial"

    def _settled(self) -> float:
        """The time, once the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Attentive(Stopwatch):
    """A Stopwatch that knows in which stretch the step is, and looks at memory when another one begins."""

    def __init__(self, device: torch.device, memory: Memory):
        super().__init__(device)
        self.memory, self.stretch = memory, "data"

    def mark(self, name: str) -> None:
        self.stretch = name
        self.memory.look()
        super().mark(name)


@dataclass(frozen=True)
class Trial:
    """Two steps of `rows` samples over all ranks, and what the second one took on this rank.

    first, seconds: of the two, loading included. values: what Trainer told of the second. largest: samples of a step
    that there is room for, by estimate; None where it takes too little to tell. flops: of a sample. peak: of the
    device, TFLOP/s; None where not known.
    """

    device: torch.device
    rows: int
    first: float
    seconds: float
    values: Values
    use: Use
    largest: int | None
    flops: float | None
    peak: float | None

    def lines(self) -> dict[str, str]:
        """What to tell a person: heading -> text."""
        pace = f"{self.seconds:.3g} s on {card(self.device)}, {self.rows / self.seconds:.4g} samples/s"
        found = {"one step": f"{pace}; {shares(self.values)}; the first one {self.first:.3g} s"}
        if self.flops is not None:
            found["arithmetic"] = f"{self.flops / 1e9:.3g} GFLOP a sample, forward and backward; {self._speed()}"
        used = f"{gigabytes(self.use.peak)} at most, of {gigabytes(self.use.total)}"
        return found | {"memory": f"{used}; {self._room()}"}

    def _speed(self) -> str:
        speed = self.values["tflops_per_second"]
        part = f", {speed / self.peak:.0%} of the {self.peak:g} it could do" if self.peak else ""
        return f"{speed:.3g} TFLOP/s a rank{part}"

    def _room(self) -> str:
        if self.largest is None:
            return "too little to tell what else would fit"
        if self.largest <= self.rows:
            return "by estimate no larger batch is safe"
        return f"by estimate train.batch_size={self.largest} would fit"


def attempt(rehearsal: Rehearsal, stream: Iterator[Batch], plan: TrainingPlan, peak: float | None) -> Trial:
    """Takes two steps; called on all ranks together. See Rehearsal.take, also for what it raises, and Trial."""
    _, first = rehearsal.take(stream, 1)
    rehearsal.memory.begin()
    (values,), seconds = rehearsal.take(stream, 1)
    use, rows = rehearsal.memory.use(), rehearsal.rhythm.accumulate * plan.batch_size
    return Trial(rehearsal.device, rows, first, seconds, values, use, fitting(rehearsal, plan, use), rehearsal.flops,
                 peak)  # fmt: skip


def fitting(rehearsal: Rehearsal, plan: TrainingPlan, use: Use) -> int | None:
    """Samples of a step that all ranks have room for, by estimate, each by its own `use`; None where it is too little
    to tell. Called on all ranks together."""
    comm = rehearsal.comm
    rows = [one for one in comm.objects(use.rows(plan.batch_size // comm.world), "trial") if one is not None]
    return rehearsal.rhythm.accumulate * planned(plan, comm.world * min(rows)) if rows else None


def planned(plan: TrainingPlan, samples: int) -> int:
    """The most samples, up to so many and up to all there are, that a micro-batch with the lanes of `plan` can have."""
    unit = plan.lanes * sum(plan.parts) // math.gcd(*plan.parts)
    return min(samples, len(plan.samples)) // unit * unit


def account(error: Exception, stretch: str, device: torch.device) -> str:
    """What to tell of an error in a step: where, what, and what mends it."""
    words = (str(error).splitlines() or [""])[0][:300]
    fix = "no setting is known to mend it; `dist-fair train` without --dry-run ends in the whole traceback"
    for pattern, known in MENDED.items():
        if found := re.search(pattern, str(error)):
            fix = known.format(*found.groups())
            break
    found = f"{type(error).__name__}: {words}{_place(error)}"
    return f"{STRETCHES[stretch]} of a real step fails on {card(device)}: {found}: {fix}"


def _place(error: Exception) -> str:
    """The innermost line that is not torch's own: " (norm.py:97, in backward)"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not Path(frame.filename).is_relative_to(Path(torch.__file__).parent)]  # fmt: skip
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""


def card(device: torch.device) -> str:
    """What people call the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.3g} GB"
