"""What every detector is: images in, Outputs out."""

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Outputs:
    """What a detector says of a batch. Label 1 is fake; the score is softmax(logits)[:, 1].

    logits: (B, 2). features: (B, d), the input of the classifier. feature_map: (B, C, H, W), the last one, after
    normalisation and activation, masked. extras: whatever else a detector offers its own interventions.
    """

    logits: torch.Tensor
    features: torch.Tensor
    feature_map: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)


class Detector(nn.Module):
    """A feature map, a pooled feature and a classifier, in two steps so that interventions can act between them.

    channel_mask: (C,) of zeros and ones, a persistent buffer. It multiplies the feature map after normalisation and
    activation and before pooling: a masked channel's output and gradient are exactly zero.
    """

    channel_mask: torch.Tensor

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.channels, self.features = channels, features
        self.register_buffer("channel_mask", torch.ones(channels))

    def extract(self, images: torch.Tensor) -> Outputs:
        """(B, 3, H, W) -> Outputs whose logits are still empty, (B, 0)."""
        raise NotImplementedError

    def resize_classifier(self, features: int) -> None:
        """Gives the classifier another input width: a recipe may put a projection between features and classifier."""
        raise NotImplementedError

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """(B, d) -> logits (B, 2)."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> Outputs:
        """Features and logits with nothing in between."""
        outputs = self.extract(images)
        outputs.logits = self.classify(outputs.features)
        return outputs
