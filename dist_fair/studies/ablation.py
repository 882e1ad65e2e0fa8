"""Ablations: which interventions of a recipe each row keeps, and what the rows came to.

    keep: [cross_entropy]                  # in every row; this is the default
    rows:
      plain: []                            # NAME: the interventions that the row keeps besides
      aligned: [distribution_alignment]
      aligned weakly:                      # or with settings of its own
        keep: [distribution_alignment]
        overrides: [interventions.distribution_alignment.weight=0.001]
      whole: all

Such tables lie in recipes/ablation/RECIPE.yaml. A recipe without one gets a row for each intervention left out.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_fair.engine.run_folder import write_text
from dist_fair.errors import DistFairError, nearest
from dist_fair.recipe import cards
from dist_fair.recipe.resolved import inline
from dist_fair.reporting.comparison import comparison_table
from dist_fair.reporting.progress import say
from dist_fair.reporting.tables import Results, evaluation_csv, markdown
from dist_fair.studies.runs import Run, results

FOLDER = "recipes/ablation"
KEEP = ("cross_entropy",)
OWN = {"seed": "--seeds 0 1 2", "out": "--out FOLDER"}  # what the runs of a study differ in


@dataclass(frozen=True)
class Row:
    """One row. kept, left_out: interventions, in the recipe's order; overrides: further arguments of its runs."""

    name: str
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    overrides: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name as a part of a folder name: "L_attr + L_ortho" becomes "l_attr_l_ortho"."""
        return re.sub(r"\W+", "_", self.name.lower()).strip("_")

    @property
    def arguments(self) -> list[str]:
        """What makes the recipe this row's."""
        return [*(f"~interventions.{name}" for name in self.left_out), *self.overrides]


def rows_of(table: str | None, recipe: str, interventions: Sequence[str]) -> list[Row]:
    """The rows of an ablation.

    table: name of a shipped table or path of a file; None: the shipped one of `recipe` (as on the command line:
    recipe=NAME) or, if it has none, leave-one-out. interventions: those of the recipe, in its order.
    """
    if table is None:
        table = recipe if recipe in tables() else None
    if table is None:
        return leave_one_out(interventions)
    if "/" in table or table.endswith((".yaml", ".yml")):
        return read_table(Path(table), table, interventions)
    if table not in tables():
        raise DistFairError(f"--table {table}: no such table: {nearest(table, tables())} (your own: path/to/file.yaml)")
    return read_table(cards.shipped(FOLDER) / f"{table}.yaml", f"{FOLDER}/{table}.yaml", interventions)


def tables() -> list[str]:
    """Names of the shipped tables."""
    return sorted(path.stem for path in cards.shipped(FOLDER).glob("*.yaml"))


def leave_one_out(interventions: Sequence[str]) -> list[Row]:
    """Plain cross-entropy, the recipe without each other intervention, and the whole recipe."""
    others = [name for name in interventions if name not in KEEP]
    if not others or len(others) == len(interventions):
        raise DistFairError(f"interventions {list(interventions)}: an ablation leaves out one beside {KEEP[0]}, and "
                            "keeps that: choose another recipe, or name rows with --table FILE")  # fmt: skip
    single = others if len(others) > 1 else []  # without the only one there is the plain row
    rows = [_row(f"without {name}", {*interventions} - {name}, interventions) for name in single]
    return [_row("plain", {*KEEP}, interventions), *rows, _row("whole", {*interventions}, interventions)]


def read_table(path: Path, source: str, interventions: Sequence[str]) -> list[Row]:
    """The rows of a file. Raises DistFairError, naming `source`, for all that the grammar above does not have."""
    content = cards.read_yaml(path, source)
    _only(content, ("keep", "rows"), source)
    keep = _names(content.get("keep", list(KEEP)), f"{source}: keep", interventions)
    listed = content.get("rows")
    if not isinstance(listed, dict) or not listed:
        raise DistFairError(f"{source}: rows={inline(listed)}: expected NAME: [INTERVENTION, ...] for each row")
    rows: list[Row] = []
    for name, value in listed.items():
        place = f"{source}: rows.{name}"
        if not isinstance(value, dict):
            value = {"keep": value}
        _only(value, ("keep", "overrides"), place)
        kept = interventions if value.get("keep") == "all" else _names(value.get("keep"), place, interventions)
        row = _row(str(name), {*keep, *kept}, interventions, _overrides(value.get("overrides", []), place))
        if not row.slug:
            raise DistFairError(f"{place}: a name with letters or digits, for the folders of its runs")
        for other in rows:
            if other.slug == row.slug:
                raise DistFairError(
                    f"{place} and rows.{other.name} would share the folders {row.slug}-SEED: rename one"
                )
            if other.arguments == row.arguments:
                raise DistFairError(f"{place} is the same as rows.{other.name}: remove one")
        rows.append(row)
    return rows


def _row(name: str, kept: set[str], interventions: Sequence[str], overrides: Iterable[str] = ()) -> Row:
    return Row(name, tuple(part for part in interventions if part in kept),
               tuple(part for part in interventions if part not in kept), tuple(overrides))  # fmt: skip


def _only(content: Mapping, known: Sequence[str], place: str) -> None:
    for name in content:
        if name not in known:
            raise DistFairError(f"{place}: unknown key {name}: {nearest(str(name), [*known])}")


def _names(value: Any, place: str, interventions: Sequence[str]) -> list[str]:
    """A list of interventions of the recipe, each once."""
    if not isinstance(value, list):
        raise DistFairError(f"{place}={inline(value)}: expected [INTERVENTION, ...] or, for a row, all")
    for name in value:
        if name not in interventions:
            raise DistFairError(f"{place}: the recipe has no intervention '{name}': "
                                f"{nearest(str(name), [*interventions])}")  # fmt: skip
        if value.count(name) > 1:
            raise DistFairError(f"{place}: '{name}' is listed twice")
    return value


def _overrides(value: Any, place: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DistFairError(f"{place}: overrides={inline(value)}: expected [key=value, ...]")
    for text in value:
        if (key := text.partition("=")[0].lstrip("+~")) in ("recipe", *OWN):
            raise DistFairError(f"{place}: overrides: {text}: {key} is the same for all rows; leave it to the command "
                                "line")  # fmt: skip
    return value


def refuse_own(overrides: Sequence[str]) -> None:
    """Raises DistFairError for settings on the command line that a study makes itself."""
    for text in overrides:
        if (key := text.partition("=")[0].lstrip("+~")) in OWN:
            raise DistFairError(f"{text}: each run has its own; use {OWN[key]}")


def write(
    out: Path, title: str, command: str, rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], seeds: Sequence[int]
) -> None:
    """Reads the finished runs, prints the tables and writes OUT/ablation.md and ablation.csv; the runs of the first
    seed go into OUT/side_by_side, with figures.

    runs: by row, one a seed.
    """
    from dist_fair.reporting.side_by_side import side_by_side

    found = {name: [results(run) for run in same] for name, same in runs.items()}
    device = "GPU" if torch.cuda.is_available() else "CPU"
    text = report(f"{title}, seeds {', '.join(map(str, seeds))}", f"`{command}` (torch {torch.__version__}, {device})",
                  rows, found)  # fmt: skip
    write_text(out / "ablation.md", text)
    write_text(out / "ablation.csv", numbers_csv(found, seeds))
    say(text)
    figures = side_by_side({name: same[0].folder for name, same in runs.items()}, out / "side_by_side")
    say("\n".join(map(str, [out / "ablation.md", out / "ablation.csv", *figures])))


def report(title: str, command: str, rows: Sequence[Row], found: Mapping[str, Sequence[Results]]) -> str:
    """The ablation as Markdown: what was run, the rows, and a table for each attribute set.

    found: by row, the results of its runs.
    """
    header = ["row", "interventions", "overrides"]
    listed = [[row.name, ", ".join(row.kept), " ".join(row.overrides) or "-"] for row in rows]
    parts = [f"# {title}\n\n{command}\n", markdown(header, listed, left=header)]
    reports = [one for run in found.values() for same in run for one in same.values()]
    for name in dict.fromkeys(name for one in reports for name in one["fairness"]):
        parts.append(f"## Fairness over {name}\n\n{comparison_table(found, name)}")
    return "\n".join(parts)


def numbers_csv(found: Mapping[str, Sequence[Results]], seeds: Sequence[int]) -> str:
    """`evaluation_csv` of all runs, with row and seed in front of each line."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for name, runs in found.items():
        for seed, run in zip(seeds, runs, strict=True):
            header, *lines = csv.reader(io.StringIO(evaluation_csv(run)))
            if not file.tell():
                writer.writerow(["row", "seed", *header])
            writer.writerows([name, seed, *line] for line in lines)
    return file.getvalue()
