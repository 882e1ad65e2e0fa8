"""Fair deepfake detection, trained at any scale, with the same answer on 1 GPU or 512."""

__version__ = "0.1.0"
