"""The settings of a sweep, ranked: mean and deviation over seeds, on each evaluation set and averaged, and which of
them no other beats in both utility and fairness.

Tables print per cent, as all tables do; Parquet and CSV have the numbers in full, in the units of the reports.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from dist_fair.data.storage import replacing
from dist_fair.engine.run_folder import write_text
from dist_fair.errors import DistFairError, nearest
from dist_fair.reporting.tables import FAIRNESS, UTILITY, Results, at, markdown, shown, title

AVERAGE = "(average)"
LESS = ("EER", "F_FPR", "F_EO", "F_DP", "skew")  # of these less is better
METRICS = (*UTILITY, *FAIRNESS)
STAR = "*"


@dataclass(frozen=True)
class Entry:
    """A setting. columns: what makes it, by key. found: what its finished runs came to, one a seed. planned: runs."""

    name: str
    columns: Mapping[str, str]
    found: Sequence[Results]
    planned: int


@dataclass(frozen=True)
class Number:
    """A metric over seeds. deviation: the sample's (n - 1), None for one run. count: runs that have the metric."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """An entry on one evaluation set, or averaged over all. front: no other entry beats it (`pareto`)."""

    entry: Entry
    numbers: Mapping[str, Number | None]
    front: bool


@dataclass(frozen=True)
class Leaderboard:
    """The entries, judged by the groups of an attribute set.

    utility, fairness: metrics of the front. sort: the metric that orders the rows, best first.
    """

    entries: Sequence[Entry]
    attributes: str
    utility: str = "AUC"
    fairness: str = "F_EO"
    sort: str = "AUC"
    datasets: list[str] = field(init=False)

    def __post_init__(self):
        """Raises DistFairError for metrics that there are not."""
        for name, known in ((self.utility, UTILITY), (self.fairness, FAIRNESS), (self.sort, METRICS)):
            if name not in known:
                raise DistFairError(f"metric '{name}': {nearest(name, [*known])}")
        names = dict.fromkeys(name for entry in self.entries for run in entry.found for name in run)
        object.__setattr__(self, "datasets", [*([AVERAGE] if len(names) > 1 else []), *names])

    def rows(self, dataset: str) -> list[Row]:
        """The entries on an evaluation set or on AVERAGE, the best first, those without the metric last."""
        numbers = [
            {name: over_seeds([self._value(run, dataset, name) for run in entry.found]) for name in METRICS}
            for entry in self.entries
        ]
        front = pareto([(_good(self.utility, row), _good(self.fairness, row)) for row in numbers])
        rows = [Row(*each) for each in zip(self.entries, numbers, front, strict=True)]
        worst = float("-inf")
        return sorted(rows, key=lambda row: worst if (value := _good(self.sort, row.numbers)) is None else value,
                      reverse=True)  # fmt: skip

    def _value(self, run: Results, dataset: str, name: str) -> float | None:
        """A metric of one run; averaged, it is absent where any set lacks it."""
        path = ("utility", *UTILITY[name]) if name in UTILITY else ("fairness", self.attributes, name)
        if dataset != AVERAGE:
            return at(run, (dataset, *path))
        values = [at(report, path) for report in run.values()]
        return None if None in values else fmean(values)


def over_seeds(values: Sequence[float | None]) -> Number | None:
    """Mean and deviation of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Number(fmean(there), stdev(there) if len(there) > 1 else None, len(there))


def pareto(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Which points no other one beats: is as good in both numbers and better in one. More is better; None is never on
    the front.
    """

    def beats(one, other) -> bool:
        return one[0] >= other[0] and one[1] >= other[1] and one != other

    whole = [point for point in points if None not in point]
    return [None not in point and not any(beats(other, point) for other in whole) for point in points]


def write(board: Leaderboard, out: Path, heading: str) -> list[Path]:
    """OUT/leaderboard.md, .csv and .parquet; returns the paths. heading: the Markdown before it."""
    text = io.StringIO()
    header, rows = columns(board)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(out / "leaderboard.md", f"{heading}\n{leaderboard_markdown(board)}")
    write_text(out / "leaderboard.csv", text.getvalue())
    _write_parquet(out / "leaderboard.parquet", header, rows)
    return [out / f"leaderboard.{form}" for form in ("md", "csv", "parquet")]


def columns(board: Leaderboard) -> tuple[list[str], list[list]]:
    """The leaderboard as one table: a header, and a row for each evaluation set (and their average) and setting."""
    keys = [*dict.fromkeys(key for entry in board.entries for key in entry.columns)]
    measured = [f"{name.replace(' ', '_')}_{part}" for name in METRICS for part in ("mean", "std", "n")]
    header = ["dataset", "setting", *keys, "runs", "planned", "attributes", "on_front", *measured]
    rows = []
    for dataset in board.datasets:
        for row in board.rows(dataset):
            entry = row.entry
            numbers = [(number.mean, number.deviation, number.count) if number else (None, None, 0)
                       for number in row.numbers.values()]  # fmt: skip
            made_of = (entry.columns.get(key) for key in keys)
            rows.append([dataset, entry.name, *made_of, len(entry.found), entry.planned, board.attributes, row.front,
                         *(part for number in numbers for part in number)])  # fmt: skip
    return header, rows


def leaderboard_markdown(board: Leaderboard) -> str:
    """A Markdown table for the average and for each evaluation set, then what must be known of the numbers."""
    header = ["front", "setting", "runs", *map(_head, METRICS)]
    parts = []
    for dataset in board.datasets:
        cells = [[STAR if row.front else "", row.entry.name, _runs(row.entry),
                  *(_cell(name, number) for name, number in row.numbers.items())]
                 for row in board.rows(dataset)]  # fmt: skip
        parts.append(f"## {_called(dataset)}\n\n{markdown(header, cells, left=('front', 'setting'))}")
    return "\n".join([*parts, f"{note(board)}\n"])


def leaderboard_table(board: Leaderboard, dataset: str):
    """The same of one evaluation set, or AVERAGE, for `say`: deviations stand below the means."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("", f"{_called(dataset)}\nsetting", "runs"):
        table.add_column(name, overflow="fold")
    for name in METRICS:
        table.add_column(_head(name).replace(" ", "\n"), justify="right", no_wrap=True)
    for row in board.rows(dataset):
        cells = (_cell(name, number).replace(" ± ", "\n±") for name, number in row.numbers.items())
        table.add_row(STAR if row.front else "", *map(Text, (row.entry.name, _runs(row.entry), *cells)),
                      style="bold" if row.front else None)  # fmt: skip
    return table


def note(board: Leaderboard) -> str:
    """What must be known of the numbers."""
    return (f"Mean ± standard deviation over seeds; per cent, except Skew (natural log). F_*, es-AUC, Skew over "
            f"{board.attributes or 'no attributes'}. Best {title(board.sort)} first. {STAR} front: no other setting is "
            f"as good in mean {board.utility} and mean {title(board.fairness)} and better in one.")  # fmt: skip


def more(name: str) -> bool:
    """Whether more of a metric is better."""
    return name not in LESS


def _good(name: str, numbers: Mapping[str, Number | None]) -> float | None:
    """The mean of a metric, turned so that more is better."""
    number = numbers[name]
    return None if number is None else number.mean if more(name) else -number.mean


def _cell(name: str, number: Number | None) -> str:
    if number is None:
        return "-"
    metric = UTILITY[name][1] if name in UTILITY else name
    spread = "" if number.deviation is None else f" ± {shown(metric, number.deviation)}"
    return shown(metric, number.mean) + spread


def _head(name: str) -> str:
    return f"{title(name)} {'↑' if more(name) else '↓'}"


def _runs(entry: Entry) -> str:
    """How many runs the numbers are of; "incomplete" where some are missing."""
    there = len(entry.found)
    return str(there) if there == entry.planned else f"{there} of {entry.planned}, incomplete"


def _called(dataset: str) -> str:
    return "average over the evaluation sets" if dataset == AVERAGE else dataset


def _write_parquet(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {"runs": pyarrow.int64(), "planned": pyarrow.int64(), "on_front": pyarrow.bool_()}
    arrays = {}
    for name, values in zip(header, zip(*rows, strict=True) if rows else [()] * len(header), strict=True):
        measured = {"_mean": pyarrow.float64(), "_std": pyarrow.float64(), "_n": pyarrow.int64()}
        ending = next((kind for end, kind in measured.items() if name.endswith(end)), pyarrow.string())
        arrays[name] = pyarrow.array(values, kinds.get(name, ending))
    try:
        with replacing(path) as file:
            parquet.write_table(pyarrow.table(arrays), file)
    except OSError as error:
        raise DistFairError(f"{path} cannot be written: {error.strerror or error}") from error
