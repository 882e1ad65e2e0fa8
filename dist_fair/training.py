"""Training a recipe: the run folder is claimed, then the loop runs, watched by the log, W&B and the console."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dist_fair.data.batch import Batch
from dist_fair.data.loading import Scoring, training_loader
from dist_fair.data.window import canonical_order
from dist_fair.engine import checkpoint
from dist_fair.engine.accumulation import accumulation_note
from dist_fair.engine.assembly import vocabulary
from dist_fair.engine.backends import make_backend
from dist_fair.engine.device.compilation import compile_module
from dist_fair.engine.device.flops import flops_per_sample, peak_tflops
from dist_fair.engine.device.profiling import Profile, micro_batches, profiled
from dist_fair.engine.device.stopwatch import shares
from dist_fair.engine.device.trial import Rehearsal, Trial, attempt
from dist_fair.engine.invocation import Invocation
from dist_fair.engine.loop import Observer, Rhythm, Trainer
from dist_fair.engine.optimization import build_optimizer, build_schedule
from dist_fair.engine.run_folder import MetricsLog, RunFolder, few
from dist_fair.engine.saving import Saver
from dist_fair.engine.sharpness import refuse_inexact_sam
from dist_fair.errors import DistFairError, Preempted, on_all_ranks
from dist_fair.recipe.resolved import Resolved, differences, flatten
from dist_fair.recipes import interventions
from dist_fair.reporting.chance import ChanceWatch
from dist_fair.reporting.progress import Progress, say
from dist_fair.reporting.wandb_log import WandbLog
from dist_fair.session import Session


class Training(Session):
    """One invocation of a run. Making one checks everything that can be refused, and writes nothing."""

    def __init__(self, resolved: Resolved, invocation: Invocation | None = None):
        with on_all_ranks():
            self.start, self.faults = claim(RunFolder(resolved.recipe.out), resolved)
        super().__init__(resolved, RunFolder(resolved.recipe.out), invocation)
        self.reader = self._reader(self.parts.index)
        with on_all_ranks():
            self.reader.check(self.parts.plan.samples)
            refuse_inexact_sam(self.recipe.optimizer.sam, self.module, self.parts.plan, self.comm.world)
            parameters = sum(parameter.numel() for parameter in self.module.parameters())
            self.sizes = parameters, self.module.detector.scoring_parameters()  # a sharded module has fewer, or none
            self.flops, self.peak = self._arithmetic()
            self.compiled = compile_module(self.module, self.recipe.train.compile)
            self.backend = make_backend(self.recipe.train, self.module, self._optimizer, self.accelerator)
        self.planned_tests = self.tests() if self.recipe.evaluation.at_end else {}

    def run(self) -> None:
        """Trains; evaluates if the run's last step is done and the recipe wants it. W&B sees both."""
        self._take_folder()
        self._stage()
        wandb = self._wandb()
        try:
            if self.train(wandb) and self.planned_tests:
                with self.backend.whole() as self.module:
                    reports = self.evaluate(self.planned_tests, checkpoint.name_of(self.parts.steps))
                wandb.summary(flatten(reports))
        except BaseException as error:
            wandb.finish(failed=not isinstance(error, Preempted))
            raise
        wandb.finish()

    def _stage(self) -> None:
        """From here on shards are read from the node's local disk, if data.stage_to says so."""
        whole = self.recipe.data.bad_samples == "substitute"  # any sample may have to stand in for another
        read = [None if whole else self.parts.plan.samples, *(None for _ in self.planned_tests)]
        training, *tests = self.staged([self.parts.index, *self.planned_tests.values()], read)
        self.reader, self.planned_tests = self._reader(training), dict(zip(self.planned_tests, tests, strict=True))

    def train(self, wandb: WandbLog) -> bool:
        """Trains from the checkpoint found or from the start. True if the run's last step is done."""
        trainer = self._trainer()
        scoring = Scoring(self.reader, self.comm.rank, self.comm.world, self.device, self.recipe.data.mean,
                          self.recipe.data.std, self.parts.plan.samples)  # fmt: skip
        if trainer.step < trainer.rhythm.stop:
            begins = f"goes on from {self.start.folder.name}" if self.start else "starts"
            say(f"{self.folder.path} {begins}; {self.backend.describe()}", self.leader)
            for note in self._notes():
                say(note, self.leader)
            with self._observers(trainer, wandb) as observers:
                trainer.run(self._batches, scoring, observers)
            self._report_bad(self.loader, self.parts.index,
                             "other samples of the same label and attributes took their place")  # fmt: skip
        else:
            say(f"{self.folder.path}: all {trainer.step} steps were done before", self.leader)
        return trainer.step == self.parts.steps

    def trial(self) -> Trial:
        """Takes two steps as the run will, on all ranks together, and writes nothing; do not train afterwards.

        Raises DistFairError that says where one fails, and what mends it.
        """
        stream = self._batches(0, 2 * self.recipe.train.accumulate)
        return attempt(self._rehearsal(), stream, self.parts.plan, self.peak)

    def profile(self, steps: int, trace: Path | None, tell: Callable[[str], None]) -> Profile:
        """Times and traces steps, on all ranks together; see `profiled`. Do not train afterwards."""
        stream = self._batches(0, micro_batches(steps, self.recipe.train.accumulate))
        return profiled(self._rehearsal(), stream, self.parts.plan, steps, trace, tell)

    def _rehearsal(self) -> Rehearsal:
        recipe, world = self.recipe, self.comm.world
        subject = (f"recipe={recipe.recipe}, detector.name={recipe.detector.name}, train.batch_size="
                   f"{recipe.train.batch_size} ({self.parts.plan.batch_size // world} at a time on each of {world} "
                   "ranks)")  # fmt: skip
        return self._trainer(Rehearsal, subject=subject)

    def describe(self, trial: Trial | None = None) -> str:
        """What would run, and what a trial has shown, for --dry-run."""
        parts, index = self.parts, self.parts.index
        groups = ", ".join(f"{name} {list(values)}" for name, values in vocabulary(index).items()) or "none"
        parameters, scoring = self.sizes
        begin = f"resumes {self.start.folder}" if self.start else "starts anew"
        return "\n".join([
            f"run folder    {self.folder.path} ({begin})",
            f"training      {len(index)} samples of {', '.join(index.folders)}",
            f"attributes    {groups}",
            f"plan          {parts.plan.describe()}",
            f"steps         {parts.steps}, each {self.recipe.train.batch_size} samples on {self.comm.world} rank(s)",
            f"detector      {self.recipe.detector.name}, {parameters:,} parameters with the interventions', of which "
            f"{scoring:,} make the score",
            f"backend       {self.backend.describe()}",
            f"interventions {', '.join(self.recipe.interventions)}",
            *(f"evaluation    {name}: {len(test)} samples" for name, test in self.planned_tests.items()),
            *(f"{name:14}{text}" for name, text in (trial.lines() if trial else {}).items()),
            "all checks passed; nothing was trained, nothing written (--dry-run)",
        ])  # fmt: skip

    def _notes(self) -> list[str]:
        """What a person should know when training starts, such as "warning: ..."; a dry run does not say it."""
        note = accumulation_note(self.recipe, self.module)
        return [*([f"warning: {note}"] if note else []), *([self.compiled] if self.compiled else [])]

    def _take_folder(self) -> None:
        """From here on nobody else writes into it; who did until now may have left a newer checkpoint."""
        self._hold("trained")
        with on_all_ranks():
            if self.start is None or checkpoint.newest(self.folder.checkpoints) != self.start.folder:
                self.start, self.faults = claim(self.folder, self.resolved)
            checkpoint.agree(self.start, self.comm)
        for fault in self.faults:
            say(f"warning: {fault}; going on from {self.start.folder.name}", self.leader)
        if self.leader:
            self.folder.begin(self.resolved.yaml())
            self.folder.rewind(self.start.step if self.start else 0)

    def _trainer(self, kind: type[Trainer] = Trainer, **settings: object) -> Trainer:
        recipe, steps = self.recipe, self.parts.steps
        begun = self.start.step if self.start else 0
        stop = min(steps, begun + recipe.train.stop_after) if recipe.train.stop_after else steps
        saved = recipe.checkpoint
        train, order = recipe.train, None
        if train.accumulate_exact:
            order = canonical_order(self.parts.plan, train.accumulate, self.comm.world).to(self.device)
        rhythm = Rhythm(steps, stop, train.accumulate, train.clip, saved.every, order)
        trainer = kind(
            self.backend,
            build_schedule(self.backend.optimizer, recipe.schedule, steps),
            self.comm,
            rhythm,
            sam=recipe.optimizer.sam,
            seed=recipe.seed,
            saver=Saver(self.folder.checkpoints, self.resolved.trajectory(), self.comm, saved.keep, saved.criterion()),
            describe=self.parts.index.place,
            preemption=self.invocation.preemption,
            flops=self.flops,
            **settings,
        )
        if self.start:
            with on_all_ranks():
                trainer.resume(self.start)
        return trainer

    def _arithmetic(self) -> tuple[float | None, float | None]:
        """FLOPs of a sample, and what the device could do, in TFLOP/s."""
        train, passes = self.recipe.train, 2 if self.recipe.optimizer.sam.rho else 1
        flops = flops_per_sample(self.module, self.recipe.data.image_size, vocabulary(self.parts.index))
        return flops and passes * flops, peak_tflops(self.device, train.precision, train.tf32)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(module, self.recipe.optimizer, fused=self.recipe.train.backend == "ddp")

    def _batches(self, first: int, last: int) -> Iterator[Batch]:
        data = self.recipe.data
        self.loader = training_loader(self.parts.plan, self.reader, self.comm.rank, self.comm.world, first, last,
                                      data.workers, data.augment, self.device)  # fmt: skip
        return self._on_device(self.loader)

    def _wandb(self) -> WandbLog:
        chosen = self.recipe.wandb
        mode, name = chosen.mode if self.leader else "disabled", chosen.name or self.folder.path.name
        return WandbLog(mode, chosen.project, name, self.resolved.values, self.folder.path, chosen.tags)

    @contextmanager
    def _observers(self, trainer: Trainer, wandb: WandbLog) -> Iterator[list[Observer]]:
        """What watches the training: on the leader metrics.jsonl, W&B and the console, elsewhere nothing."""
        if not self.leader:
            yield []
            return
        log = MetricsLog(self.folder.metrics)
        with Progress(trainer.rhythm.stop, "train", True, self.recipe.log.every, trainer.step) as progress:

            def observe(step: int, values: Mapping[str, object]) -> None:
                self.invocation.check()
                if self.peak and "tflops_per_second" in values:
                    values = {**values, "mfu": values["tflops_per_second"] / self.peak}
                log.write({"step": step, **values})
                wandb.log(values, step)
                progress.step(loss=values["loss"], lr=values["learning_rate"],
                              samples_per_second=values["samples_per_second"], time=shares(values))  # fmt: skip
                for name, record in values.get("restructured", {}).items():
                    told = (f"{key} {value}" for key, value in record.items() if not isinstance(value, dict))
                    say(f"step {step}: {name}: {', '.join(told)}")

            try:
                yield [observe, ChanceWatch(self.parts.steps)]
            finally:
                log.close()


def claim(folder: RunFolder, resolved: Resolved) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to go on from, or None, and what is wrong with newer ones.

    Raises DistFairError where the folder belongs to something else, or no checkpoint in it is whole.
    """
    out, resume = f"out={folder.path}", resolved.recipe.resume
    folder.refuse_other_recipe(resolved, interventions(), out, "choose another out=")
    newest = checkpoint.newest(folder.checkpoints)
    if resume == "never" and newest is not None:
        raise DistFairError(f"resume=never, but {out} has {newest.name}: choose another out=, or resume=auto")
    if resume in ("auto", "never"):
        found, faults = checkpoint.newest_undamaged(folder.checkpoints)
    else:
        found, faults = checkpoint.read(checkpoint.find(Path(resume))), []
    if found is None:
        return None, []
    if changed := differences(found.recipe, resolved.trajectory()):
        raise DistFairError(f"{found.folder} is a checkpoint of another recipe (then, now): {few(changed)}: to start "
                            "from its weights, set detector.init_from")  # fmt: skip
    return found, faults
