"""Faces as a detector with a decoder sees them: a row each, with what it makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dist_fair.reporting.style import GREY, WIDTH, figure, save, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("image", "self reconstruction", "cross reconstruction", "forgery code from")


def draw(columns: Sequence[np.ndarray], names: Sequence[str], dataset: str, folder: Path) -> list[Path]:
    """Writes DATASET-reconstructions as PNG and SVG; returns their paths. columns, names: as for `gallery`."""
    drawing = gallery(columns, names)
    drawing.suptitle(dataset, x=0.01, ha="left", fontsize=8, color=GREY)
    return save(drawing, folder, f"{dataset}-reconstructions")


@styled()
def gallery(columns: Sequence[np.ndarray], names: Sequence[str]) -> "Figure":
    """A row for each face.

    columns: for each of COLUMNS, RGB images (n, H, W, 3) uint8: what was shown; its reconstruction; the same with the
    forgery code of another face; that face. names: what the n faces are.
    """
    side = WIDTH / (len(COLUMNS) + 1)
    drawing, axes = figure(height=0.4 + side * len(names), nrows=len(names), ncols=len(COLUMNS), squeeze=False)
    for row, name in enumerate(names):
        for ax, images in zip(axes[row], columns, strict=True):
            ax.imshow(images[row], interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, title in zip(axes[0], COLUMNS, strict=True):
        ax.set_title(title)
    return drawing
