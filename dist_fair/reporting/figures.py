"""Pictures of an evaluated dataset, for one run or for several side by side; radars have a file of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dist_fair.reporting.judged import ALL, Judged
from dist_fair.reporting.radar import radar
from dist_fair.reporting.style import (
    BLACK,
    COLOURS,
    GREY,
    PALE,
    WIDTH,
    figure,
    legend_below,
    save,
    stroke,
    styled,
    wrapped,
)
from dist_fair.reporting.tables import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 40
POINTS = 500  # of a ROC curve: more cannot be seen at page width
ACROSS = 4  # panels beside each other
CLASSES = {"real": COLOURS[0], "fake": COLOURS[1]}


def draw(judged: Mapping[str, Judged], dataset: str, folder: Path) -> list[Path]:
    """Writes DATASET-radar, DATASET-scores and DATASET-roc as PNG and SVG; returns their paths.

    judged: the dataset by run, all of the same samples and groups (`check_same_samples`). Without groups there is no
    radar.
    """
    written = []
    for kind, drawn in (("radar", radar(judged)), ("scores", scores(judged)), ("roc", roc(judged))):
        if drawn is not None:
            drawn.suptitle(dataset, x=0.01, ha="left", fontsize=8, color=GREY)
            written += save(drawn, folder, f"{dataset}-{kind}")
    return written


@styled()
def scores(judged: Mapping[str, Judged]) -> "Figure":
    """How the scores of each group are distributed, a panel a run: reals above a group's line, fakes below it.

    Histograms of shares: within a group both halves have the same area and scale, whatever its numbers are. A short
    bar is the median. Counts are in the names of the groups.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    parts = next(iter(judged.values())).parts
    names = [_counted(name, label) for name, (label, _) in parts.items()]
    across = min(len(judged), 3)
    down = -(-len(judged) // across)
    height = 0.6 + down * (0.5 + len(parts) * max(0.36, 0.14 * (1 + max(name.count("\n") for name in names))))
    drawing, axes = figure(height=height, nrows=down, ncols=across, sharey=True, squeeze=False)
    for ax, (run, one) in zip(axes.flat, judged.items(), strict=False):
        for row, (label, score) in enumerate(one.parts.values()):
            _mirrored(ax, row, label, score, _bins(judged))
        threshold = ax.axvline(one.report["threshold"], color=BLACK, linestyle=(0, (3, 2)), linewidth=0.8)
        ax.set_xlim(*_bins(judged)[[0, -1]])
        ax.set_ylim(len(parts) - 0.4, -0.6)
        ax.set_xlabel("score")
        ax.set_title(wrapped(run, 56 // across) if len(judged) > 1 else "", fontweight="bold")
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    _hide(axes.flat[len(judged) :])
    axes[0, 0].set_yticks(range(len(parts)), names)
    median = Line2D([], [], color=BLACK, linewidth=1.2, linestyle="none", marker="|", markersize=8)
    labels = ["real (upwards)", "fake (downwards)", "median", f"threshold {one.report['threshold']:g}"]
    legend_below(drawing, [*(Patch(color=colour) for colour in CLASSES.values()), median, threshold], labels)
    return drawing


def _bins(judged: Mapping[str, Judged]) -> np.ndarray:
    """Edges over [0, 1], wider where scores are."""
    scores = np.concatenate([one.predictions.score for one in judged.values()])
    return np.linspace(min(0.0, scores.min()), max(1.0, scores.max()), BINS + 1)


def _mirrored(ax, row: int, label: np.ndarray, score: np.ndarray, edges: np.ndarray) -> None:
    """The histograms of a group around the line y = row, the higher one 0.44 high."""
    shares = {}
    for code, name in enumerate(CLASSES):
        there = score[label == code]
        shares[name] = np.histogram(there, edges)[0] / len(there) if len(there) else None
    highest = max((share.max() for share in shares.values() if share is not None), default=1)
    ax.axhline(row, color=PALE, linewidth=0.6)
    for code, (name, share) in enumerate(shares.items()):
        sign = 1 if code else -1  # y grows downwards
        if share is None:
            ax.text(
                edges[len(edges) // 4], row + 0.22 * sign, f"no {name} samples", color=GREY, ha="center", va="center"
            )
            continue
        ax.stairs(row + sign * 0.44 * share / highest, edges, baseline=row, fill=True, color=CLASSES[name],
                  label=name)  # fmt: skip
        median = np.median(score[label == code])
        ax.plot([median] * 2, [row, row + sign * 0.3], color=BLACK, linewidth=1.2)


def _counted(name: str, label: np.ndarray) -> str:
    fake = int(label.sum())
    return f"{wrapped(name, 28)}\n{len(label) - fake:,} real, {fake:,} fake"


@styled()
def roc(judged: Mapping[str, Judged]) -> "Figure":
    """ROC curves with their AUC in per cent: one run's groups in one panel; of several runs, a panel a group."""
    return _roc_of_groups(next(iter(judged.values()))) if len(judged) == 1 else _roc_of_runs(judged)


def _roc_of_groups(one: Judged) -> "Figure":
    drawing, ax = figure(width=4.6, height=3.7)
    _square(ax)
    for number, (name, part) in enumerate(one.parts.items(), start=-1):
        look = {"color": BLACK, "linewidth": 2.0} if name == ALL else stroke(number, marker="")
        _curve(ax, part, f"{wrapped(name, 60)}  {_lacking(part[0]) or shown('AUC', one.auc(name))}", look)
    ax.set_xlabel("reals called fake (FPR)")
    ax.set_ylabel("fakes called fake (TPR)")
    legend_below(drawing, *ax.get_legend_handles_labels(), title="AUC (%)")
    return drawing


def _roc_of_runs(judged: Mapping[str, Judged]) -> "Figure":
    parts = next(iter(judged.values())).parts
    names = [wrapped(name, 20) for name in parts]
    across = min(len(parts), ACROSS)
    down = -(-len(parts) // across)
    above = 0.17 * -(-len(judged) // 3) + 0.13 * max(name.count("\n") for name in names)
    height = down * (min(WIDTH / across - 0.25, 3.0) + 0.5 + above) + 0.3
    drawing, axes = figure(height=height, nrows=down, ncols=across, squeeze=False)
    for ax, name, (part, (label, _)) in zip(axes.flat, names, parts.items(), strict=False):
        _square(ax)
        ax.text(0.5, 0.5, _lacking(label), color=GREY, ha="center", va="center")
        for number, one in enumerate(judged.values()):
            _curve(ax, one.parts[part], shown("AUC", one.auc(part)), stroke(number, marker=""))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), title=name, ncols=3, handlelength=1.2,
                  columnspacing=0.8, handletextpad=0.4, borderpad=0)  # fmt: skip
        ax.set_xlabel("FPR")
    for ax in axes[:, 0]:
        ax.set_ylabel("TPR")
    _hide(axes.flat[len(parts) :])
    legend_below(drawing, axes[0, 0].get_lines()[1:], [*judged], title="above the curves: AUC (%)")
    return drawing


def _lacking(label: np.ndarray) -> str:
    """Why there is no curve, "" where there is one."""
    without = [name for code, name in enumerate(CLASSES) if not (label == code).any()]
    return {0: "", 1: f"no {without[0] if without else ''} samples", 2: "no samples"}[len(without)]


def _curve(ax, part: tuple[np.ndarray, np.ndarray], label: str, look: Mapping) -> None:
    """One curve, through at most POINTS of its corners; without one of the classes, a name and no line."""
    from sklearn.metrics import roc_curve

    labels, scores = part
    fpr = tpr = np.array([np.nan])
    if 0 < labels.sum() < len(labels):
        fpr, tpr, _ = roc_curve(labels, scores)
        kept = np.unique(np.linspace(0, len(fpr) - 1, min(len(fpr), POINTS)).round().astype(int))
        fpr, tpr = fpr[kept], tpr[kept]
    ax.plot(fpr, tpr, label=label, clip_on=False, **look)


def _square(ax) -> None:
    ax.plot([0, 1], [0, 1], color=PALE, linewidth=0.8)  # chance
    ax.set_aspect("equal")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def _hide(axes) -> None:
    for ax in axes:
        ax.set_visible(False)
