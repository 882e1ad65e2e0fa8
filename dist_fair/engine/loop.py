"""The training loop. One path for one rank and for many; it knows no method by name.

Step t is a pure function of (state before t, recipe, seed, t): the data come from the plan, every random number from a
key, the learning rate and the weights from t. So a run that stops after any step and resumes is the run that did not.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain

import torch
from timm.scheduler.scheduler import Scheduler

from dist_fair import keyed
from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.window import Window
from dist_fair.engine import checkpoint, sharpness
from dist_fair.engine.backends.base import Backend
from dist_fair.engine.device.numerics import refusals_told, seed
from dist_fair.engine.device.readings import Reading, Verdict, mean_row
from dist_fair.engine.device.stopwatch import Lap, Stopwatch
from dist_fair.engine.module import Losses
from dist_fair.engine.preemption import Preemption
from dist_fair.engine.saving import Saver
from dist_fair.errors import DistFairError, Preempted
from dist_fair.interventions.base import ScoringData
from dist_fair.recipe.schema import Sam

Values = dict[str, object]
Observer = Callable[[int, Mapping[str, object]], None]
WATCHED = ("loss", "gradient_norm", *sharpness.MEASURES)  # a step in which one of them is not finite is not taken


@dataclass
class Rhythm:
    """When things happen, in steps.

    steps: of the whole run. stop: where this invocation ends. accumulate: micro-batches per step. clip: the largest
    global gradient norm or None. save_every: steps between checkpoints or None (only at the end).
    exact: None, or the order of a step's rows (see Window) that makes its micro-batches one batch to the objectives.
    """

    steps: int
    stop: int
    accumulate: int
    clip: float | None
    save_every: int | None
    exact: torch.Tensor | None = None


@dataclass
class Told:
    """A step that was launched, and what is yet to be told of it: its numbers are read one step late (see Reading).

    rows: samples of it on all ranks. began, waited: on the host's clock, of the step and of those its batches took.
    suspects: (samples, logits) of each forward pass, of this rank. values: what the host knew at once.
    """

    step: int
    rows: int
    began: float
    waited: float
    reading: Reading
    lap: Lap
    suspects: list[tuple[torch.Tensor, torch.Tensor]]
    values: Values = field(default_factory=dict)


class Trainer:
    """A module in training.

    backend: how the ranks share it. saver: of its checkpoints. describe: sample row -> text, for messages. sam: where
    the gradients are taken. preemption: who may ask it to stop. flops: of a sample, forward and backward, if known.
    """

    def __init__(
        self,
        backend: Backend,
        schedule: Scheduler,
        comm: Communicator,
        rhythm: Rhythm,
        *,
        sam: Sam,
        seed: int,
        saver: Saver,
        describe: Callable[[int], str],
        preemption: Preemption | None = None,
        flops: float | None = None,
    ):
        self.backend, self.module, self.schedule = backend, backend.module, schedule
        self.comm, self.rhythm = comm, rhythm
        self.sam, self.flops = sam, flops
        self.seed, self.saver, self.describe = seed, saver, describe
        self.preemption = preemption or Preemption()
        self.step = self.saved = 0
        device = next(chain(self.module.buffers(), self.module.parameters())).device  # parameters may be offloaded
        self.verdict, self.stopwatch = Verdict(), Stopwatch(device)
        self._launched: Told | None = None  # the last step, while it is not told
        # DDP, FSDP and ZeRO speak to each other in backward without us: this is what a rank then waits in.
        self.module.register_forward_hook(lambda *_: setattr(comm, "last", "gradients"))
        self.module.register_forward_pre_hook(lambda *_: self.stopwatch.mark("forward"))
        self.module.register_forward_hook(lambda *_: self.stopwatch.mark("backward"))

    def resume(self, source: checkpoint.Checkpoint) -> None:
        """Takes over a checkpoint's state. Call before `run`."""
        self.backend.load(source.tensors("model"), source.tensors("optimizer"), source.folder)
        self.step = self.saved = source.step

    def run(
        self,
        batches: Callable[[int, int], Iterable[Batch]],
        scoring: ScoringData,
        observers: Iterable[Observer],
    ) -> None:
        """Trains up to rhythm.stop.

        batches: (first, last) micro-batch -> this rank's batches, on its device. observers: called for each step with
        its number and values, on every rank; while the device is at the next step, before a checkpoint is written.
        Raises Preempted, on every rank, where it was asked to stop: between two steps, with the state on disk.
        """
        accumulate, observers = self.rhythm.accumulate, [*observers]
        stream = iter(batches(self.step * accumulate, self.rhythm.stop * accumulate))
        self.module.train()
        self.comm.drain()
        self.comm.watch = self.stopwatch.collective
        try:
            self._run(stream, scoring, observers)
        except BaseException:
            with suppress(Exception):  # of the step before the one that failed a log should say how it went
                self._tell(observers, judge=False)
            raise
        finally:
            self.comm.watch = nullcontext
        self.saver.finish()

    def _run(self, stream: Iterator[Batch], scoring: ScoringData, observers: Sequence[Observer]) -> None:
        values, stall = {}, {}
        while self.step < self.rhythm.stop:
            self.comm.place = f"step {self.step}"
            try:
                self.preemption.check(self.comm)
                changes = self._restructure(scoring)
            except Preempted as asked:
                values = self._tell(observers) or values
                raise Preempted(f"{asked}; {self._keep(values)}") from None
            launched = self._step(stream)
            launched.values |= changes | stall
            values = self._tell(observers, launched.began) or values
            self._launched = launched
            self.step += 1
            stall = {}
            if self._due():
                # Told before it is saved: a run killed in between resumes from before this step and tells it again.
                values = self._tell(observers)
                stall = self._save(values)
            self.saver.poll()

    def _step(self, stream: Iterator[Batch]) -> Told:
        """Launches a step, which the device goes through later."""
        began = time.perf_counter()
        self.stopwatch.mark("data")
        seed(self.stopwatch.device, keyed.integer(self.seed, "step", self.step, self.comm.rank))
        self.schedule.step_update(self.step)
        asked = time.perf_counter()
        batches = [next(stream) for _ in range(self.rhythm.accumulate)]
        waited = time.perf_counter() - asked
        with refusals_told():
            history = sharpness.gradients(self.sam, self.module, batches, self._progress, self._backward)
        self.stopwatch.mark("optimizer")
        names, row = self._judged(history, self.backend.clip(self.rhythm.clip))
        values: Values = {"loss": None} | dict.fromkeys(history[0].numbers)
        values["learning_rate"] = self.backend.optimizer.param_groups[0]["lr"]
        self.backend.step(self.verdict.broken)
        suspects = [(losses.samples, losses.logits) for losses in history]
        lap = self.stopwatch.lap()
        reading = Reading(names, row)  # behind the last mark: once it has arrived, the device has passed them all
        for name, count in self.comm.drain().items():
            values[f"calls/{name}"], values[f"bytes/{name}"] = count.calls, count.bytes
        rows = sum(sum(batch.sizes) for batch in batches)
        return Told(self.step, rows, began, waited, reading, lap, suspects, values)

    def _judged(self, history: Sequence[Losses], norm: torch.Tensor) -> tuple[list[str], torch.Tensor]:
        """Names and means over windows of all numbers of a step, the watched ones first, and the verdict on these."""
        found = [{"loss": losses.loss, "gradient_norm": norm, **losses.numbers} for losses in history]
        names = sorted((name for name in found[0] if found[0][name] is not None), key=lambda name: name not in WATCHED)
        row = mean_row([[numbers[name] for name in names] for numbers in found])
        self.verdict.judge(row[: sum(name in WATCHED for name in names)])
        return names, row

    def _tell(self, observers: Sequence[Observer], until: float | None = None, judge: bool = True) -> Values:
        """Tells the observers of the last step, unless that is done: {} then. until: when the next one began.

        Raises DistFairError where it was not finite, if it is to be judged.
        """
        told, self._launched = self._launched, None
        if told is None:
            return {}
        numbers = told.reading.numbers()
        if judge:
            self._stop_if_not_finite(numbers, told)
        seconds = (until or time.perf_counter()) - told.began
        values = told.values | numbers
        values["samples_per_second"], values["data_wait"] = told.rows / seconds, min(told.waited / seconds, 1.0)
        if self.flops is not None:
            values["tflops_per_second"] = self.flops * told.rows / seconds / self.comm.world / 1e12
        values["seconds"] = seconds
        values |= {f"seconds/{name}": taken for name, taken in told.lap.seconds().items()}
        for observer in observers:
            observer(told.step, values)
        return values

    def _backward(self, batches: Sequence[Batch]) -> list[Losses]:
        """Adds the gradients of a step's loss to the parameters', averaged over ranks; one Losses per window."""
        windows = self._windows(batches)
        return [
            self.backend.differentiate(window, self._progress, 1 / len(windows), last=window is windows[-1])
            for window in windows
        ]

    @property
    def _progress(self) -> float:
        return self.step / self.rhythm.steps

    def _windows(self, batches: Sequence[Batch]) -> list[Window]:
        """The step's micro-batches, together where the objectives look at all of them; means are added up as cheaply
        one by one."""
        if self.rhythm.exact is not None and self.module.couples(self._progress):
            return [Window(batches, self.rhythm.exact)]
        return [Window([batch]) for batch in batches]

    def _stop_if_not_finite(self, numbers: Mapping[str, float], told: Told) -> None:
        """All ranks see the same numbers, so all stop at the same step; each names its own samples."""
        watched = {name: numbers[name] for name in WATCHED if name in numbers}
        if all(math.isfinite(value) for value in watched.values()):
            return
        own = [
            self.describe(int(sample))
            for samples, logits in told.suspects
            for sample in samples[~logits.isfinite().all(dim=1)]
        ]
        names = [name for part in self.comm.objects(own, "non-finite samples") for name in part]
        found = "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")
        self.saver.finish()
        last = checkpoint.newest(self.saver.folder)
        error = DistFairError(
            f"step {told.step}: {', '.join(f'{name} {value}' for name, value in watched.items())}: stopped before they "
            f"reach the weights. Samples whose logits are not finite: {found or 'none'}. Lower optimizer.lr"
            f"{', or optimizer.sam.rho' if self.sam.rho else ''}, or set train.clip, in another out="
            + (f"; detector.init_from={last} keeps its weights" if last else "")
        )
        error.everywhere = True
        raise error

    def _restructure(self, scoring: ScoringData) -> Values:
        """What the interventions change in the detector before this step; if stopped in it, nothing is changed."""
        due = [name for name, part in self.module.interventions.items() if part.restructures(self.step)]
        if not due:
            return {}
        scoring, found, stopped = _Interruptible(scoring, self.preemption, self.comm), {}, None
        with self.backend.whole() as module:
            before = [(buffer, buffer.clone()) for buffer in module.buffers()]
            try:
                for name in due:
                    found[name] = module.interventions[name].restructure(self.step, module.detector, scoring, self.comm)
            except Preempted as asked:
                stopped = asked
                for buffer, value in before:
                    buffer.copy_(value)
        if stopped:
            raise stopped
        return {"restructured": found}

    def _save(self, values: Values) -> Values:
        self.saved = self.step
        return self.saver.save(self.step, self.backend, values)

    def _keep(self, values: Values) -> str:
        """Sees that the present state is on disk before any rank leaves; says so."""
        new = self.step > self.saved
        if new:
            self._save(values)
        self.saver.finish()
        self.comm.barrier("stopped")  # whoever ends a job ends it all with its first rank
        return "checkpointed" if new or self.saved else "nothing was trained yet"

    def _due(self) -> bool:
        every = self.rhythm.save_every
        return self.step == self.rhythm.stop or (every is not None and self.step % every == 0)


@dataclass
class _Interruptible:
    """ScoringData with a boundary before each batch."""

    data: ScoringData
    preemption: Preemption
    comm: Communicator

    def batches(self, size: int, count: int, *key: int | str) -> Iterator[Batch]:
        return self.preemption.between(self.data.batches(size, count, *key), self.comm)
