"""The picture of a leaderboard: utility against fairness, a point a setting, and the front that none of them beats."""

from pathlib import Path
from typing import TYPE_CHECKING

from dist_fair.reporting import style
from dist_fair.reporting.leaderboard import AVERAGE, Leaderboard, Number, Row, more
from dist_fair.reporting.tables import UTILITY, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 3  # panels


def draw(board: Leaderboard, out: Path) -> list[Path]:
    """OUT/leaderboard.png and .svg: a panel for the average and for each evaluation set; [] where no point has both.

    Bars are standard deviations over seeds. Settings on the front of a panel have colours and are in the legend.
    """
    panels = {dataset: rows for dataset in board.datasets if (rows := _whole(board, dataset))}
    if not panels:
        return []
    order = dict.fromkeys(row.entry.name for rows in panels.values() for row in rows if row.front)
    strokes = {name: style.stroke(number) for number, name in enumerate(order)}
    down, across = -(-len(panels) // ACROSS), min(len(panels), ACROSS)
    figure, axes = style.figure(width=style.WIDTH * (across + 1) / (ACROSS + 1), height=0.4 + 2.2 * down, nrows=down,
                                ncols=across, squeeze=False)  # fmt: skip
    with style.styled():
        for place, (dataset, rows) in zip(axes.flat, panels.items(), strict=False):
            _panel(place, board, rows, strokes)
            place.set_title("average" if dataset == AVERAGE else style.wrapped(dataset, 30))
        for place in axes.flat[len(panels) :]:
            place.set_visible(False)
        handles = [axes.flat[0].plot([], [], **{**strokes[name], "linestyle": ""})[0] for name in order]
        style.legend_below(figure, handles, [*order], "on a front")
    return style.save(figure, out, "leaderboard")


def _whole(board: Leaderboard, dataset: str) -> list[Row]:
    """The rows that have both numbers."""
    return [row for row in board.rows(dataset) if row.numbers[board.utility] and row.numbers[board.fairness]]


def _panel(axes: "Axes", board: Leaderboard, rows: list[Row], strokes: dict[str, dict]) -> None:
    front = []
    for row in rows:
        (x, spread), (y, height) = _scaled(board.fairness, row), _scaled(board.utility, row)
        look = {"color": style.GREY, "marker": "."} | ({**strokes[row.entry.name]} if row.front else {})
        axes.errorbar(x, y, xerr=spread, yerr=height, linestyle="", elinewidth=0.6, markersize=5,
                      ecolor=look["color"] if row.front else style.PALE,
                      color=look["color"], marker=look["marker"], zorder=3 if row.front else 2)  # fmt: skip
        front += [(x, y)] * row.front
    steps = "steps-pre" if more(board.fairness) else "steps-post"  # what is within reach of the front, no more
    axes.plot(*zip(*sorted(front), strict=True), color=style.BLACK, linewidth=0.8, drawstyle=steps, zorder=1)
    axes.grid(True)
    for name, label in ((board.fairness, axes.set_xlabel), (board.utility, axes.set_ylabel)):
        unit = "natural log" if name == "skew" else "%"
        label(f"{title(name)} ({unit}), {'more' if more(name) else 'less'} is better")


def _scaled(name: str, row: Row) -> tuple[float, float]:
    """Mean and deviation as tables have them."""
    number: Number = row.numbers[name]
    factor = 100 if name in UTILITY or name == "es-AUC" else 1
    return factor * number.mean, factor * (number.deviation or 0.0)
