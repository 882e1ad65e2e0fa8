"""The training loop. One path for one rank and for many; it knows no method by name.

Step t is a pure function of (state before t, recipe, seed, t): the data come from the plan, every random number from a
key, the learning rate and the weights from t. So a run that stops after any step and resumes is the run that did not.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler

from dist_fair import keyed
from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.window import Window
from dist_fair.engine import checkpoint, sharpness
from dist_fair.engine.module import Losses, TrainingModule
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import ScoringData
from dist_fair.recipe.schema import Sam

Values = dict[str, object]
Observer = Callable[[int, Mapping[str, object]], None]


@dataclass
class Rhythm:
    """When things happen, in steps.

    steps: of the whole run. stop: where this invocation ends. accumulate: micro-batches per step. clip: the largest
    global gradient norm or None. save_every: steps between checkpoints or None (only at the end). keep: checkpoints.
    exact: None, or the order of a step's rows (see Window) that makes its micro-batches one batch to the objectives.
    """

    steps: int
    stop: int
    accumulate: int
    clip: float | None
    save_every: int | None
    keep: int
    exact: torch.Tensor | None = None


class Trainer:
    """A module in training.

    module: the bare TrainingModule. recipe: what a checkpoint must agree with to be resumed. describe: sample row ->
    text, for messages. sam: where the gradients are taken.
    """

    def __init__(
        self,
        module: TrainingModule,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        accelerator: Accelerator,
        comm: Communicator,
        rhythm: Rhythm,
        *,
        sam: Sam,
        seed: int,
        recipe: Mapping,
        folder: Path,
        describe: Callable[[int], str],
    ):
        self.module, self.optimizer, self.schedule = module, optimizer, schedule
        self.accelerator, self.comm, self.rhythm = accelerator, comm, rhythm
        self.sam = sam
        self.seed, self.recipe, self.folder, self.describe = seed, recipe, folder, describe
        self.step = 0
        self.wrapped = module

    def resume(self, source: checkpoint.Checkpoint) -> None:
        """Takes over a checkpoint's state. Call before `run`."""
        checkpoint.load_model(self.module, source.tensors("model"), source.folder)
        checkpoint.load_optimizer(self.module, self.optimizer, source.tensors("optimizer"))
        self.step = source.step

    def run(
        self,
        batches: Callable[[int, int], Iterable[Batch]],
        scoring: ScoringData,
        observers: Iterable[Observer],
    ) -> None:
        """Trains up to rhythm.stop.

        batches: (first, last) micro-batch -> this rank's batches, on its device. observers: called after each step
        with the step's number and values, on every rank.
        """
        self.wrapped, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)
        accumulate = self.rhythm.accumulate
        stream = iter(batches(self.step * accumulate, self.rhythm.stop * accumulate))
        self.module.train()
        self.comm.drain()
        stall: Values = {}
        while self.step < self.rhythm.stop:
            changes = self._restructure(scoring)
            values = self._step(stream) | changes | stall
            # Told before it is saved: a run killed in between resumes from before this step and tells it again.
            for observer in observers:
                observer(self.step, values)
            self.step += 1
            stall = self._save() if self._due() else {}

    def _step(self, stream: Iterator[Batch]) -> Values:
        began = time.perf_counter()
        torch.manual_seed(keyed.integer(self.seed, "step", self.step, self.comm.rank))
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        asked = time.perf_counter()
        batches = [next(stream) for _ in range(self.rhythm.accumulate)]
        waited = time.perf_counter() - asked
        history = sharpness.gradients(self.sam, self.module, batches, self._progress, self._backward)
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.rhythm.clip or math.inf)
        values = self._read(history, norm)
        self._stop_if_not_finite(values, history)
        self.optimizer.step()
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - began
        rows = sum(sum(batch.sizes) for batch in batches)
        values["samples_per_second"], values["data_wait"] = rows / seconds, waited / seconds
        for name, count in self.comm.drain().items():
            values[f"calls/{name}"], values[f"bytes/{name}"] = count.calls, count.bytes
        return values

    def _backward(self, batches: Sequence[Batch]) -> list[Losses]:
        """Adds the gradients of a step's loss to the parameters', averaged over ranks; one Losses per window."""
        windows, history = self._windows(batches), []
        for window in windows:
            with nullcontext() if window is windows[-1] else self.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(window, self._progress)
                self.accelerator.backward(losses.loss / len(windows))
            history.append(losses)
        return history

    @property
    def _progress(self) -> float:
        return self.step / self.rhythm.steps

    def _windows(self, batches: Sequence[Batch]) -> list[Window]:
        """The step's micro-batches, together where the objectives look at all of them; means are added up as cheaply
        one by one."""
        if self.rhythm.exact is not None and self.module.couples(self._progress):
            return [Window(batches, self.rhythm.exact)]
        return [Window([batch]) for batch in batches]

    def _read(self, history: Sequence[Losses], norm: torch.Tensor | float) -> Values:
        """Means over windows as Python numbers: the step's only wait for the device."""
        names = [name for name, value in history[0].numbers.items() if value is not None]
        columns = [[losses.loss.detach(), *(losses.numbers[name] for name in names)] for losses in history]
        table = torch.stack([torch.stack([value.double() for value in row]) for row in columns]).mean(dim=0)
        loss, *numbers = table.tolist()
        values: Values = {"loss": loss} | dict.fromkeys(history[0].numbers) | dict(zip(names, numbers, strict=True))
        values["gradient_norm"] = float(norm)
        return values

    def _stop_if_not_finite(self, values: Values, history: Sequence[Losses]) -> None:
        """All ranks see the same numbers, so all stop at the same step; each names its own samples."""
        watched = {name: values[name] for name in ("loss", "gradient_norm", *sharpness.MEASURES) if name in values}
        if all(math.isfinite(value) for value in watched.values()):
            return
        own = [
            self.describe(int(sample))
            for losses in history
            for sample in losses.samples[~losses.logits.isfinite().all(dim=1)]
        ]
        names = [name for part in self.comm.objects(own, "non-finite samples") for name in part]
        found = "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")
        last = checkpoint.newest(self.folder)
        error = DistFairError(
            f"step {self.step}: {', '.join(f'{name} {value}' for name, value in watched.items())}: stopped before they "
            f"reach the weights. Samples whose logits are not finite: {found or 'none'}. Lower optimizer.lr"
            f"{', or optimizer.sam.rho' if self.sam.rho else ''}, or set train.clip, in another out="
            + (f"; detector.init_from={last} keeps its weights" if last else "")
        )
        error.everywhere = True
        raise error

    def _restructure(self, scoring: ScoringData) -> Values:
        records = {
            name: record
            for name, part in self.module.interventions.items()
            if (record := part.restructure(self.step, self.module.detector, scoring, self.comm)) is not None
        }
        return {"restructured": records} if records else {}

    def _due(self) -> bool:
        every = self.rhythm.save_every
        return self.step == self.rhythm.stop or (every is not None and self.step % every == 0)

    def _save(self) -> Values:
        """Writes a checkpoint; how long all ranks waited for it is told with the next step."""
        began = time.perf_counter()
        if self.comm.rank == 0:
            model = {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}
            optimizer = checkpoint.optimizer_tensors(self.module, self.optimizer)
            checkpoint.write(self.folder, self.step, self.recipe, {"model": model, "optimizer": optimizer})
            checkpoint.prune(self.folder, self.rhythm.keep)
        self.comm.barrier("checkpoint")
        return {"checkpoint_seconds": time.perf_counter() - began}
