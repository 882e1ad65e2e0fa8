"""Where the time of a step goes: the steps of a rehearsal, timed, timed without their loader, and traced.

    warm-up    kernels are chosen and compiled, moments begin, loading processes fill their queues
    timed      with the run's own loader: the pace, the stretches of the step, the memory
    cached     with the same micro-batches again and again: the pace if data cost nothing
    traced     under torch's profiler, which slows steps down: from it come parts and counts, and no times of a step

Paces are from when the device has nothing to do to when it has nothing to do. All ranks take the steps together; each
knows its own, and rank 0's are told.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, schedule

from dist_fair.data.batch import Batch
from dist_fair.data.plan import TrainingPlan
from dist_fair.engine.device.memory import Use
from dist_fair.engine.device.stopwatch import STRETCHES
from dist_fair.engine.device.trial import Rehearsal, fitting

WARM_UP = 5  # steps
TRACED = 3  # steps: of PG-FDD's 11,000 kernels and more each, which is 5 MB of trace
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel", "cuLaunchKernel",
            "cuLaunchKernelEx", "cudaGraphLaunch")  # fmt: skip
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
READ = "aten::_local_scalar_dense"  # a number of a tensor for the host; of a GPU's, it waits in cudaStreamSynchronize
ANNOTATIONS = ("ProfilerStep", "enumerate(DataLoader)")  # torch's own names for stretches of time


@dataclass(frozen=True)
class Operator:
    """What took time in a step, without what it calls: its seconds on the device, and how often it was called."""

    name: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """Of one rank's steps; times in seconds a step.

    stretches: of Stopwatch, "collectives" being a part of the others. seconds, cached: with the loader, and without.
    operators: those that took most first. busy: of the device, in all of them and in what is none; 0 where a GPU's
    profiler may not look. launches: of kernels.
    waits: name -> how often the host waits for the device. reads: numbers that it reads. rows: samples of a step, on
    all ranks. largest: of how many samples there is room for, by estimate. flops: of a sample. None: not known.
    """

    rows: int
    steps: int
    seconds: float
    cached: float
    stretches: dict[str, float]
    operators: list[Operator]
    busy: float
    launches: float
    waits: dict[str, int]
    reads: float
    use: Use
    largest: int | None
    flops: float | None

    @property
    def headspace(self) -> float:
        """The pace with a batch at hand over the pace with the loader: 1 where the loader is never waited for."""
        return self.seconds / self.cached


def micro_batches(steps: int, accumulate: int) -> int:
    """As many as `profiled` takes from its stream."""
    return (WARM_UP + steps + 1 + TRACED + 2) * accumulate


def profiled(
    rehearsal: Rehearsal,
    stream: Iterator[Batch],
    plan: TrainingPlan,
    steps: int,
    trace: Path | None,
    tell: Callable[[str], None],
) -> Profile:
    """Takes the steps; called on all ranks together.

    stream: `micro_batches` of the plan. steps: that are timed. trace: where it is written, gzipped, for Perfetto and
    chrome://tracing; None on ranks that write none. tell: is told what begins. Raises what Rehearsal.take does.
    """
    accumulate = rehearsal.rhythm.accumulate
    tell(f"{WARM_UP} steps to warm up")
    rehearsal.take(stream, WARM_UP)
    rehearsal.memory.begin()
    tell(f"{steps} steps with the loader")
    told, seconds = rehearsal.take(stream, steps)
    use = rehearsal.memory.use()
    tell(f"{steps} steps with one batch")
    kept = [*islice(stream, accumulate)]
    _, cached = rehearsal.take(cycle(kept), steps)
    del kept
    tell(f"{TRACED} steps under the profiler")
    counts = _traced(rehearsal, stream, trace)
    names = (*STRETCHES, "collectives")
    stretches = {name: sum(values[f"seconds/{name}"] for values in told) / steps for name in names}
    return Profile(accumulate * plan.batch_size, steps, seconds / steps, cached / steps, stretches, use=use,
                   largest=fitting(rehearsal, plan, use), flops=rehearsal.flops, **counts)  # fmt: skip


def _traced(rehearsal: Rehearsal, stream: Iterator[Batch], trace: Path | None) -> dict[str, object]:
    """Steps under the profiler: from when one asks for its batch to when the one after the last asks for its own."""
    cuda, accumulate = rehearsal.device.type == "cuda", rehearsal.rhythm.accumulate
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if not cuda:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says that it finds no GPU
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=TRACED, repeat=1)) as profiler:

        def noted() -> Iterator[Batch]:
            for number in count():
                if number and number % accumulate == 0:
                    profiler.step()
                yield next(stream)

        rehearsal.take(noted(), 1 + TRACED + 1)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return _counted(profiler.key_averages(), DeviceType.CUDA if cuda else DeviceType.CPU)


def _counted(averages: Iterable[FunctionEventAvg], device: DeviceType) -> dict[str, object]:
    """What the profiler's averages say of a step: the fields of Profile that come from there."""
    rows = [row for row in averages if not row.key.startswith(ANNOTATIONS) and not row.is_user_annotation]
    calls = {row.key: row.count for row in rows if row.device_type == DeviceType.CPU}

    def seconds(row: FunctionEventAvg) -> float:
        """On the device, in all."""
        return (row.self_device_time_total if device == DeviceType.CUDA else row.self_cpu_time_total) / 1e6

    # Kernels have rows of their own, and are counted once more with the operators that launched them: these are what
    # people know, those are the whole.
    busy = sum(seconds(row) for row in rows if row.device_type == device)
    found = sorted((row for row in rows if row.device_type == DeviceType.CPU), key=seconds, reverse=True)
    return {
        "operators": [Operator(row.key, seconds(row) / TRACED, row.count / TRACED) for row in found if seconds(row)],
        "busy": busy / TRACED,
        "launches": sum(calls.get(name, 0) for name in LAUNCHES) / TRACED,
        # Rounded down: the profiler itself waits once.
        "waits": {name: calls[name] // TRACED for name in WAITS if calls.get(name, 0) >= TRACED},
        "reads": calls.get(READ, 0) / TRACED,
    }
