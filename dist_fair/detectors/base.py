"""What every detector is: images in, Outputs out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn


@dataclass
class Outputs:
    """What a detector says of a batch. Label 1 is fake; the score is softmax(logits)[:, 1].

    logits: (B, 2). features: (B, d), the input of the classifier. feature_map: (B, C, H, W), the last one, after
    normalisation and activation, masked. extras: whatever else the recipe's interventions need (`Intervention.needs`)
    and this detector offers, one row per sample. decode: of detectors with a decoder, (code, condition, keys), each
    with a row per image -> images (B, 3, H, W); not run before somebody asks.
    """

    logits: torch.Tensor
    features: torch.Tensor
    feature_map: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    decode: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


class Detector(nn.Module):
    """A feature map, a pooled feature and a classifier, in two steps so that interventions can act between them.

    channel_mask: (C,) of zeros and ones, a persistent buffer. It multiplies the feature map after normalisation and
    activation and before pooling: a masked channel's output and gradient are exactly zero.
    offers: the extras, beside logits and features, that it can be asked for.
    """

    offers: ClassVar[tuple[str, ...]] = ()

    channel_mask: torch.Tensor

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.channels, self.features = channels, features
        self.register_buffer("channel_mask", torch.ones(channels))

    def extract(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> Outputs:
        """(B, 3, H, W) -> Outputs whose logits are still empty, (B, 0).

        keys: of the rows, for dropout (dist_fair.keyed_rows); None, as in evaluation, for none. Extras: in training.
        """
        raise NotImplementedError

    def resize_classifier(self, features: int) -> None:
        """Gives the classifier another input width: a recipe may put a projection between features and classifier."""
        raise NotImplementedError

    def classify(self, features: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d) -> logits (B, 2)."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> Outputs:
        """Features and logits with nothing in between."""
        outputs = self.extract(images)
        outputs.logits = self.classify(outputs.features)
        return outputs

    def scoring_parameters(self) -> int:
        """How many parameters the score needs; the others only serve training."""
        return sum(parameter.numel() for parameter in self.parameters())
