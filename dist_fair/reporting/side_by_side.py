"""What is written up of evaluated runs, from their folders alone: one by itself, or several side by side."""

import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path

from dist_fair.engine.run_folder import RunFolder, write_text
from dist_fair.errors import DistFairError
from dist_fair.reporting.comparison import comparison_table
from dist_fair.reporting.figures import draw
from dist_fair.reporting.judged import check_same_samples, read
from dist_fair.reporting.tables import Results, evaluation_csv, evaluation_markdown, footnotes, group_markdown


def write_up(run: Path, datasets: Collection[str] | None = None) -> list[Path]:
    """Tables and figures of an evaluated run, into its own folder; returns the paths written.

    evaluation.md and evaluation.csv have every dataset of evaluation.json; figures/DATASET-{radar,scores,roc} are
    drawn for `datasets`, all if not given, none if empty. Raises DistFairError where a file is missing or does not fit.
    """
    folder = RunFolder(run)
    results = folder.reports()
    judged = read(folder.path, datasets) if datasets is None or datasets else {}
    text = f"{_sources(results)}\n{evaluation_markdown(results)}\n{group_markdown(results)}"
    written = [_written(folder.path / "evaluation.md", text)]
    written.append(_written(folder.path / "evaluation.csv", evaluation_csv(results)))
    for dataset, one in judged.items():
        written += draw({folder.path.resolve().name: one}, dataset, folder.figures)
    return written


def side_by_side(runs: Mapping[str, Path], out: Path) -> list[Path]:
    """Tables and figures that compare evaluated runs, into `out`; returns the paths written.

    runs: run folders (evaluation.json, predictions/) by the name that legends and tables give them. Compared are the
    datasets that all of them judged: comparison.md, comparison.csv, figures/DATASET-{radar,scores,roc}.
    Raises DistFairError where a run was not evaluated, no dataset is shared, the runs judged other samples of one, or
    `out` is the folder of a run.
    """
    check_out(out)
    judged = {name: read(Path(folder)) for name, folder in runs.items()}
    first = next(iter(judged.values()))
    shared = [dataset for dataset in first if all(dataset in of_run for of_run in judged.values())]
    if not shared:
        there = "; ".join(f"{name}: {', '.join(of_run)}" for name, of_run in judged.items())
        raise DistFairError(f"no dataset was judged by all runs ({there}): evaluate them on the same (data.eval=[...])")
    for dataset in shared:
        check_same_samples({name: of_run[dataset] for name, of_run in judged.items()}, dataset)
    results = {name: {dataset: of_run[dataset].report for dataset in shared} for name, of_run in judged.items()}
    written = [_written(out / "comparison.md", _comparison(results))]
    written.append(_written(out / "comparison.csv", _comparison_csv(results)))
    for dataset in shared:
        written += draw({name: of_run[dataset] for name, of_run in judged.items()}, dataset, out / "figures")
    return written


def check_out(out: Path) -> None:
    """Raises DistFairError where a comparison cannot be written: in a run's folder, or where a file is."""
    folder = RunFolder(out)
    folder.refuse_file()
    if folder.recipe.is_file() or folder.evaluation.is_file():
        raise DistFairError(f"{out} is the folder of a run: a comparison needs another one")


def names_of(folders: Collection[Path]) -> dict[str, Path]:
    """The folders by a name for each: its last part, with as many of those above it as tell them all apart.

    Raises DistFairError for a folder that is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    for folder in whole:
        if whole.count(folder) > 1:
            raise DistFairError(f"{folder} is given twice: to compare checkpoints of one run, evaluate each with an "
                                "--out of its own, then those folders with --from-predictions")  # fmt: skip
    depth = next(n for n in range(1, 1000) if len({folder.parts[-n:] for folder in whole}) == len(whole))
    return {"/".join(folder.parts[-depth:]): folder for folder in whole}


def _sources(results: Results) -> str:
    """Whose numbers these are, a line for each checkpoint."""
    lines = {}
    for dataset, report in results.items():
        lines.setdefault((report.get("checkpoint", "?"), report.get("recipe", "?")), []).append(dataset)
    return "".join(f"{checkpoint} of recipe {recipe}: {', '.join(datasets)}\n"
                   for (checkpoint, recipe), datasets in lines.items())  # fmt: skip


def _comparison(results: Mapping[str, Results]) -> str:
    """The runs over each attribute set, then what must be known of the numbers, said once of all runs."""
    sets = dict.fromkeys(name for run in results.values() for report in run.values() for name in report["fairness"])
    runs = {name: [run] for name, run in results.items()}
    parts = [f"## Fairness over {name}\n\n{comparison_table(runs, name)}" for name in sets]
    notes = {}
    for name, run in results.items():
        plain = {dataset: {**report, "intervals": None} for dataset, report in run.items()}
        for note in footnotes(plain)[1:]:  # the first one says what `comparison_table` says
            notes.setdefault(note, []).append(name)
    told = (note if len(names) == len(runs) else f"{', '.join(names)}: {note}" for note, names in notes.items())
    return "\n".join([*(parts or [comparison_table(runs)]), *(f"{line}\n" for line in told)])


def _comparison_csv(results: Mapping[str, Results]) -> str:
    """`evaluation_csv` of every run, below each other, the run in front."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for number, (name, run) in enumerate(results.items()):
        header, *rows = csv.reader(io.StringIO(evaluation_csv(run)))
        writer.writerows([["run", *header]] * (number == 0) + [[name, *row] for row in rows])
    return file.getvalue()


def _written(path: Path, text: str) -> Path:
    write_text(path, text)
    return path
