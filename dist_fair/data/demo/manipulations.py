"""Forgeries: local changes inside a real photograph's face, each leaving a weak trace; nothing changes outside it.

All take and return a photograph (SIZE, SIZE, 3) RGB in 0..1. The constants say how strong the traces are; they were
set so that plain training (cross-entropy, a small residual network, 64 pixels) is neither perfect nor lost.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from dist_fair.data.demo.scene import SIZE, Picture

# Pixels lost to generation: swapped and spliced parts are made at this share of the resolution.
SWAP_RESOLUTION = (0.38, 0.60)
SPLICE_RESOLUTION = (0.35, 0.55)
# Share of the colour difference between the two people that remains after colour transfer.
COLOUR_RESIDUE = 0.5
# Strongest displacement of mouth corners and brows, pixels, and the softness of re-rendering.
WARP = (2.5, 5.0)
WARP_SOFTNESS = 1.1
# Share of the resolution that texture re-synthesis keeps.
RESAMPLE = (0.30, 0.45)
# Unseen families: share of the smoothing filter; height of the lattice in 0..1; share of the donor in a morph.
RETOUCH = (0.8, 1.0)
LATTICE = (0.015, 0.03)
MORPH = (0.4, 0.6)


@dataclass(frozen=True)
class Forgery:
    """What a forger has for one frame.

    photo: the real photograph; target: how it was drawn (for the masks); donor: the same moment with another person,
    seen by the same camera; strength: 0..1, where in the ranges above this video lies; random: of this frame.
    """

    photo: np.ndarray
    target: Picture
    donor: Picture | None
    strength: float
    random: np.random.Generator

    def between(self, ends: tuple[float, float]) -> float:
        """The value at this video's strength: `ends` from strong to weak or the other way round, as named above."""
        return ends[0] + self.strength * (ends[1] - ends[0])


def face_swap(forgery: Forgery) -> np.ndarray:
    """The whole inner face of another person, coarser, colours matched, blended softly."""
    donor = _coarse(forgery.donor.image, forgery.between(SWAP_RESOLUTION))
    mask = forgery.target.face * cv2.GaussianBlur(forgery.target.face, (0, 0), 2.0)
    return _blend(forgery.photo, _match(donor, forgery.photo, mask), mask)


def eye_splice(forgery: Forgery) -> np.ndarray:
    """Eyes and brows of another person."""
    return _splice(forgery, forgery.target.eyes)


def mouth_splice(forgery: Forgery) -> np.ndarray:
    """The mouth of another person."""
    return _splice(forgery, forgery.target.mouth)


def expression(forgery: Forgery) -> np.ndarray:
    """Mouth and brows pushed into another expression: a smooth warp, re-rendered a little too soft."""
    photo, target, random = forgery.photo, forgery.target, forgery.random
    size = forgery.between(WARP[::-1])
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    (x, y), (_, brow) = _centre(target.mouth), _centre(target.eyes)
    down, across = np.zeros((2, SIZE, SIZE), np.float32)
    lift = size * random.choice([-1, 1])
    for side in (-1, 1):
        corner = np.exp(-(((columns - x - side * 8) / 5) ** 2) - ((rows - y) / 5) ** 2)
        down += lift * corner
        across -= side * 0.6 * size * random.uniform(0.3, 1) * corner
    down += 0.6 * size * random.choice([-1, 1]) * np.exp(-(((rows - brow + 3) / 5) ** 2)) * target.eyes
    part = np.clip(target.mouth + target.eyes, 0, 1)
    moved = cv2.remap(photo, columns + across, rows + down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return _blend(photo, cv2.GaussianBlur(moved, (0, 0), WARP_SOFTNESS), part)


def resample(forgery: Forgery) -> np.ndarray:
    """The face's texture made again from fewer pixels."""
    return _blend(forgery.photo, _coarse(forgery.photo, forgery.between(RESAMPLE)), forgery.target.face)


def retouch(forgery: Forgery) -> np.ndarray:
    """Skin smoothed, edges kept."""
    smooth = cv2.bilateralFilter(forgery.photo, 7, 0.12, 3.0)
    return _blend(forgery.photo, smooth, forgery.target.face * forgery.between(RETOUCH[::-1]))


def lattice(forgery: Forgery) -> np.ndarray:
    """The faint lattice that strided upsampling leaves, on a slightly coarser face."""
    wave = np.cos(np.arange(SIZE, dtype=np.float32) * (np.pi / 2))
    pattern = (wave[:, None] + wave[None]) * forgery.between(LATTICE[::-1])
    return _blend(forgery.photo, _coarse(forgery.photo, 0.6) + pattern[..., None], forgery.target.face)


def morph(forgery: Forgery) -> np.ndarray:
    """Two people laid over each other: doubled edges, half the grain."""
    mask = forgery.target.face
    donor = _match(_coarse(forgery.donor.image, 0.7), forgery.photo, mask)
    return _blend(forgery.photo, donor, mask * forgery.between(MORPH[::-1]))


FAMILIES: dict[str, Callable[[Forgery], np.ndarray]] = {
    "FaceSwap": face_swap,
    "Expression": expression,
    "Resample": resample,
    "EyeSplice": eye_splice,
    "MouthSplice": mouth_splice,
    "Retouch": retouch,
    "Lattice": lattice,
    "Morph": morph,
}
SEEN = ("FaceSwap", "Expression", "Resample", "EyeSplice", "MouthSplice")
SWAPS = ("FaceSwap", "EyeSplice", "MouthSplice")
UNSEEN = ("Retouch", "Lattice", "Morph")
WITH_DONOR = (*SWAPS, "Morph")


def _splice(forgery: Forgery, mask: np.ndarray) -> np.ndarray:
    donor = _coarse(forgery.donor.image, forgery.between(SPLICE_RESOLUTION))
    return _blend(
        forgery.photo, _match(donor, forgery.photo, cv2.GaussianBlur(mask, (0, 0), 2.0)), np.clip(1.4 * mask, 0, 1)
    )


def _blend(photo: np.ndarray, change: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The change where the mask is; where the mask is zero, the photograph's very pixels."""
    return np.clip(photo + mask[..., None] * (change - photo), 0, 1)


def _coarse(image: np.ndarray, resolution: float) -> np.ndarray:
    small = cv2.resize(image, None, fx=resolution, fy=resolution, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def _match(donor: np.ndarray, photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Colour transfer: the donor's mean and deviation under the mask become the photograph's, up to the residue."""
    weight = mask / max(float(mask.sum()), 1e-6)

    def moments(image):
        mean = (image * weight[..., None]).sum((0, 1))
        return mean, np.sqrt((((image - mean) ** 2) * weight[..., None]).sum((0, 1)) + 1e-6)

    (mean, deviation), (wanted, spread) = moments(donor), moments(photo)
    matched = (donor - mean) * np.clip(spread / deviation, 0.6, 1.6) + wanted
    return (matched + COLOUR_RESIDUE * np.clip(mean - wanted, -0.15, 0.15)).astype(np.float32)


def _centre(mask: np.ndarray) -> tuple[float, float]:
    moments = cv2.moments(mask)
    area = moments["m00"] or 1.0
    return moments["m10"] / area, moments["m01"] / area
