"""AUC and |Skew| of every group, run by run: figure 4 of the DAID paper, left AUC, right Skew."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dist_fair.reporting.judged import Judged
from dist_fair.reporting.style import GREY, PALE, figure, legend_below, stroke, styled, wrapped
from dist_fair.reporting.tables import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPOKES = range(3, 13)  # with fewer groups there is no polygon, with more their names do not fit around it
LETTERS = 14  # nor do names whose parts are longer
TITLES = {"AUC": "AUC ↑ (%)", "Skew": "|Skew| ↓"}
CHANCE = 50.0  # per cent

Numbers = dict[str, dict[str, np.ndarray]]


@styled()
def radar(judged: Mapping[str, Judged]) -> "Figure | None":
    """Two radars, AUC in per cent and |Skew|, a spoke a group and a line a run; rows of dots where no radar can be.

    judged: the same dataset by run. |Skew| of a group is the larger one of its cells, called real and called fake. A
    number that is absent leaves a gap and is named below. None without groups.
    """
    first = next(iter(judged.values()))
    if not first.groups or not len(first.groups):
        return None
    groups = first.groups.names
    numbers = {
        "AUC": {run: _column(map(one.auc, groups), 100) for run, one in judged.items()},
        "Skew": {run: _column(map(one.skew, groups), 1) for run, one in judged.items()},
    }
    short = all(len(part) <= LETTERS for group in groups for part in group.split("/"))
    drawing = (_radars if short and len(groups) in SPOKES else _rows)(groups, numbers)
    handles = drawing.axes[0].get_legend_handles_labels()[0]
    legend_below(drawing, handles, [_headline(run, one) for run, one in judged.items()])
    return drawing


def _column(values, factor: float) -> np.ndarray:
    return np.array([np.nan if value is None else factor * value for value in values])


def _headline(run: str, one: Judged) -> str:
    auc = shown("AUC", one.report["utility"]["frame"]["AUC"])
    return f"{run} (AUC {auc}, Skew {shown('skew', one.report['fairness'][one.groups.label]['skew'])})"


def _radars(groups: tuple[str, ...], numbers: Numbers) -> "Figure":
    drawing, axes = figure(height=3.2, ncols=2)
    angles = 2 * np.pi * np.arange(len(groups)) / len(groups)
    spokes = np.stack([np.sin(angles), np.cos(angles)])  # clockwise, the first one upwards
    for ax, (name, lines) in zip(axes, numbers.items(), strict=True):
        low, high, ticks = _scale(name, lines)
        _web(ax, groups, spokes, (ticks - low) / (high - low), [f"{tick:g}" for tick in ticks], _roomiest(lines))
        for number, (run, values) in enumerate(lines.items()):
            x, y = spokes * (values - low) / (high - low)
            look = stroke(number)
            ax.plot(np.append(x, x[0]), np.append(y, y[0]), label=run, markersize=3, clip_on=False, **look)
            if len(lines) == 1 and not np.isnan(values).any():
                ax.fill(x, y, color=look["color"], alpha=0.12, linewidth=0)
        title = f"{TITLES[name]}, centre {low:g}" if low else TITLES[name]
        ax.set_title(title, fontweight="bold", pad=17 + 9 * groups[0].count("/"))
        ax.text(0, -1.35, _absent(name, groups, lines), color=GREY, fontsize=7, ha="center", va="top")
    return drawing


def _web(ax, groups: tuple[str, ...], spokes: np.ndarray, rings: np.ndarray, names: list[str], gap: int) -> None:
    """The grid of a radar of radius 1: spokes (2, G) with the groups' names, rings with theirs after spoke `gap`.

    Drawn by hand: polar axes take three times as long, and their ring names vanish under the lines.
    """
    from matplotlib.patches import Circle

    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_xlim(-1, 1)
    ax.set_ylim(-1, 1)
    ax.plot([[0] * len(groups), spokes[0]], [[0] * len(groups), spokes[1]], color=PALE, linewidth=0.6)
    middle = np.pi * (2 * gap + 1) / len(groups)
    for ring, name in zip(rings, names, strict=True):
        ax.add_patch(
            Circle((0, 0), ring, fill=False, clip_on=False, edgecolor=GREY if ring == 1 else PALE, linewidth=0.6)
        )
        ax.text(ring * np.sin(middle), ring * np.cos(middle), name, color=GREY, fontsize=6.5, ha="center", va="center",
                zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5})  # fmt: skip
    for group, x, y in zip(groups, *spokes, strict=True):
        across = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"
        along = "center" if abs(y) < 0.9 else "bottom" if y > 0 else "top"
        ax.text(1.06 * x, 1.06 * y, group.replace("/", "/\n"), fontsize=7.5, ha=across, va=along)


def _roomiest(lines: Mapping[str, np.ndarray]) -> int:
    """The spoke after which the lines are nearest to the centre."""
    values = sum(np.nan_to_num(line) for line in lines.values())
    return int(np.argmin(values + np.roll(values, -1)))


def _rows(groups: tuple[str, ...], numbers: Numbers) -> "Figure":
    runs, names = len(numbers["AUC"]), [wrapped(group, 28) for group in groups]
    tallest = 1 + max(name.count("\n") for name in names)
    drawing, axes = figure(height=0.9 + len(groups) * max(0.14 * tallest + 0.1, 0.09 * runs), ncols=2, sharey=True)
    rows = np.arange(len(groups))
    for ax, (name, lines) in zip(axes, numbers.items(), strict=True):
        ax.set_yticks(rows, names)
        ax.set_ylim(len(groups) - 0.5, -0.5)
        low, high, ticks = _scale(name, lines)
        ax.set_xlim(low, high)
        ax.set_xticks([low, *ticks])
        ax.grid(True)
        for number, (run, values) in enumerate(lines.items()):
            beside = 0.6 * ((number + 0.5) / runs - 0.5)
            ax.plot(values, rows + beside, label=run, markersize=4.5, clip_on=False, **stroke(number, linestyle="none"))
        ax.set_title(TITLES[name], fontweight="bold")
        ax.set_xlabel(_absent(name, groups, lines), color=GREY, fontsize=7)
    return drawing


def _scale(name: str, lines: Mapping[str, np.ndarray]) -> tuple[float, float, np.ndarray]:
    """Lowest and highest value of an axis, and its ticks: AUC ends at 100 and begins below all, |Skew| begins at 0."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([*lines.values()])
    values = values[~np.isnan(values)]
    locator = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10])
    if name == "AUC":
        low = 10 * np.floor((min(values, default=CHANCE) - 3) / 10)
        ticks = locator.tick_values(max(low, 0), 100)
        return ticks[0], 100.0, ticks[(ticks > ticks[0]) & (ticks <= 100)]
    ticks = locator.tick_values(0, max(max(values, default=1.0), 0.1))
    return 0.0, ticks[-1], ticks[ticks > 0]


def _absent(name: str, groups: tuple[str, ...], lines: Mapping[str, np.ndarray]) -> str:
    """Which groups lack the number, in words; by run where runs differ."""
    lacking = {run: tuple(np.array(groups)[np.isnan(values)].tolist()) for run, values in lines.items()}
    if len({*lacking.values()}) == 1:
        lacking = {"": next(iter(lacking.values()))}
    notes = [
        f"{f'{run}: ' if run else ''}no {name} of {', '.join(groups)}" for run, groups in lacking.items() if groups
    ]
    return "\n".join(textwrap.fill(note, 56) for note in notes)
