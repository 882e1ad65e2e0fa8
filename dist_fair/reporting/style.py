"""How every figure looks, and how it is written: legible in print at page width, in colours that all eyes tell apart.

matplotlib is imported when something is drawn, and never through pyplot: a figure is an object that nobody else holds.
"""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dist_fair.data.storage import replacing
from dist_fair.errors import DistFairError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without their yellow, which is too light for a line on white; black is for what is not a group.
COLOURS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES: tuple = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
MARKERS = "osD^vP"
BLACK, GREY, PALE = "#000000", "#767676", "#D9D9D9"

WIDTH = 6.8  # inches: the text width of a paper's page
DPI = 200
PNG = {"compress_level": 3}  # a few per cent larger than at 6, and twice as fast
LOOK = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a figure has the same bytes on every machine
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.3,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a group may be called "$"
    "svg.hashsalt": "dist_fair",  # else the ids of an SVG are random
}


@contextmanager
def styled() -> Iterator[None]:
    """The look, for all that is drawn inside; as a decorator, for a function that draws."""
    import matplotlib

    with matplotlib.rc_context(LOOK):
        yield


@styled()
def figure(width: float = WIDTH, height: float = 3.0, **subplots_arguments) -> tuple:
    """A figure of width x height inches and what its `subplots` gives for the further arguments: (Figure, axes).

    Nothing overlaps or is cut off: axes make room for texts, and for a legend made by
    `figure.legend(loc="outside lower center")`. Texts added later have the look inside `styled()`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(**subplots_arguments)


@styled()
def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes FOLDER/NAME.png and FOLDER/NAME.svg and returns their paths. The same figure gives the same bytes.

    Raises DistFairError where a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # Laid out once, drawn once for each form: a third of the time of savefig, which does both twice for each.
    layout = figure.get_layout_engine()
    layout.execute(figure)
    figure.set_layout_engine("none")
    written = []
    for form, write in (
        ("png", lambda file: FigureCanvasAgg(figure).print_png(file, metadata={"Software": None}, pil_kwargs=PNG)),
        ("svg", lambda file: FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})),
    ):
        path = folder / f"{name}.{form}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                write(file)
        except OSError as error:
            raise DistFairError(f"{path} cannot be written: {error.strerror or error}") from error
        written.append(path)
    figure.set_layout_engine(layout)
    return written


def stroke(number: int, **changes) -> dict:
    """Colour, marker and dashes of the number-th line of a figure, different from the others'."""
    lap, place = divmod(number, len(COLOURS))
    marker = MARKERS[(place + lap) % len(MARKERS)]
    return {"color": COLOURS[place], "marker": marker, "linestyle": DASHES[lap % len(DASHES)], **changes}


@styled()
def legend_below(figure: "Figure", handles: list, labels: list[str], title: str | None = None) -> None:
    """A legend under all axes, in as many columns as the labels leave room for; the figure grows by its rows."""
    taken = max(map(len, labels)) + 9  # the stroke and the gap to the next one are as wide as nine letters
    across = max(1, int(figure.get_figwidth() * 17) // taken)  # letters of 7.5 points to an inch
    rows = -(-len(labels) // across)
    figure.set_figheight(figure.get_figheight() + 0.16 * (rows + bool(title)))
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // rows), title=title)


def wrapped(name: str, width: int = 18) -> str:
    """A name of a group or run on several lines, broken at "/" first, where it is longer than `width` letters."""
    pieces = [name] if len(name) <= width else name.replace("/", "/\n").split("\n")
    return "\n".join(line for piece in pieces for line in textwrap.wrap(piece, width) or [piece])
