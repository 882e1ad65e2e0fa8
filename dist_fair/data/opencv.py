"""The import of OpenCV, with an error that says what its absence means."""

from functools import cache
from types import ModuleType

from dist_fair.errors import DistFairError


@cache
def opencv() -> ModuleType:
    """The module cv2. Raises DistFairError where it is missing or lacks a system library."""
    try:
        import cv2
    except ImportError as error:
        raise DistFairError(
            f"OpenCV cannot be imported ({error}): opencv-python needs the system libraries libGL and glib "
            "(apt install libgl1 libglib2.0-0); opencv-python-headless provides the same cv2 without them "
            "(pip uninstall -y opencv-python && pip install opencv-python-headless)"
        ) from error
    return cv2
