"""Eyes, brows, mouth, beard and glasses: the parts of a face that move, painted on the board of canvas.py."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from dist_fair import keyed
from dist_fair.data.demo import canvas
from dist_fair.data.demo.person import Expression, Person

EYE_LEVEL = -0.03
EYES = canvas.window(-0.66, -0.46, 0.66, 0.28)
MOUTH = canvas.window(-0.46, 0.36, 0.46, 0.90)


@dataclass(frozen=True)
class Eye:
    """One eye: its upper and lower lid (n, 2), the iris' centre and radius."""

    upper: np.ndarray
    lower: np.ndarray
    centre: tuple[float, float]
    radius: float
    side: int


@dataclass(frozen=True)
class Eyes:
    """Both eyes, and the bumps their balls and lids make in the relief."""

    both: tuple[Eye, Eye]
    bumps: list


@dataclass(frozen=True)
class Mouth:
    """Outlines (n, 2) of the lips and of the gap between them, and the bumps of the lips."""

    upper: np.ndarray
    lower: np.ndarray
    gap: np.ndarray
    line: np.ndarray
    teeth: float
    bumps: list


def eyes(person: Person, expression: Expression) -> Eyes:
    """Where lids and irises are."""
    both, bumps = [], []
    opening = person.eye_height * np.clip(1 + 0.45 * expression.lids - 0.25 * max(expression.smile, 0), 0.15, 1.5)
    for side in (-1, 1):
        x, w = side * person.eye_distance, person.eye_width
        tilt = person.eye_tilt * side
        inner, outer = x - side * w, x + side * w
        ends = sorted([(inner, EYE_LEVEL + abs(w) * tilt * side), (outer, EYE_LEVEL - abs(w) * tilt * side)])
        top = (x - side * 0.1 * w, EYE_LEVEL - opening)
        upper = _arch(ends, top, 0.62)
        lower = _arch(ends, (x + side * 0.1 * w, EYE_LEVEL + 0.55 * opening), 0.62)
        radius = 0.068
        centre = (x + 0.4 * w * expression.gaze_x, EYE_LEVEL - 0.2 * opening + 0.4 * opening * expression.gaze_y)
        both.append(Eye(upper, lower, centre, radius, side))
        bumps += [(x, EYE_LEVEL, 0.075, 0.05, 0.05), (x, EYE_LEVEL - opening - 0.02, 0.11, 0.018, 0.014)]
    return Eyes(tuple(both), bumps)


def paint_eyes(image: np.ndarray, person: Person, both: Eyes, light: np.ndarray) -> None:
    """Whites in the shade of the lid, iris with dark rim, pupil and highlight, lashes and the crease above."""
    image, shape, strokes = _in_window(image, EYES)
    light = np.sqrt(np.clip(light, 0, 1.2)).astype(np.float32)
    openings = [np.concatenate([eye.upper, eye.lower[::-1]]) for eye in both.both]
    opening = shape(*openings, blur=0.005)
    shade = shape(*[np.add(o, (0, 0.032)) for o in openings], blur=0.022) * opening
    corners = shape(*[canvas.ellipse(e.centre[0], e.centre[1], 0.10, 0.09) for e in both.both], blur=0.02)
    white = np.array([0.86, 0.82, 0.79], np.float32) * light
    canvas.paint(image, opening, canvas.planes(white) * (0.55 + 0.42 * shade * (0.72 + 0.28 * corners)))
    irises = [canvas.ellipse(*e.centre, e.radius, e.radius) for e in both.both]
    iris = shape(*irises, blur=0.006) * opening
    inner = shape(*[canvas.ellipse(*e.centre, e.radius * 0.72, e.radius * 0.72) for e in both.both], blur=0.014)
    glow = shape(*[canvas.ellipse(e.centre[0], e.centre[1] + 0.02, 0.04, 0.03) for e in both.both], blur=0.014)
    tone = canvas.planes(person.iris * light) * (0.45 + 0.55 * inner + 0.45 * glow)
    canvas.paint(image, iris, tone * (0.55 + 0.45 * shade))
    pupils = shape(*[canvas.ellipse(*e.centre, 0.030, 0.030) for e in both.both], blur=0.004) * opening
    canvas.paint(image, pupils, np.array([0.03, 0.025, 0.025]))
    spark = shape(
        *[canvas.ellipse(e.centre[0] - 0.022, e.centre[1] - 0.024, 0.014, 0.013) for e in both.both], blur=0.004
    )
    canvas.paint(image, spark * opening, np.array([0.97, 0.97, 0.97]) * np.clip(light, 0, 1))
    dark = np.minimum(person.hair * 0.5, person.skin * 0.28)
    lash = strokes(
        [e.upper for e in both.both], 0.016 + 0.010 * (person.gender == "female") + 0.006 * person.makeup, 0.006
    )
    canvas.paint(image, np.clip(lash, 0, 0.9), dark)
    canvas.paint(image, strokes([e.lower for e in both.both], 0.012, 0.007) * 0.45, dark)
    folds = [np.add(e.upper, (0, -0.024 - 0.012 * person.crease)) for e in both.both]
    canvas.paint(image, strokes(folds, 0.014, 0.007) * 0.55 * person.crease, person.skin * (0.55, 0.42, 0.38) * light)


def paint_brows(image: np.ndarray, person: Person, expression: Expression) -> None:
    """Brows of many short hairs, thicker towards the nose."""
    image, shape, strokes = _in_window(image, EYES)
    random = keyed.generator(*person.key, "brows")
    hairs, bodies = [], []
    for side in (-1, 1):
        t = np.linspace(0, 1, 26)
        x = person.eye_distance + person.eye_width * (2.5 * t - 1.2)
        y = (
            EYE_LEVEL
            - person.brow_height
            - 0.06 * expression.brows
            - person.brow_arch * np.sin(np.pi * t**1.4)
            - 0.018 * (1 - t)
            + 0.06 * (t - 0.75).clip(0)
        )
        thick = person.brow_weight * (1.05 - 0.75 * t**2)
        root = np.stack([x, y + thick * random.uniform(-0.3, 0.9, 26)], 1)
        tip = root + np.stack([0.035 + 0.02 * t, -thick * (1.0 - 0.9 * t)], 1)
        hairs += [np.stack([a, b]) * (side, 1) for a, b in zip(root, tip, strict=True)]
        body = np.concatenate([np.stack([x, y - thick * 0.6], 1), np.stack([x, y + thick * 0.7], 1)[::-1]])
        bodies.append(body * (side, 1))
    tone = np.minimum(person.hair * 0.9 + 0.02, person.skin * 0.72)
    canvas.paint(image, shape(*bodies, blur=0.016) * 0.66, tone)
    canvas.paint(image, strokes(hairs, 0.011, 0.005) * 0.6, tone * 0.75)


def mouth(person: Person, expression: Expression) -> Mouth:
    """The lips' outlines for an expression; lips part around the line between them."""
    smile, opened = expression.smile, max(expression.mouth_open, 0.0)
    half = person.mouth_width * (1 + 0.14 * smile - 0.06 * opened)
    y, lift, part = person.mouth_height, -0.05 * smile, 0.055 * opened
    up, low = person.lip_upper * (1 - 0.15 * smile), person.lip_lower * (1 - 0.12 * smile)
    x = np.linspace(-1, 1, 21)
    corner = lift * x**2 + 0.4 * -lift
    gap_top = y + corner - part * 0.4 * (1 - x**2) + 0.008 * np.exp(-((x / 0.2) ** 2))
    gap_bottom = y + corner + part * (1 - x**2)
    bow = up * (1 - np.abs(x) ** 2.2) * (1 - 0.24 * np.exp(-((x / 0.13) ** 2)) - 0.15 * np.abs(x))
    belly = low * (1 - x**2) ** 0.8
    wide = x * half
    upper = np.concatenate([np.stack([wide, gap_top - bow], 1), np.stack([wide, gap_top], 1)[::-1]])
    lower = np.concatenate([np.stack([wide, gap_bottom], 1), np.stack([wide, gap_bottom + belly], 1)[::-1]])
    gap = np.concatenate([np.stack([wide, gap_top], 1), np.stack([wide, gap_bottom], 1)[::-1]])
    middle = len(x) // 2
    bumps = [
        (0, gap_top[middle] - up * 0.5, half * 0.5, up * 0.45, 0.022),
        (0, gap_bottom[middle] + low * 0.5, half * 0.48, low * 0.42, 0.030),
        (0, y + 0.1 * opened, half * 0.8, 0.016, -0.02), (0, person.nose_length + 0.10, 0.022, 0.04, -0.012),
    ]  # fmt: skip
    bumps += [(s * (half + 0.03), y + lift * 0.6, 0.03, 0.04, -0.018 - 0.02 * max(smile, 0)) for s in (-1, 1)]
    bumps += [(s * 0.36, 0.33, 0.10, 0.08, 0.035 * smile) for s in (-1, 1)]
    line = np.stack([wide, (gap_top + gap_bottom) / 2], 1)
    return Mouth(upper, lower, gap, line, float(np.clip(opened * 1.6, 0, 1)), bumps)


def paint_mouth(image: np.ndarray, person: Person, lips: Mouth) -> None:
    """Lips, the dark line between them, and teeth when they part."""
    image, shape, strokes = _in_window(image, MOUTH)
    canvas.paint(image, shape(lips.lower, blur=0.010) * 0.88, person.lips * 1.04)
    canvas.paint(image, shape(lips.upper, blur=0.010) * 0.88, person.lips * 0.86)
    gap = shape(lips.gap, blur=0.004)
    canvas.paint(image, gap, np.array([0.17, 0.07, 0.07]))
    if lips.teeth > 0:
        squeeze = np.array([0.8, 1.0])
        teeth = shape((lips.gap - (0, 0.010)) * squeeze, blur=0.006) * gap
        canvas.paint(image, teeth * lips.teeth * 0.9, np.array([0.84, 0.81, 0.76]))
    canvas.paint(
        image, strokes([lips.line], 0.010, 0.005) * (0.75 - 0.5 * lips.teeth), person.lips * (0.34, 0.26, 0.28)
    )


def paint_beard(image: np.ndarray, person: Person, lips: Mouth) -> None:
    """Stubble or a beard along the jaw and above the lip."""
    if not person.beard:
        return
    random = keyed.generator(*person.key, "beard")
    width = person.width
    jaw = [
        (-width, 0.08), (-width * 0.86, 0.36), (-0.32, 0.52), (-0.2, 0.47), (0, 0.45), (0.2, 0.47),
        (0.32, 0.52), (width * 0.86, 0.36),
        (width, 0.08), (width * 1.05, 0.7), (0.3, 1.1), (-0.3, 1.1), (-width * 1.05, 0.7),
    ]  # fmt: skip
    area = canvas.shape(canvas.smooth(jaw), blur=0.035)
    above = canvas.shape(canvas.ellipse(0, person.mouth_height - 0.085, 0.24, 0.055), blur=0.025)
    area = area * (1 - above) + above * person.moustache
    bare = canvas.shape(canvas.ellipse(0, person.mouth_height + 0.005, person.mouth_width * 1.02, 0.075), blur=0.02)
    density = (
        area
        * (1 - bare)
        * np.clip(0.45 + 0.13 * canvas.noise(random, 110) + person.beard * 0.55, 0, 1)
        * person.beard**0.6
    )
    canvas.paint(image, np.clip(density, 0, 0.92), np.minimum(person.hair * 0.85, person.skin * 0.6))


def paint_glasses(image: np.ndarray, person: Person) -> None:
    """Plain spectacles: two rims, a bridge and the arms."""
    random = keyed.generator(*person.key, "glasses")
    a, b, power = 0.20 + 0.02 * random.random(), 0.135 + 0.02 * random.random(), random.uniform(2, 3.4)
    angle = np.linspace(0, 2 * np.pi, 36)
    rim = np.stack(
        [
            a * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** (2 / power),
            b * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** (2 / power),
        ],
        1,
    )
    d, y = person.eye_distance + 0.01, EYE_LEVEL + 0.025
    lines = [np.add(rim, (d, y)), np.add(rim, (-d, y)), np.array([(a - d, y - 0.03), (0, y - 0.05), (d - a, y - 0.03)])]
    lines += [np.array([(s * (d + a), y - 0.04), (s * (person.width + 0.02), y - 0.02)]) for s in (-1, 1)]
    tone = np.array([(0.08, 0.08, 0.09), (0.30, 0.17, 0.10), (0.45, 0.44, 0.45)])[int(random.integers(3))]
    image *= 1 - 0.10 * canvas.strokes([np.add(line, (0, 0.03)) for line in lines], 0.03, 0.02)
    canvas.paint(image, canvas.strokes(lines, random.choice([0.018, 0.03]), 0.004) * 0.92, tone)


def _in_window(image: np.ndarray, within: canvas.Window):
    """A view of the image there, and shape and strokes that draw there."""
    return image[:, *within], partial(canvas.shape, within=within), partial(canvas.strokes, within=within)


def _arch(ends, top, power: float) -> np.ndarray:
    """A lid (13, 2): from corner to corner through its highest (or lowest) point."""
    (x0, y0), (x1, y1) = ends
    t = np.linspace(0, 1, 13)
    peak = (top[0] - x0) / (x1 - x0)
    warped = np.where(t < peak, 0.5 * t / peak, 0.5 + 0.5 * (t - peak) / (1 - peak))
    rise = np.sin(np.pi * warped) ** power
    base = y0 + (y1 - y0) * t
    return np.stack([x0 + (x1 - x0) * t, base + (top[1] - (y0 + y1) / 2) * rise], 1)
