"""The drawing board: head coordinates, soft shapes, smooth noise, relief and light.

Heads are drawn from the front on a square board of SIDE pixels. One head unit is UNIT pixels; (0, 0) is the centre of
the head, x to the right, y down, z towards the viewer. Colours are computed on a scale whose square is light
(gamma 2): cheap, and close enough to sRGB for shading to look right. Images are planes, (3, height, width), RGB, so
that NumPy runs along rows. Small features are drawn in windows of the board: slices of rows and columns.
"""

from functools import cache

import cv2
import numpy as np

SIDE = 176
UNIT = 64.0
EXTENT = SIDE / UNIT / 2
# cv2 takes fixed-point vertices: four binary digits after the point, so edges move smoothly from frame to frame.
_DIGITS = 4

AXIS = ((np.arange(SIDE) + 0.5) / UNIT - EXTENT).astype(np.float32)
X, Y = np.meshgrid(AXIS, AXIS)


Window = tuple[slice, slice]


def window(left: float, top: float, right: float, bottom: float) -> Window:
    """The part of the board between these head coordinates."""
    (c0, c1), (r0, r1) = (
        ((np.array(ends) + EXTENT) * UNIT).round().astype(int) for ends in ((left, right), (top, bottom))
    )
    return slice(int(r0), int(r1)), slice(int(c0), int(c1))


BOARD = window(-EXTENT, -EXTENT, EXTENT, EXTENT)


def pixels(points, within: Window = BOARD) -> np.ndarray:
    """Head coordinates (..., 2) as fixed-point positions in a window, int32."""
    corner = (within[1].start, within[0].start)
    return np.rint(((np.asarray(points) + EXTENT) * UNIT - 0.5 - corner) * 2**_DIGITS).astype(np.int32)


def shape(*outlines, blur: float = 0.0, within: Window = BOARD) -> np.ndarray:
    """A mask (height, width) float32 in 0..1 of closed outlines (n, 2), edges softened by `blur` head units."""
    mask = _blank(within)
    for outline in outlines:
        cv2.fillPoly(mask, [pixels(outline, within)], 255, cv2.LINE_AA, _DIGITS)
    return soften(mask * np.float32(1 / 255), blur)


def strokes(lines, thickness: float, blur: float = 0.0, within: Window = BOARD) -> np.ndarray:
    """A mask of open lines, each (n, 2), `thickness` head units wide."""
    mask = _blank(within)
    width = max(1, round(thickness * UNIT))
    cv2.polylines(mask, [pixels(line, within) for line in lines], False, 255, width, cv2.LINE_AA, _DIGITS)
    return soften(mask * np.float32(1 / 255), blur)


def _blank(within: Window) -> np.ndarray:
    return np.zeros(tuple(part.stop - part.start for part in within), np.uint8)


def planes(colour) -> np.ndarray:
    """A colour (3,) or planes (3, height, width) as float32 that broadcasts against planes."""
    colour = np.asarray(colour, np.float32)
    return colour[:, None, None] if colour.ndim == 1 else colour


def soften(image: np.ndarray, blur: float) -> np.ndarray:
    """Gaussian blur with a deviation of `blur` head units."""
    return cv2.GaussianBlur(image, (0, 0), blur * UNIT) if blur > 0 else image


def ellipse(x: float, y: float, a: float, b: float, count: int = 28) -> np.ndarray:
    """The outline (count, 2) of an ellipse with half-axes a and b."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([x + a * np.cos(angle), y + b * np.sin(angle)], 1)


def bumps(rows) -> np.ndarray:
    """A sum of Gaussian bumps, (SIDE, SIDE) float32; each row is (x, y, deviation x, deviation y, height)."""
    x, y, a, b, height = np.asarray(rows, np.float32).T[:, :, None]
    across = np.exp(-0.5 * ((AXIS - x) / a) ** 2)
    down = np.exp(-0.5 * ((AXIS - y) / b) ** 2) * height
    return down.T @ across


def paint(image: np.ndarray, mask: np.ndarray, colour) -> None:
    """Blend `colour` ((3,) or planes) into planes where `mask` is, in place."""
    image += mask * (planes(colour) - image)


def noise(random: np.random.Generator, cells: int, side: int = SIDE) -> np.ndarray:
    """Smooth noise (side, side) float32 of unit deviation with about `cells` patches per side."""
    grid = random.standard_normal((cells + 3, cells + 3), np.float32)
    return cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) * 1.4


def normals(relief: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit surface normals (x, y, z) of a relief in head units."""
    x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=-UNIT / 8)
    y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=-UNIT / 8)
    z = 1 / np.sqrt(x * x + y * y + 1)
    return x * z, y * z, z


def cast_shadow(relief: np.ndarray, light: np.ndarray) -> np.ndarray:
    """How much of the light towards `light` (3,) the relief itself blocks, (SIDE, SIDE) in 0..1."""
    blocked = np.zeros_like(relief)
    for distance in (0.06, 0.12, 0.2):
        move = np.float32([[1, 0, -light[0] * distance * UNIT], [0, 1, -light[1] * distance * UNIT]])
        ahead = cv2.warpAffine(relief, move, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE)
        np.maximum(blocked, ahead - relief - light[2] * distance, out=blocked)
    return soften(np.clip(blocked * 14, 0, 1), 0.025)


@cache
def _cubic_basis(count: int, per_span: int) -> np.ndarray:
    t = np.linspace(0, 1, per_span, endpoint=False)
    weights = np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3], 1) / 2
    basis = np.zeros((count * per_span, count))
    for span in range(count):
        for offset in range(4):
            basis[span * per_span : (span + 1) * per_span, (span + offset - 1) % count] += weights[:, offset]
    return basis


def smooth(points, per_span: int = 5) -> np.ndarray:
    """A closed Catmull-Rom curve through `points` (n, 2): (n * per_span, 2)."""
    points = np.asarray(points, float)
    return _cubic_basis(len(points), per_span) @ points


def curve(points, count: int = 12) -> np.ndarray:
    """A smooth open line (count, 2) through `points`, whose x must rise: a polynomial of at most degree 4."""
    points = np.asarray(points, float)
    x = np.linspace(points[0, 0], points[-1, 0], count)
    return np.stack([x, np.polyval(np.polyfit(points[:, 0], points[:, 1], min(4, len(points) - 1)), x)], 1)
