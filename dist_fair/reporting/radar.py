"""AUC and |Skew| of every group, run by run: figure 4 of the DAID paper, left AUC, right Skew."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dist_fair.reporting.judged import Judged
from dist_fair.reporting.style import GREY, figure, legend_below, stroke, styled, wrapped
from dist_fair.reporting.tables import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPOKES = range(3, 13)  # with fewer groups there is no polygon, with more their names do not fit around it
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
    drawing = (_radars if len(groups) in SPOKES else _rows)(groups, numbers)
    handles = drawing.axes[0].get_legend_handles_labels()[0]
    legend_below(drawing, handles, [_headline(run, one) for run, one in judged.items()])
    return drawing


def _column(values, factor: float) -> np.ndarray:
    return np.array([np.nan if value is None else factor * value for value in values])


def _headline(run: str, one: Judged) -> str:
    auc = shown("AUC", one.report["utility"]["frame"]["AUC"])
    return f"{run} (AUC {auc}, Skew {shown('skew', one.report['fairness'][one.groups.label]['skew'])})"


def _radars(groups: tuple[str, ...], numbers: Numbers) -> "Figure":
    drawing, axes = figure(height=3.4, ncols=2, subplot_kw={"projection": "polar"})
    angles = 2 * np.pi * np.arange(len(groups)) / len(groups)
    for ax, (name, lines) in zip(axes, numbers.items(), strict=True):
        ax.set_theta_zero_location("N")
        ax.set_theta_direction(-1)
        ax.set_xticks(angles, [wrapped(group, 9) for group in groups])
        ax.tick_params(axis="x", pad=-1)
        for label, angle in zip(ax.get_xticklabels(), angles, strict=True):
            side = np.sin(angle)
            label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        low, high, ticks = _scale(name, lines)
        ax.set_rlim(low, high)
        back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        ax.set_rticks(ticks, [f"{tick:g}" for tick in ticks], color=GREY, fontsize=6.5, bbox=back)
        beside = sum(np.nan_to_num(values) + np.roll(np.nan_to_num(values), -1) for values in lines.values())
        ax.set_rlabel_position((np.argmin(beside) + 0.5) * 360 / len(groups))  # where the lines leave most room
        ax.spines["polar"].set_color(GREY)
        for number, (run, values) in enumerate(lines.items()):
            closed = np.append(values, values[0])
            ax.plot(np.append(angles, angles[0]), closed, label=run, markersize=3, clip_on=False, **stroke(number))
            if len(lines) == 1 and not np.isnan(values).any():
                ax.fill(angles, values, color=stroke(number)["color"], alpha=0.12, linewidth=0)
        ax.set_title(TITLES[name], fontweight="bold", pad=10)
        ax.set_xlabel(_absent(name, groups, lines), color=GREY, fontsize=7)
    return drawing


def _rows(groups: tuple[str, ...], numbers: Numbers) -> "Figure":
    runs = len(numbers["AUC"])
    drawing, axes = figure(height=1.2 + len(groups) * max(0.24, 0.09 * runs), ncols=2, sharey=True)
    rows = np.arange(len(groups))
    for ax, (name, lines) in zip(axes, numbers.items(), strict=True):
        ax.set_yticks(rows, [wrapped(group, 28) for group in groups])
        ax.set_ylim(len(groups) - 0.5, -0.5)
        low, high, ticks = _scale(name, lines)
        ax.set_xlim(low, high)
        ax.set_xticks(ticks)
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
    locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    if name == "AUC":
        low = 10 * np.floor((min(values, default=CHANCE) - 3) / 10)
        ticks = locator.tick_values(max(low, 0), 100)
        return ticks[0], 100.0, ticks[(ticks > ticks[0]) & (ticks <= 100)]
    ticks = locator.tick_values(0, max(max(values, default=1.0), 0.05))
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
