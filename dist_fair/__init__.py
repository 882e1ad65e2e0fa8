"""Fair deepfake detection, trained at any scale, with the same answer on 1 GPU or 512."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from dist_fair.engine.deployment import DeployedDetector

__version__ = "0.1.0"


def load_detector(path: "str | Path", device: "torch.device | str" = "cpu") -> "DeployedDetector":
    """The detector in a folder that `dist-fair export` made: an nn.Module, images in, probabilities of fake out.

        detector = dist_fair.load_detector("runs/a/detector")
        scores = detector(detector.preprocess(["one.jpg", "two.png"]))      # (2,)

    Needs no recipe and no training data; nothing in the folder is executed. Raises DistFairError if it is no exported
    detector, or a damaged one.
    """
    from dist_fair.engine import deployment  # here, so that `import dist_fair` stays quick

    return deployment.load_detector(path, device)
