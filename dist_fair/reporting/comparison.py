"""Several methods, each run with several seeds, in one table."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from dist_fair.reporting.tables import FAIRNESS, UTILITY, Results, at, markdown, shown, title


def comparison_table(
    runs: Mapping[str, Sequence[Results]], attributes: str | None = None, datasets: Sequence[str] | None = None
) -> str:
    """Several methods side by side, as Markdown: mean +- standard deviation over their runs (seeds), best in bold.

    runs: by method, what `evaluate()` gave by dataset, one mapping a seed; attributes: the attribute set of the
    fairness columns, the last one (the intersection) if not given; datasets: those to show, all if not given.
    Per cent, except Skew. The deviation is the sample's (n - 1); a number that k of n runs lack is the mean of the
    others, marked (n-k of n).
    """
    datasets = datasets or [*dict.fromkeys(name for seeds in runs.values() for run in seeds for name in run)]
    attributes = attributes or _last_attributes(runs)
    paths = {name: ("utility", *path) for name, path in UTILITY.items()}
    paths |= {name: ("fairness", attributes, name) for name in FAIRNESS}
    rows = []
    for dataset in datasets:
        values = {
            method: {name: [at(run, (dataset, *path)) for run in seeds] for name, path in paths.items()}
            for method, seeds in runs.items()
        }
        best = {name: _best(name, [row[name] for row in values.values()]) for name in paths}
        for method, row in values.items():
            cells = (_mean_cell(paths[name][-1], row[name], best[name]) for name in paths)
            rows.append([dataset, method, str(len(runs[method])), *cells])
    header = ["dataset", "method", "runs", *(f"{title(name)} {'↑' if _more(name) else '↓'}" for name in paths)]
    note = "Mean ± standard deviation over runs; per cent, except Skew (natural log). F_*, es-AUC, Skew over"
    return f"{markdown(header, rows, left=('dataset', 'method'))}\n{note} {attributes}.\n"


def _last_attributes(runs: Mapping[str, Sequence[Results]]) -> str:
    sets = [[*report["fairness"]] for seeds in runs.values() for run in seeds for report in run.values()]
    return next((names[-1] for names in sets if names), "")


def _more(name: str) -> bool:
    """Whether more of it is better."""
    return "AUC" in name or name == "ACC"


def _best(name: str, columns: Sequence[Sequence[float | None]]) -> float | None:
    means = [mean(there) for values in columns if (there := _there(values))]
    if len(means) < 2:
        return None
    return max(means) if _more(name) else min(means)


def _mean_cell(name: str, values: Sequence[float | None], best: float | None) -> str:
    there = _there(values)
    if not there:
        return "-"
    text = shown(name, mean(there))
    if best is not None and text == shown(name, best):
        text = f"**{text}**"
    spread = f" ± {shown(name, stdev(there))}" if len(there) > 1 else ""
    return text + spread + (f" ({len(there)} of {len(values)})" if len(there) < len(values) else "")


def _there(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
