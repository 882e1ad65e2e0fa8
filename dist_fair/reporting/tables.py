"""Evaluation reports as tables: on the screen, as Markdown and as CSV. Everything here prints what `evaluate` found.

Tables print per cent, as the papers do, except Skew (natural logarithm); "-" is a number that is absent, and the
footnotes say for which groups. CSV has the numbers in full, in the units of the report.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

UTILITY = {
    "AUC": ("frame", "AUC"),
    "video AUC": ("video", "AUC"),
    "EER": ("frame", "EER"),
    "ACC": ("frame", "ACC"),
}
FAIRNESS = ("F_FPR", "F_EO", "F_DP", "es-AUC", "skew")
GROUP_COLUMNS = ("n", "n_real", "n_fake", "AUC", "FPR", "TPR", "ACC", "PR")
COUNTS = ("n", "n_real", "n_fake")
TITLES = {"skew": "Skew", "n_real": "real", "n_fake": "fake"}

Results = Mapping[str, Mapping]


def evaluation_table(results: Results) -> "EvaluationTable":
    """The headline of every dataset, for `say`: utility, fairness per attribute set, intervals, footnotes.

    results: `evaluate()` by dataset. Under each number stands its 95 % interval, on screens of 96 columns or more.
    """
    return EvaluationTable(results)


@dataclass(frozen=True)
class EvaluationTable:
    """A table that rich draws to the width of the screen."""

    results: Results

    def __rich_console__(self, console, options):
        from rich.text import Text

        results = self.results
        if options.max_width < 96:
            results = {dataset: {**report, "intervals": None} for dataset, report in results.items()}
        yield _headline(results)
        yield ""
        for note in footnotes(results):
            yield Text(note, style="dim")


def group_table(results: Results):
    """Counts and rates of every group of every dataset, for `console().print`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    header, *rows = _group_rows(results)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < 3 else "right", no_wrap=place != 1)
    previous = ("", "")
    for row in rows:
        if row[0] != previous[0]:
            table.add_section()
        same = [row[0] == previous[0], tuple(row[:2]) == previous]
        table.add_row(*("" if hidden else text for hidden, text in zip(same, row[:2], strict=True)), *row[2:])
        previous = (row[0], row[1])
    return table


def evaluation_markdown(results: Results) -> str:
    """`evaluation_table` for a file: a Markdown table, a row per dataset and attribute set, then the footnotes."""
    header = ["dataset", *UTILITY, "groups", *(title(name) for name in FAIRNESS)]
    rows = []
    for dataset, report in results.items():
        utility = [_utility_cell(report, name).replace("\n", "<br>") for name in UTILITY]
        for attributes, fairness in (report["fairness"] or {"-": {}}).items():
            numbers = (_fairness_cell(report, attributes, fairness, name) for name in FAIRNESS)
            rows.append([dataset, *utility, attributes, *(number.replace("\n", "<br>") for number in numbers)])
    notes = "".join(f"\n{note}\n" for note in footnotes(results))
    return markdown(header, rows, left=("dataset", "groups")) + notes


def group_markdown(results: Results) -> str:
    """`group_table` for a file, as a Markdown table."""
    header, *rows = _group_rows(results)
    return markdown(header, rows, left=header[:3])


def evaluation_csv(results: Results) -> str:
    """One line a number: dataset, part, attributes, group, metric, value, low, high; absent is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("dataset", "part", "attributes", "group", "metric", "value", "low", "high"))
    for dataset, report in results.items():
        for part, attributes, group, metric, path in _numbers(report):
            bounds = at(report["intervals"] or {}, path) or (None, None)
            writer.writerow((dataset, part, attributes, group, metric, at(report, path), *bounds))
    return file.getvalue()


def footnotes(results: Results) -> list[str]:
    """Units, intervals, and, by name, every group that lacks a rate, and how many samples are in no group."""
    notes = ["Per cent, except Skew (natural log). AUC, ACC, es-AUC: more is better; EER, F_*, Skew: less is better."]
    draws = {(interval["replicates"], interval["unit"]) for interval in _intervals(results)}
    for count, unit in sorted(draws):
        notes.append(
            f"Below a number: its 95 % interval from {count} bootstrap draws of {unit}s. F_* and Skew cannot be "
            "below 0 and chance only adds to them, so their interval may lie above the number."
        )
    for dataset, report in results.items():
        if report.get("unreadable"):
            notes.append(f"{dataset}: {report['unreadable']:,} unreadable samples left out.")
        notes += [
            f"{dataset}: no {', '.join(numbers['absent'])} per {level}, for lack of a class."
            for level, numbers in report["utility"].items()
            if numbers["absent"]
        ]
        for attributes, fairness in report["fairness"].items():
            lacking = [*_lacking(fairness)]
            notes += [f"{dataset}, {attributes}: {'; '.join(lacking)}."] if lacking else []
    return notes


def _headline(results: Results):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
    table.add_column("dataset\nframes/videos", no_wrap=True)
    for name in UTILITY:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("groups", no_wrap=True)
    for name in FAIRNESS:
        table.add_column(title(name), justify="right", no_wrap=True)
    for dataset, report in results.items():
        for row, (attributes, fairness) in enumerate((report["fairness"] or {"-": {}}).items()):
            first = [_dataset_cell(dataset, report), *(_utility_cell(report, name) for name in UTILITY)]
            cells = first if row == 0 else [""] * len(first)
            numbers = (_fairness_cell(report, attributes, fairness, name) for name in FAIRNESS)
            table.add_row(*map(_styled, cells), attributes.replace(" x ", "\nx "), *map(_styled, numbers))
        table.add_section()
    return table


def _lacking(fairness: Mapping) -> Iterator[str]:
    """What the report of an attribute set had to leave out, in words."""
    groups = fairness["groups"].items()
    empty = [name for name, group in groups if not group["n"]]
    if empty:
        yield f"no samples of {', '.join(empty)}"
    for word, rate in (("real", "FPR"), ("fake", "TPR")):
        without = [name for name, group in groups if group["n"] and not group[f"n_{word}"]]
        if without:
            yield f"no {word} samples, so no AUC and {rate}, of {', '.join(without)}"
        there = [name for name, group in groups if group[f"n_{word}"]]
        if there and all(fairness["skew_cells"][word][name] is None for name in there):
            yield f"no sample is called {word}, so no Skew of the {word}"
    if fairness["unknown"]:
        yield f"{fairness['unknown']:,} samples of unknown group, counted in the totals only"


def _intervals(results: Results) -> list[Mapping]:
    return [report["intervals"] for report in results.values() if report["intervals"]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A Markdown table with columns padded to equal width, right-aligned but for those in `left`."""
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    sides = [name in left for name in header]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, widths, sides, strict=True)
        padded = (cell.ljust(width) if side else cell.rjust(width) for cell, width, side in columns)
        return f"| {' | '.join(padded)} |"

    rule = ("-" * width if side else "-" * (width - 1) + ":" for width, side in zip(widths, sides, strict=True))
    return "\n".join((line(header), f"| {' | '.join(rule)} |", *map(line, rows))) + "\n"


def shown(name: str, value: float | None) -> str:
    """A number as tables print it: fractions and F_* in per cent with one digit, Skew with two; "-" if absent."""
    if value is None:
        return "-"
    if name.startswith("skew"):
        return f"{value:.2f}"
    return f"{_per_cent(name, value):.1f}"


def _bound(name: str, value: float) -> str:
    """A bound of an interval: as short as its place can bear."""
    if name.startswith("skew"):
        return f"{value:.2f}".removeprefix("0")
    value = _per_cent(name, value)
    return f"{value:.0f}" if value >= (99.95 if name == "AUC" else 9.95) else f"{value:.1f}"


def _per_cent(name: str, value: float) -> float:
    return value if name.startswith("F_") else 100 * value


def title(name: str) -> str:
    """The column head of a number: its name, or what people call it."""
    return TITLES.get(name, name)


def _dataset_cell(dataset: str, report: Mapping) -> str:
    return f"{dataset}\n{report['samples']:,}/{report['videos']:,}"


def _utility_cell(report: Mapping, name: str) -> str:
    path = ("utility", *UTILITY[name])
    return _cell(UTILITY[name][1], at(report, path), at(report["intervals"] or {}, path))


def _fairness_cell(report: Mapping, attributes: str, fairness: Mapping, name: str) -> str:
    return _cell(name, fairness.get(name), at(report["intervals"] or {}, ("fairness", attributes, name)))


def _cell(name: str, value: float | None, bounds: Sequence[float] | None) -> str:
    """The number and, on a line below, its interval."""
    return shown(name, value) + (f"\n{_bound(name, bounds[0])}-{_bound(name, bounds[1])}" if bounds else "")


def _styled(cell: str):
    from rich.text import Text

    value, _, below = cell.partition("\n")
    return Text.assemble(value, ("\n" + below, "dim")) if below else Text(value)


def _group_rows(results: Results) -> list[list[str]]:
    rows = [["dataset", "attributes", "group", *map(title, GROUP_COLUMNS)]]
    for dataset, report in results.items():
        for attributes, fairness in report["fairness"].items():
            for group, numbers in fairness["groups"].items():
                cells = (f"{numbers[n]:,}" if n in COUNTS else shown(n, numbers[n]) for n in GROUP_COLUMNS)
                rows.append([dataset, attributes, group, *cells])
    return rows


def _numbers(report: Mapping) -> Iterator[tuple]:
    """(part, attributes, group, metric, path) of every number of a report."""
    for level, numbers in report["utility"].items():
        for metric in numbers:
            if metric != "absent":
                yield level, "", "", metric, ("utility", level, metric)
    for attributes, fairness in report["fairness"].items():
        for metric, value in fairness.items():
            if not isinstance(value, dict):
                yield "fairness", attributes, "", metric, ("fairness", attributes, metric)
        for group, numbers in fairness["groups"].items():
            for metric in numbers:
                yield "group", attributes, group, metric, ("fairness", attributes, "groups", group, metric)


def at(report: Mapping, path: Sequence[str]):
    """What is at a path of keys, or None."""
    for key in path:
        report = report.get(key) if report else None
    return report
