"""Cameras: what turns a drawn frame into a photograph. Softness, noise, in-camera denoising, colour, JPEG.

Noise and softness come before any forgery, JPEG after it, as with videos taken from the internet.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dist_fair.data.demo.scene import SIZE


@dataclass(frozen=True)
class Camera:
    """A kind of camera; ranges are drawn once per video.

    softness: blur in pixels; noise: deviation in 0..255, more in the shade; denoise: share of a smoothing filter;
    sharpen: unsharp masking; resolution: the factor by which pictures are scaled down and up again; quality: of JPEG.
    """

    softness: tuple[float, float] = (0.3, 0.5)
    noise: tuple[float, float] = (2.0, 4.0)
    denoise: tuple[float, float] = (0.0, 0.0)
    sharpen: tuple[float, float] = (0.0, 0.0)
    resolution: tuple[float, float] = (1.0, 1.0)
    saturation: tuple[float, float] = (0.9, 1.1)
    quality: tuple[int, int] = (80, 95)


CAMERAS = {
    "studio": Camera(noise=(1.5, 3.0)),
    "phone": Camera(noise=(3.0, 6.0), sharpen=(0.2, 0.6), saturation=(1.0, 1.25), quality=(75, 92)),
    "webcam": Camera(softness=(0.5, 0.8), noise=(5.0, 9.0), saturation=(0.75, 1.0), quality=(70, 88)),
    "denoiser": Camera(softness=(0.5, 0.8), noise=(2.0, 4.0), denoise=(0.5, 0.9), quality=(75, 90)),
    # Only in shifted sets:
    "broadcast": Camera(softness=(0.4, 0.6), noise=(2.0, 5.0), resolution=(0.5, 0.75), quality=(30, 55)),
    "messenger": Camera(softness=(0.3, 0.6), noise=(3.0, 7.0), resolution=(0.45, 0.65), quality=(20, 45)),
    "night": Camera(softness=(0.6, 0.9), noise=(9.0, 15.0), saturation=(0.6, 0.9), quality=(65, 88)),
    "cinema": Camera(
        softness=(0.2, 0.4), noise=(1.0, 2.5), sharpen=(0.4, 0.9), saturation=(1.1, 1.4), quality=(88, 97)
    ),
}


@dataclass(frozen=True)
class Setting:
    """A camera with its ranges drawn: the same through one video."""

    softness: float
    noise: float
    denoise: float
    sharpen: float
    resolution: float
    saturation: float
    quality: int


def setting(camera: Camera, random: np.random.Generator, upload: np.random.Generator) -> Setting:
    """Draws a camera's ranges; the JPEG quality is drawn from `upload`, a stream of its own."""
    low, high = camera.quality
    drawn = [random.uniform(*part) for part in (camera.softness, camera.noise, camera.denoise, camera.sharpen)]
    return Setting(
        *drawn,
        random.uniform(*camera.resolution),
        random.uniform(*camera.saturation),
        int(upload.integers(low, high + 1)),
    )


def optics(image: np.ndarray, use: Setting) -> np.ndarray:
    """What lens, colour and sharpening make of a frame (SIZE, SIZE, 3) in 0..1: everything but noise."""
    image = cv2.GaussianBlur(image, (0, 0), use.softness)
    if use.sharpen:
        image = image + use.sharpen * (image - cv2.GaussianBlur(image, (0, 0), 1.0))
    grey = image.mean(2, keepdims=True)
    return np.clip(grey + use.saturation * (image - grey), 0, 1).astype(np.float32)


def expose(image: np.ndarray, use: Setting, random: np.random.Generator) -> np.ndarray:
    """A photograph of a frame: optics, noise (stronger in the shade, partly shared by the channels), denoising."""
    image = optics(image, use)
    grain = random.standard_normal((SIZE, SIZE, 3), np.float32) * 0.75
    grain += random.standard_normal((SIZE, SIZE, 1), np.float32) * 0.66
    image = image + grain * (np.float32(use.noise / 255) * (1.25 - 0.6 * image))
    if use.denoise:
        smooth = cv2.bilateralFilter(image, 5, 0.10, 2.0)
        image = image + np.float32(use.denoise) * (smooth - image)
    return np.clip(image, 0, 1)


def encode(image: np.ndarray, use: Setting) -> bytes:
    """The JPEG bytes of a photograph (SIZE, SIZE, 3) RGB in 0..1."""
    if use.resolution < 1:
        small = cv2.resize(image, None, fx=use.resolution, fy=use.resolution, interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    done, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, use.quality])
    assert done
    return data.tobytes()
