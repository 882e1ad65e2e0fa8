"""Random changes of training images, small enough to leave faces faces and fakes fakes.

Every number is drawn for every sample, used or not, from its own column of a table keyed by (seed, epoch, sample): no
rank, worker or batch enters, and switching one change on leaves the draws of all others as they are.
"""

from typing import Protocol

import numpy as np

from dist_fair.data.hashing import uniforms
from dist_fair.data.opencv import opencv

BLUR_SIGMA = (0.3, 1.5)  # pixels
FLIP, SHIFT_X, SHIFT_Y, BRIGHTNESS, CONTRAST, BLUR, BLUR_AMOUNT, NOISE, NOISE_SEED, JPEG, QUALITY = range(11)
DRAWS = 11


class Settings(Protocol):
    """What a recipe says: dist_fair.recipe.Augmentation.

    flip, blur, jpeg: probabilities. shift: largest shift as part of the width. brightness, contrast: largest relative
    change. noise: largest standard deviation, images in 0..1. jpeg_quality: lowest and highest.
    """

    flip: float
    shift: float
    brightness: float
    contrast: float
    noise: float
    blur: float
    jpeg: float
    jpeg_quality: list[int]


def draws(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The random numbers of a batch, (B, DRAWS) in [0, 1)."""
    return uniforms(samples, epochs, DRAWS, seed, "augment")


def augment(image: np.ndarray, settings: Settings, drawn: np.ndarray) -> np.ndarray:
    """An RGB image (S, S, 3) uint8, changed as its numbers `drawn` (DRAWS,) say: in the order in which light,
    lens, sensor and file change a photograph.
    """
    cv2 = opencv()
    drawn = drawn.tolist()
    if drawn[FLIP] < settings.flip:
        image = cv2.flip(image, 1)
    if settings.shift:
        image = _shifted(image, settings.shift, drawn)
    if settings.brightness or settings.contrast:
        image = _relit(image, settings, drawn)
    if drawn[BLUR] < settings.blur:
        low, high = BLUR_SIGMA
        image = cv2.GaussianBlur(image, (0, 0), low + (high - low) * drawn[BLUR_AMOUNT])
    if settings.noise:
        image = _noisy(image, settings.noise * drawn[NOISE], int(drawn[NOISE_SEED] * 2**53))
    if drawn[JPEG] < settings.jpeg:
        image = _compressed(image, settings.jpeg_quality, drawn[QUALITY])
    return image


def _shifted(image: np.ndarray, most: float, drawn: list[float]) -> np.ndarray:
    """Moved by whole pixels; what enters at the border is the image reflected."""
    cv2 = opencv()
    height, width = image.shape[:2]
    across = round((2 * drawn[SHIFT_X] - 1) * most * width)
    down = round((2 * drawn[SHIFT_Y] - 1) * most * height)
    x, y = abs(across), abs(down)
    larger = cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_REFLECT_101)
    return larger[y - down : y - down + height, x - across : x - across + width]


def _relit(image: np.ndarray, settings: Settings, drawn: list[float]) -> np.ndarray:
    """Brightness scales all values, contrast their distance from the image's mean; through a table of 256 entries."""
    cv2 = opencv()
    bright = 1 + settings.brightness * (2 * drawn[BRIGHTNESS] - 1)
    contrast = 1 + settings.contrast * (2 * drawn[CONTRAST] - 1)
    middle = image.mean() * bright
    table = (np.arange(256) * bright - middle) * contrast + middle
    return cv2.LUT(np.ascontiguousarray(image), np.clip(np.rint(table), 0, 255).astype(np.uint8))


def _noisy(image: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    field = np.random.Generator(np.random.Philox(key=seed)).standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image + field * np.float32(255 * deviation)), 0, 255).astype(np.uint8)


def _compressed(image: np.ndarray, quality: list[int], drawn: float) -> np.ndarray:
    cv2 = opencv()
    low, high = quality
    level = low + int((high - low + 1) * drawn)
    _, code = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, level])
    return cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
