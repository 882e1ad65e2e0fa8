"""A run from the outside: its parts, its folder, what is said and logged while it trains and is evaluated.

train.py and evaluate.py are thin over this; the engine below knows neither terminal nor W&B.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dist_fair.collectives import Communicator
from dist_fair.composition import read
from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.data.loading import Loader, Scoring, evaluation_loader, training_loader
from dist_fair.data.reading import Reader, counts_by_group
from dist_fair.engine import checkpoint
from dist_fair.engine.assembly import assemble, evaluation_indexes, prepare_demo, vocabulary
from dist_fair.engine.evaluation import evaluate_all
from dist_fair.engine.launch import accelerator
from dist_fair.engine.loop import Observer, Rhythm, Trainer
from dist_fair.engine.optimization import build_optimizer, build_schedule
from dist_fair.engine.run_folder import MetricsLog, RunFolder
from dist_fair.errors import DistFairError, on_all_ranks
from dist_fair.recipes import interventions
from dist_fair.reporting.progress import Progress, say
from dist_fair.reporting.tables import evaluation_table
from dist_fair.reporting.wandb_log import WandbLog
from dist_fair.resolved import Resolved, differences


class Session:
    """One invocation of a run on all its ranks. Making one checks everything and writes nothing."""

    def __init__(self, resolved: Resolved):
        self.resolved, self.recipe = resolved, resolved.recipe
        with on_all_ranks():
            self.accelerator = accelerator()
            self.comm, self.device = Communicator(), self.accelerator.device
            self.folder = RunFolder(self.recipe.out)
            self.start = self._claim()
        prepare_demo(self.recipe.data, self.comm)
        with on_all_ranks():
            self.parts = assemble(self.recipe, self.comm)
            self.module = self.parts.module.to(self.device)
            self.reader = self._reader(self.parts.index)
            self.reader.check(self.parts.plan.samples)
            wanted = self.recipe.evaluation.at_end
            self.tests = evaluation_indexes(self.recipe.data, vocabulary(self.parts.index)) if wanted else {}
            for index in self.tests.values():
                self._reader(index).check()

    @property
    def leader(self) -> bool:
        """True on the rank that writes and speaks."""
        return self.comm.rank == 0

    def train(self) -> bool:
        """Trains from the newest checkpoint or from the start. True if the run's last step is done."""
        trainer = self._trainer()
        self.comm.barrier("claimed")
        if self.leader:
            self.folder.begin(self.resolved.yaml())
            self.folder.rewind(trainer.step)
        scoring = Scoring(self.reader, self.comm.rank, self.comm.world, self.device, self.recipe.data.mean,
                          self.recipe.data.std, self.parts.plan.samples)  # fmt: skip
        if trainer.step < trainer.rhythm.stop:
            with self._observers(trainer) as observers:
                trainer.run(self._batches, scoring, observers)
        return trainer.step == self.parts.steps

    def evaluate(self, tests: Mapping[str, Index]) -> dict[str, dict]:
        """Scores and judges data sets, writes what a run leaves behind, prints the table; reports on the leader."""
        total, bootstrap = sum(len(index) for index in tests.values()), self.recipe.evaluation.bootstrap
        with Progress(total, "evaluate", self.leader, self.recipe.log.every, unit="samples") as progress:
            reports = evaluate_all(self.module, tests, self._test_batches, self.folder, bootstrap=bootstrap,
                                   seed=self.recipe.seed, observe=progress.step)  # fmt: skip
        if self.leader:
            say(evaluation_table(reports))
            say(f"predictions, evaluation.json, metrics.jsonl and checkpoints lie in {self.folder.path.resolve()}")
        return reports

    def describe(self) -> str:
        """What would run, for --dry-run."""
        parts, index = self.parts, self.parts.index
        groups = ", ".join(f"{name} {list(values)}" for name, values in vocabulary(index).items()) or "none"
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        begin = f"resumes {self.start.folder}" if self.start else "starts anew"
        return "\n".join([
            f"run folder    {self.folder.path} ({begin})",
            f"training      {len(index)} samples of {', '.join(index.folders)}",
            f"attributes    {groups}",
            f"plan          {parts.plan.describe()}",
            f"steps         {parts.steps}, each {self.recipe.train.batch_size} samples on {self.comm.world} rank(s)",
            f"detector      {self.recipe.detector.name}, {parameters:,} parameters with the interventions'",
            f"interventions {', '.join(self.recipe.interventions)}",
            *(f"evaluation    {name}: {len(test)} samples" for name, test in self.tests.items()),
            "all checks passed; nothing was trained (--dry-run)",
        ])  # fmt: skip

    def _trainer(self) -> Trainer:
        recipe, steps = self.recipe, self.parts.steps
        begun = self.start.step if self.start else 0
        stop = min(steps, begun + recipe.train.stop_after) if recipe.train.stop_after else steps
        saved = recipe.checkpoint
        rhythm = Rhythm(steps, stop, recipe.train.accumulate, recipe.train.clip, saved.every, saved.keep)
        optimizer = build_optimizer(self.module, recipe.optimizer)
        trainer = Trainer(
            self.module,
            optimizer,
            build_schedule(optimizer, recipe.schedule, steps),
            self.accelerator,
            self.comm,
            rhythm,
            seed=recipe.seed,
            recipe=self.resolved.trajectory(),
            folder=self.folder.checkpoints,
            describe=self.parts.index.place,
        )
        if self.start:
            with on_all_ranks():
                trainer.resume(self.start)
        return trainer

    def _claim(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, or None; raises DistFairError where the folder belongs to something else."""
        out, resume = f"out={self.folder.path}", self.recipe.resume
        own = self.resolved.trajectory()
        newest = checkpoint.newest(self.folder.checkpoints)
        if self.folder.recipe.is_file():
            if changed := differences(read(self.folder.recipe, interventions()).trajectory(), own):
                raise DistFairError(f"{out} holds another run (then, now): {_few(changed)}: choose another out=")
        elif self.folder.occupied():
            raise DistFairError(f"{out} is not empty and no run folder (no recipe.yaml in it): choose another out=")
        if resume == "never" and newest is not None:
            raise DistFairError(f"resume=never, but {out} has {newest.name}: choose another out=, or resume=auto")
        source = newest if resume in ("auto", "never") else checkpoint.find(Path(resume))
        if source is None:
            return None
        found = checkpoint.read(source)
        if changed := differences(found.recipe, own):
            raise DistFairError(f"{source} is a checkpoint of another recipe (then, now): {_few(changed)}: to start "
                                "from its weights, set detector.init_from")  # fmt: skip
        return found

    def _reader(self, index: Index) -> Reader:
        data = self.recipe.data
        return Reader(index, data.image_size, data.bad_samples, data.max_pixels, self.recipe.seed)

    def _batches(self, first: int, last: int) -> Iterator[Batch]:
        data = self.recipe.data
        loader = training_loader(self.parts.plan, self.reader, self.comm.rank, self.comm.world, first, last,
                                 data.workers, data.augment, self.device)  # fmt: skip
        yield from self._on_device(loader)
        self._report_bad(loader, self.parts.index, "other samples of the same label and attributes took their place")

    def _test_batches(self, index: Index) -> Iterator[Batch]:
        loader = evaluation_loader(self._reader(index), self.recipe.evaluation.batch_size, self.comm.rank,
                                   self.comm.world, self.recipe.data.workers, self.device)  # fmt: skip
        yield from self._on_device(loader)
        self._report_bad(loader, index, "they were left out of the evaluation")

    def _on_device(self, loader: Loader) -> Iterator[Batch]:
        for batch in loader:
            yield batch.to(self.device).normalised(self.recipe.data.mean, self.recipe.data.std)

    def _report_bad(self, loader: Loader, index: Index, consequence: str) -> None:
        """Says, per group, how many samples could not be read: silence would bias groups. Called on every rank."""
        counts = Counter()
        for part in self.comm.objects(counts_by_group(index, loader.bad), "bad samples"):
            counts.update(part)
        if counts and self.leader:
            listed = "; ".join(f"{group}: {count}" for group, count in sorted(counts.items()))
            say(f"warning: {counts.total()} unreadable samples in {', '.join(index.folders)} ({listed}); {consequence}")

    @contextmanager
    def _observers(self, trainer: Trainer) -> Iterator[list[Observer]]:
        """What watches the training: on the leader metrics.jsonl, W&B and the console, elsewhere nothing."""
        if not self.leader:
            yield []
            return
        chosen, name = self.recipe.wandb, self.recipe.wandb.name or self.folder.path.name
        log = MetricsLog(self.folder.metrics)
        wandb = WandbLog(chosen.mode, chosen.project, name, self.resolved.values, self.folder.path, chosen.tags)
        with Progress(trainer.rhythm.stop, "train", True, self.recipe.log.every, trainer.step) as progress:

            def observe(step: int, values: Mapping[str, object]) -> None:
                log.write({"step": step, **values})
                wandb.log(values, step)
                progress.step(loss=values["loss"], lr=values["learning_rate"],
                              samples_per_second=values["samples_per_second"])  # fmt: skip
                for name, record in values.get("restructured", {}).items():
                    say(f"step {step}: {name}: {record}")

            try:
                yield [observe]
            finally:
                log.close()
                wandb.finish()


def _few(changed: list[str]) -> str:
    return "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
