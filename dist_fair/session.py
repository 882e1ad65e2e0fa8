"""A trained or trainable recipe on all its ranks: what training and evaluation have in common.

The entry points are thin over this and dist_fair.training; the engine below knows neither terminal nor W&B.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.data.loading import Loader, evaluation_loader
from dist_fair.data.prefetching import prefetched
from dist_fair.data.reading import Reader, counts_by_group
from dist_fair.data.staging import Staging
from dist_fair.engine import checkpoint
from dist_fair.engine.assembly import assemble, evaluation_indexes, on_device, prepare_demo, vocabulary
from dist_fair.engine.device.numerics import set_numerics
from dist_fair.engine.evaluation import evaluate_all
from dist_fair.engine.invocation import Invocation
from dist_fair.engine.launch import accelerator
from dist_fair.engine.reconstructions import reconstructions
from dist_fair.engine.run_folder import RunFolder
from dist_fair.errors import on_all_ranks
from dist_fair.recipe.resolved import Resolved
from dist_fair.reporting import gallery
from dist_fair.reporting.progress import Progress, say
from dist_fair.reporting.side_by_side import write_up
from dist_fair.reporting.tables import evaluation_table


def origin(resolved: Resolved, source: str) -> dict[str, str]:
    """Whose numbers evaluation.json has: the checkpoint's name, and the fingerprint of what is trained and judged."""
    return {"checkpoint": source, "recipe": resolved.fingerprint()[:12]}


class Session:
    """Detector, interventions and data of a recipe on this rank. Making one checks them and writes nothing.

    invocation: the start of the program that this is a part of.
    """

    def __init__(self, resolved: Resolved, folder: RunFolder, invocation: Invocation | None = None):
        self.resolved, self.recipe, self.folder = resolved, resolved.recipe, folder
        self.invocation = invocation or Invocation()
        with on_all_ranks():
            self.accelerator = accelerator()
        self.comm, self.device = Communicator(), self.accelerator.device
        set_numerics(self.device, self.recipe.train.tf32, self.recipe.train.deterministic)
        self.invocation.connect(self.comm)
        prepare_demo(self.recipe.data, self.comm)
        with on_all_ranks():
            self.parts = assemble(self.recipe, self.comm)
            self.module = on_device(self.parts.module, self.device, self.recipe)

    @property
    def leader(self) -> bool:
        """True on the rank that writes and speaks."""
        return self.comm.rank == 0

    def load(self, source: Path) -> None:
        """Takes the weights of a checkpoint."""
        with on_all_ranks():
            checkpoint.load_model(self.module, checkpoint.read(source, ("model",)).tensors("model"), source)

    def tests(self) -> dict[str, Index]:
        """The evaluation sets of the recipe by name, checked."""
        with on_all_ranks():
            indexes = evaluation_indexes(self.recipe.data, vocabulary(self.parts.index))
            for index in indexes.values():
                self._reader(index).check()
        return indexes

    def staged(self, indexes: Sequence[Index], rows: Sequence[np.ndarray | None] | None = None) -> list[Index]:
        """The indexes, to be read from each node's local disk if data.stage_to says so: see `Staging`. On every rank.

        Raises Preempted, on every rank, where it was asked to stop: whole shards stay for the next start.
        """
        if self.recipe.data.stage_to is None:
            return [*indexes]
        self.comm.place = "staging"
        staging = Staging(self.recipe.data.stage_to, indexes, self.comm, rows)
        shown = self.leader and staging.megabytes > 0
        with Progress(staging.megabytes, "stage", shown, every=10, unit="MB") as progress:

            def report(megabytes: int, **nodes: int) -> None:
                progress.step(megabytes, **nodes)
                self.invocation.preemption.check(self.comm)

            return staging.run(report)

    def evaluate(self, tests: Mapping[str, Index], source: str) -> dict[str, dict]:
        """Scores and judges data sets, writes what a run leaves behind, prints the table; reports on the leader.

        source: the name of the checkpoint whose weights these are. Raises Preempted, on every rank, where it was asked
        to stop: evaluation.json is as it was.
        """
        self._hold("evaluated")
        self.comm.place = "evaluation"
        total, bootstrap = sum(len(index) for index in tests.values()), self.recipe.evaluation.bootstrap
        with Progress(total, "evaluate", self.leader, self.recipe.log.every, unit="samples") as progress:
            reports = evaluate_all(self.module, tests, self._test_batches, self.folder, bootstrap=bootstrap,
                                   seed=self.recipe.seed, source=origin(self.resolved, source),
                                   observe=progress.step)  # fmt: skip
        if self.leader and reports:
            say(evaluation_table(reports))
            self._write_up(tests)
        return reports

    def _hold(self, doing: str) -> None:
        """Keeps other jobs out of the run folder. Raises DistFairError, on every rank, where one is at work in it."""
        if warning := self.invocation.hold(self.folder.path, doing, self.comm):
            say(f"warning: {warning}")

    def _write_up(self, tests: Mapping[str, Index]) -> None:
        """Tables and figures. The numbers are on disk by now: a failure here must not end the run."""
        where = f"evaluation.json and predictions/ lie in {self.folder.path.resolve()}"
        drawn = [*tests] if self.recipe.evaluation.figures else []
        try:
            write_up(self.folder.path, drawn)
            for name in drawn:
                faces = reconstructions(self.module, self._reader(tests[name]), self.recipe.data.mean,
                                        self.recipe.data.std)  # fmt: skip
                if faces is not None:
                    gallery.draw(*faces, name, self.folder.figures)
            say(f"evaluation.md, {'figures/, ' if drawn else ''}{where}")
        except Exception as error:
            say(f"warning: no tables and figures ({type(error).__name__}: {error}); {where}")

    def _reader(self, index: Index) -> Reader:
        data = self.recipe.data
        return Reader(index, data.image_size, data.bad_samples, data.max_pixels, self.recipe.seed)

    def _test_batches(self, index: Index) -> Iterator[Batch]:
        loader = evaluation_loader(self._reader(index), self.recipe.evaluation.batch_size, self.comm.rank,
                                   self.comm.world, self.recipe.data.workers, self.device)  # fmt: skip
        yield from self.invocation.preemption.between(self._on_device(loader), self.comm)
        self._report_bad(loader, index, "they were left out of the evaluation")

    def _on_device(self, loader: Loader) -> Iterator[Batch]:
        return prefetched(loader.packed(), self.device, self.recipe.data.mean, self.recipe.data.std)

    def _report_bad(self, loader: Loader, index: Index, consequence: str) -> None:
        """Says, per group, how many samples could not be read: silence would bias groups. Called on every rank."""
        counts = Counter()
        for part in self.comm.objects(counts_by_group(index, loader.bad), "bad samples"):
            counts.update(part)
        if counts and self.leader:
            where = ", ".join(index.folders)
            listed = "; ".join(f"{group}: {count}" for group, count in sorted(counts.items()))
            say(f"warning: {counts.total()} reads of bad samples in {where} ({listed}); {consequence}")
