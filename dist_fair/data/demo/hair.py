"""Hair: where it grows, its strands or curls, and its sheen. Drawn in front of the face and, if long, behind it."""

from dataclasses import dataclass

import cv2
import numpy as np

from dist_fair import keyed
from dist_fair.data.demo import canvas
from dist_fair.data.demo.canvas import AXIS, SIDE, X, Y
from dist_fair.data.demo.person import Person


@dataclass(frozen=True)
class Hair:
    """front: mask over the face, (SIDE, SIDE); back: mask behind neck and ears; colour: unlit hair, (3, SIDE, SIDE)."""

    front: np.ndarray
    back: np.ndarray
    colour: np.ndarray
    relief: np.ndarray


def grow(person: Person, outline: np.ndarray) -> Hair:
    """The hair of a person whose face has this outline (n, 2)."""
    random = keyed.generator(*person.key, "hair")
    front, back = _masks(person, outline, random)
    texture = _texture(person, random)
    ragged = canvas.noise(random, 40) * (0.25 + 0.2 * person.curl) + texture * 0.3
    front = np.clip((canvas.soften(front, 0.018) - 0.5) * 3.5 + 0.5 + ragged * 0.8, 0, 1) * (front > 0.004)
    front = canvas.soften(front.astype(np.float32), 0.006)
    relief = (canvas.soften(np.maximum(front, back), 0.1) * 0.35 + texture * (0.011 - 0.005 * person.curl)).astype(
        np.float32
    )
    # A band of sheen around the crown, where smooth hair turns towards the sky; coily hair scatters it away.
    sheen = np.exp(-(((np.hypot(X * 0.9, Y + 0.25) - 0.62) / 0.10) ** 2)) * (Y < 0) * (1 - person.curl) * 0.28
    value = 1 + texture * (0.18 - 0.06 * person.curl) + sheen * (1 + texture)
    roots = canvas.soften(back - front, 0.05).clip(0, 1) * 0.35
    colour = canvas.planes(person.hair) * (value - roots) + sheen * 0.10
    return Hair(front, back, np.clip(colour, 0.01, 1).astype(np.float32), relief)


def _masks(person: Person, outline: np.ndarray, random) -> tuple[np.ndarray, np.ndarray]:
    """Where hair lies in front of and behind the head."""
    volume = {
        "crop": 0.03,
        "short": 0.07 + 0.5 * person.volume,
        "tied": 0.05,
        "bald": 0.012,
        "round": 0.16 + person.volume,
    }.get(person.haircut, 0.03 + person.volume)
    cap, opening = _cap(person, outline, volume), _opening(person)
    if person.haircut in ("long", "bob"):
        back, beside = _falling(person, cap, volume, random)
        return np.maximum(cap * (1 - opening), back * beside), back
    if person.haircut == "tied" and person.part > 0:
        return cap * (1 - opening), np.maximum(canvas.shape(canvas.ellipse(0, -1.02, 0.27, 0.24)), cap)
    return cap * (1 - opening), cap


def _cap(person: Person, outline: np.ndarray, volume: float) -> np.ndarray:
    """All that hair covers above the ears, the face as yet too."""
    if person.haircut == "round":
        return canvas.shape(canvas.ellipse(0, -0.38, person.width + volume * 1.05, 0.62 + volume, 40))
    width = person.width
    above = outline[outline[:, 1] < 0.0]  # from the top down on the right, then up on the left
    crown = np.concatenate([above[len(above) // 2 :], above[: len(above) // 2]])
    scale = (width + volume * (0.55 if person.haircut == "short" else 1.0)) / width
    crown = crown * [scale, (0.95 + volume) / 0.95]
    bottom = {"crop": 0.02, "bald": 0.10, "short": 0.06, "tied": 0.1}.get(person.haircut, 0.25)
    return canvas.shape(np.concatenate([crown, [[width * scale, bottom], [-width * scale, bottom]]]))


def _opening(person: Person) -> np.ndarray:
    """The face. The forehead's edge: temples lower than the middle, shifted by the parting, pulled down by a fringe."""
    width, top = person.width, person.hairline
    side = {"crop": 0.05, "short": 0.10, "bald": 0.12}.get(person.haircut, 0.16)
    fringe = 0.20 * max(0.0, person.fringe - 0.55) / 0.45 if person.haircut in ("bob", "long", "short") else 0.0
    dip = 0.10 + 0.10 * (person.gender == "male") * person.age
    inside, part = width - side * 0.35, min(max(person.part, -0.22), 0.22)
    edge = [
        (-inside, 0.30), (-inside, -0.05), (-inside * 0.97, top + 0.26),
        (-width * 0.74, top + 0.11 - dip * 0.5 + fringe),
        (part - 0.17, top - 0.03 + fringe), (part + 0.13, top - 0.05 + fringe * 1.2),
        (width * 0.74, top + 0.11 - dip * 0.5 + fringe), (inside * 0.97, top + 0.26), (inside, -0.05), (inside, 0.30),
    ]  # fmt: skip
    opening = canvas.shape(canvas.smooth(edge), np.array([(-inside, 0.2), (inside, 0.2), (width, 1.4), (-width, 1.4)]))
    if person.haircut == "bald":
        opening = np.maximum(opening, canvas.shape(canvas.ellipse(0, -0.62, width * 0.93, 0.75)))
    return opening


def _falling(person: Person, cap: np.ndarray, volume: float, random) -> tuple[np.ndarray, np.ndarray]:
    """Long hair, behind the shoulders, and the part of it that falls beside the cheeks."""
    width = person.width
    length = 0.75 + 0.25 * random.random() if person.haircut == "bob" else 1.5
    spread = width + volume + 0.06 + 0.1 * person.curl
    falls = [
        (0, -0.98 - volume), (0.45, -0.86 - volume * 0.8), (spread * 0.97, -0.3), (spread, 0.3),
        (spread * 1.02, length),
        (0.2, length), (-0.2, length), (-spread * 1.02, length), (-spread, 0.3), (-spread * 0.97, -0.3),
        (-0.45, -0.86 - volume * 0.8),
    ]  # fmt: skip
    back = np.maximum(canvas.shape(canvas.smooth(falls)), cap)
    locks = width - 0.02 + 0.09 * random.random(2)
    reach = min(length, 0.55 + 0.8 * random.random())
    beside = [
        np.array([(sign * inner, -0.4), (sign * (inner - 0.05), 0.1), (sign * inner, reach), (sign * 1.3, reach),
                  (sign * 1.3, -0.4)])
        for sign, inner in zip((-1, 1), locks, strict=True)
    ]  # fmt: skip
    return back, canvas.shape(*beside, blur=0.01)


def _texture(person: Person, random) -> np.ndarray:
    """Strands that run down from the parting, waves, or coils: (SIDE, SIDE) of about unit deviation."""
    grain = random.standard_normal((SIDE, SIDE), np.float32)
    coils = cv2.GaussianBlur(grain, (0, 0), 1.3) - cv2.GaussianBlur(grain, (0, 0), 2.6)
    coils *= 1 / max(float(coils.std()), 1e-6)
    # Strands: noise that changes quickly across the angle around the crown and slowly along the radius.
    angle = np.arctan2(X - person.part, (Y + 1.25) * 0.8)
    radius = np.hypot(X - person.part, Y + 1.25)
    wave = np.sin(radius * 14 + AXIS[None] * 5) * 0.10 * min(person.curl, 0.6)
    strands = random.standard_normal((64, 512), np.float32)
    strands = cv2.GaussianBlur(strands, (0, 0), sigmaX=0.9, sigmaY=3)
    across, along = (angle + wave) * (130 / np.pi) + 256, radius * 18
    strands = cv2.remap(
        strands, across.astype(np.float32), along.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )
    strands *= 1 / max(float(strands.std()), 1e-6)
    share = float(np.clip((person.curl - 0.35) * 3, 0, 1))
    return strands * (1 - share) + coils * share
