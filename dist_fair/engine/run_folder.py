"""The folder a run leaves behind: recipe.yaml, metrics.jsonl, checkpoints/, evaluation.json, predictions/, figures/."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dist_fair.engine import run_lock
from dist_fair.errors import DistFairError
from dist_fair.recipe.resolved import Resolved, differences


class RunFolder:
    """Paths and files of one run. Only rank 0 writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """Where step-N folders lie."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """Metrics per data set."""
        return self.path / "evaluation.json"

    def predictions(self, dataset: str) -> Path:
        """Scores of one data set."""
        return self.path / "predictions" / f"{dataset}.parquet"

    @property
    def figures(self) -> Path:
        """Pictures of the evaluation."""
        return self.path / "figures"

    def reports(self) -> dict[str, dict]:
        """What evaluation.json says, by data set; {} where there is none. Raises DistFairError for a damaged one."""
        if not self.evaluation.is_file():
            return {}
        try:
            reports = json.loads(self.evaluation.read_text())
            if not all(isinstance(report, dict) and "samples" in report for report in reports.values()):
                raise ValueError("not the reports of an evaluation")
        except (OSError, ValueError, AttributeError) as error:
            raise DistFairError(f"{self.evaluation} cannot be read ({error}): remove it and evaluate again") from None
        return reports

    def refuse_mixture(self, source: Mapping[str, str], datasets: Collection[str]) -> None:
        """Raises DistFairError if numbers that would stay beside those of `datasets` are not from the same `source`.

        source: as for `engine.evaluation.evaluate_all`.
        """
        for name, report in self.reports().items():
            if name not in datasets and any(report.get(key) != value for key, value in source.items()):
                held = f"{report.get('checkpoint')} of recipe {report.get('recipe')}"
                raise DistFairError(
                    f"{self.evaluation} has numbers of {held} on {name}, and these would be of {source['checkpoint']} "
                    f"of recipe {source['recipe']}: choose another --out, or evaluate {name} too (data.eval=[...])"
                )

    def begin(self, recipe_yaml: str) -> None:
        """Makes the folder and stores the recipe. The caller has checked that the folder may be used."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DistFairError(f"{self.checkpoints} cannot be made ({error.strerror}): choose another out=") from None
        write_text(self.recipe, recipe_yaml)

    def rewind(self, step: int) -> None:
        """Drops the lines of metrics.jsonl from `step` on: a resumed run writes them again."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] >= step:
                    break
            except ValueError:  # the last line of a killed run
                break
            kept.append(line)
        write_text(self.metrics, "".join(kept))

    def refuse_file(self) -> None:
        """Raises DistFairError if a file lies where the folder should."""
        if self.path.exists() and not self.path.is_dir():
            raise DistFairError(f"{self.path} is a file: results need a folder, choose another one")

    def refuse_other_recipe(self, asked: Resolved, interventions: Mapping[str, type], place: str, fix: str) -> None:
        """Raises DistFairError if the folder holds anything but a run of the recipe `asked`, finished or not.

        interventions: as for `recipe.composition.read`. place, fix: what the folder is called in the error, and what
        whoever asked can do.
        """
        from dist_fair.recipe.composition import read  # here, so that what only looks for files starts without Hydra

        self.refuse_file()
        if self.recipe.is_file():
            if changed := differences(read(self.recipe, interventions).trajectory(), asked.trajectory()):
                raise DistFairError(f"{place} holds another run (then, now): {few(changed)}: {fix}")
        elif self.occupied():
            raise DistFairError(f"{place} is not empty and no run folder (no recipe.yaml in it): {fix}")

    def refuse_other_run(self, run: Path) -> None:
        """Raises DistFairError if the results of the run in folder `run` would go to the folder of another one."""
        self.refuse_file()
        if self.recipe.is_file() and not self.path.samefile(run):
            raise DistFairError(f"--out={self.path} is the folder of another run: choose another one")

    def occupied(self) -> bool:
        """True if something other than a fresh run's files lies here."""
        return self.path.is_dir() and any(path.name != run_lock.NAME for path in self.path.iterdir())


class MetricsLog:
    """Appends to metrics.jsonl, a line a step, flushed at once so that `tail -f` and a crash both see it."""

    def __init__(self, path: Path):
        self._file = path.open("a", buffering=1)

    def write(self, values: Mapping[str, object]) -> None:
        """One step. Values are JSON: numbers, strings, null."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")

    def close(self) -> None:
        """Flushes to disk and closes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def few(changed: Sequence[str]) -> str:
    """The first of what `differences` found, and how many more there are."""
    return "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")


def write_text(path: Path, text: str) -> None:
    """Writes a text file aside, fsyncs, renames: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DistFairError(f"{path} could not be written: {error}") from None
