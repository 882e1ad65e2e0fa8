"""What is trained: images in, Outputs out. Importing this package registers the detectors that are not timm's."""

from dist_fair.detectors import pg_fdd
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.detectors.registry import build_detector, register, registered
from dist_fair.detectors.weights import load_state, load_weights

__all__ = ["Detector", "Outputs", "build_detector", "load_state", "load_weights", "pg_fdd", "register", "registered"]
