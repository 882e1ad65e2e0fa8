"""The ACE study as people read it: sentences, tables on the screen, as Markdown and CSV, and the bootstrap drawn.

Tables print AUC and mu_0 in per cent, and ACE and differences of AUC in percentage points; Skew is a natural
logarithm. JSON and CSV have fractions, in full.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_fair.engine.run_folder import write_text
from dist_fair.reporting.style import BLACK, COLOURS, GREY, figure, save, styled
from dist_fair.reporting.tables import markdown

HEADLINE = ("dataset", "ACE", "95 % interval", "p", "p smoothed", "mu_0", "ACE by capacity", "Skew, F=0 → F=1")
CELLS = ("capacity", "stratum", "n", "AUC F=0", "AUC F=1", "difference", "95 % interval", "P")
CSV = ("n", "n_real", "n_fake", "P", "AUC_0", "AUC_1", "difference")
DEFINITIONS = (
    "ACE = sum over strata dd and capacities mc of (AUC at F=1 - AUC at F=0) P(dd, mc), in percentage points of AUC; "
    "P(dd, mc) = n_dd / n / number of capacities; mu_0 is the AUC at F=0, weighted alike, in per cent; Skew is the "
    "largest |Skew| over the strata (natural logarithm).",
    "p: two-sided, 2 k / B for the k of B replicates on the rarer side of zero (unsmoothed, as in the paper); "
    "smoothed: 2 (k + 1) / (B + 1).",
)
SEEDS = (
    "Intervals say how much other held-out samples would move a number, not how much other training seeds would: "
    "repeat the study with other seeds before believing it."
)

Report = Mapping  # what `average_causal_effect` returns
Results = Mapping[str, Report]  # by dataset


def write(out: Path, runs: Mapping[tuple[str, int], Path], results: Results) -> None:
    """ace.json, ace.md, ace.csv and ace-DATASET.png and .svg in the folder `out`, each whole or not at all.

    runs: what was compared, the folder of every model (mc, f).
    """
    named = {f"{mc}/{f}": str(run) for (mc, f), run in runs.items()}
    write_text(out / "ace.json", json.dumps({"runs": named, "datasets": results}, indent=1, allow_nan=False) + "\n")
    write_text(out / "ace.md", ace_markdown(named, results))
    write_text(out / "ace.csv", ace_csv(results))
    for dataset, report in results.items():
        save(ace_figure(dataset, report), out, f"ace-{dataset}")


# In words


def manipulated(report: Report) -> bool:
    """True if Skew fell from F=0 to F=1 at every capacity, to that of a detector that tells real and fake apart."""
    return all(_fell(found) for found in report["capacities"].values())


def manipulation(report: Report) -> str:
    """Whether the fair regime was fairer: only then does ACE speak of fairness."""
    fell, stayed = (
        "; ".join(_skews(mc, found) for mc, found in report["capacities"].items() if _fell(found) is wanted)
        for wanted in (True, False)
    )
    if not stayed:
        return f"F was manipulated: the largest |Skew| fell from F=0 to F=1 ({fell})."
    if not fell:
        return (f"F was NOT manipulated: the largest |Skew| did not fall from F=0 to F=1 ({stayed}). ACE answers "
                "nothing about fairness here.")  # fmt: skip
    return (f"F was manipulated only in part: the largest |Skew| fell from F=0 to F=1 ({fell}), but not everywhere "
            f"({stayed}). ACE mixes the two and answers nothing about fairness here.")  # fmt: skip


def interpretation(report: Report) -> str:
    """What ACE and its interval say, and what they do not."""
    bootstrap, ace = report["bootstrap"], 100 * report["ACE"]
    if bootstrap["interval"] is None:
        return f"ACE is {ace:+.2f} points; no replicate has all cells, so nothing can be said of its uncertainty."
    low, high = bootstrap["interval"]
    told = f"ACE is {ace:+.2f} points, 95 % interval {_interval(bootstrap['interval'])}"
    if low <= 0 <= high:
        return f"{told}, which contains 0: these held-out samples do not tell whether F=1 changes the AUC."
    way = "higher" if low > 0 else "lower"
    if manipulated(report):
        return f"{told}: the AUC is {way} under the fairer regime."
    return f"{told}: the AUC is {way} under F=1, which was not fairer at every capacity, so no effect of fairness."


def draws(report: Report) -> str:
    """What was drawn."""
    bootstrap = report["bootstrap"]
    return (f"{bootstrap['replicates']:,} bootstrap draws of {bootstrap['unit']}s inside {bootstrap['strata']} strata "
            f"({' x '.join(report['attributes'])} x label), the same for all models; seed {bootstrap['seed']}. Their "
            f"mean ACE is {_points(bootstrap['mean'])}.")  # fmt: skip


def left_out(report: Report) -> list[str]:
    """What does not count, by name and number."""
    found = []
    if report["unknown"]:
        found.append(f"{report['unknown']:,} of {report['samples']:,} samples are of unknown group and left out.")
    if report["left_out"]:
        names = ", ".join(f"{name} ({c['n_real']} real, {c['n_fake']} fake)" for name, c in report["left_out"].items())
        found.append(f"Strata without both classes are left out, and P is taken over the others: {names}.")
    if undefined := report["bootstrap"]["undefined_replicates"]:
        found.append(f"{undefined:,} replicates left a cell without a class and are not counted.")
    return found


# Tables


@dataclass(frozen=True)
class AceTable:
    """The headline of every dataset and what it means, for `say`."""

    results: Results

    def __rich_console__(self, console, options):
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for place, name in enumerate(HEADLINE):
            table.add_column(name, justify="left" if place in (0, 6, 7) else "right")
        for row in _headline(self.results, "\n"):
            table.add_row(*row)
        yield table
        yield ""
        for dataset, report in self.results.items():
            if not manipulated(report):
                yield Text(f"{dataset}: {manipulation(report)}", style="bold red")
            yield Text(f"{dataset}: {interpretation(report)}")
            for note in left_out(report):
                yield Text(f"{dataset}: {note}", style="dim")
        yield Text(SEEDS, style="dim")


def ace_markdown(runs: Mapping[str, str], results: Results) -> str:
    """The page ace.md: the headline, then each dataset with its sentences, figure and cells."""
    listed = "\n".join(f"- {model}: `{run}`" for model, run in runs.items())
    rows = _headline(results, "<br>")
    parts = ["# Average causal effect of fairness on AUC\n\n", markdown(HEADLINE, rows, left=("dataset",))]
    parts += [f"\n{note}\n" for note in (*DEFINITIONS, SEEDS)]
    parts.append(f"\nRuns (capacity/regime):\n\n{listed}\n")
    for dataset, report in results.items():
        parts.append(f"\n## {dataset}\n\n{manipulation(report)}\n\n{interpretation(report)}\n")
        parts.append(f"\n![Bootstrap distribution of ACE on {dataset}](ace-{dataset}.png)\n\n")
        parts.append(markdown(CELLS, [_cell(cell) for cell in report["cells"]], left=("capacity", "stratum")))
        parts += [f"\n{note}\n" for note in (draws(report), *left_out(report))]
    return "".join(parts)


def ace_csv(results: Results) -> str:
    """A line a cell: dataset, capacity, stratum, counts, P, AUC by regime, difference with its interval; fractions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("dataset", "capacity", "stratum", *CSV, "low", "high"))
    for dataset, report in results.items():
        for cell in report["cells"]:
            bounds = cell["interval"] or (None, None)
            writer.writerow((dataset, cell["capacity"], cell["stratum"], *(cell[name] for name in CSV), *bounds))
    return file.getvalue()


def _headline(results: Results, between: str) -> list[list[str]]:
    rows = []
    for dataset, report in results.items():
        bootstrap = report["bootstrap"]
        capacities = report["capacities"].items()
        effects = between.join(f"{mc} {_points(found['ACE'])}" for mc, found in capacities)
        skews = between.join(_skews(mc, found) for mc, found in capacities)
        rows.append([dataset, _points(report["ACE"]), _interval(bootstrap["interval"]),
                     p_text(bootstrap["p_unsmoothed"], bootstrap["replicates"]), p_text(bootstrap["p_smoothed"]),
                     f"{100 * report['mu_0']:.1f}", effects, skews])  # fmt: skip
    return rows


def _cell(cell: Mapping) -> list[str]:
    auc = [f"{100 * cell[name]:.1f}" for name in ("AUC_0", "AUC_1")]
    return [cell["capacity"], cell["stratum"], f"{cell['n']:,}", *auc, _points(cell["difference"]),
            _interval(cell["interval"]), f"{cell['P']:.3f}"]  # fmt: skip


def p_text(p: float | None, replicates: int | None = None) -> str:
    """A p-value with three digits; 0 of B replicates is "< 1/B"; "-" if absent."""
    if p is None:
        return "-"
    return f"< {1 / replicates:.2g}" if p == 0 and replicates else f"{p:.3f}"


def _points(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:+.2f}"


def _interval(bounds) -> str:
    return "-" if bounds is None else f"[{', '.join(map(_points, bounds))}]"


def _skews(capacity: str, found: Mapping) -> str:
    plain, fair = found["skew"]
    one_class = "" if _tells_apart(found) else ", where all are called the same"
    return f"{capacity} {plain:.2f} → {fair:.2f}{one_class}"


def _tells_apart(found: Mapping) -> bool:
    """False where F=1 calls every sample real, or every one fake: its Skew is 0, which is no fairness."""
    return 0 < found["called_fake"][1] < 1


def _fell(found: Mapping) -> bool:
    plain, fair = found["skew"]
    return fair < plain and _tells_apart(found)


# The picture


def _minus(text: str) -> str:
    """Numbers as the axes write them."""
    return text.replace("-", "\N{MINUS SIGN}")


@styled()
def ace_figure(dataset: str, report: Report):
    """The bootstrap distribution of ACE, with the point, the interval and zero, in percentage points."""
    drawing, axes = figure(width=4.2, height=2.4)
    bootstrap = report["bootstrap"]
    values = 100 * np.array([value for value in bootstrap["values"] if value is not None])
    if len(values):
        bounds = bootstrap["interval"]
        axes.axvspan(*(100 * bound for bound in bounds), color=COLOURS[0], alpha=0.13, linewidth=0,
                     label=f"95 % {_minus(_interval(bounds))}")  # fmt: skip
        axes.hist(values, bins=40, color=COLOURS[0], alpha=0.8, edgecolor="white", linewidth=0.3)
    axes.axvline(100 * report["ACE"], color=COLOURS[1], label=f"ACE {_minus(_points(report['ACE']))}")
    axes.axvline(0, color=BLACK, linestyle="--", linewidth=1, label="no effect")
    axes.set_xlabel("ACE (percentage points of AUC)")
    axes.set_ylabel(f"replicates (of {bootstrap['replicates']:,})")
    axes.set_title(dataset if manipulated(report) else f"{dataset}: F=1 was not fairer at every capacity", loc="left")
    axes.tick_params(axis="y", color=GREY)
    drawing.legend(loc="outside lower center", ncols=3)
    return drawing
