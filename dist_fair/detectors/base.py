"""What every detector is: images in, Outputs out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from dist_fair.errors import DistFairError


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
    activation and before pooling: a masked channel's output and gradient are exactly zero. None after `prune`.
    offers: the extras, beside logits and features, that it can be asked for.
    """

    offers: ClassVar[tuple[str, ...]] = ()

    channel_mask: torch.Tensor

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.channels, self.features = channels, features
        self.register_buffer("channel_mask", torch.ones(channels))
        self.register_buffer("kept_channels", None, persistent=False)

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

    def features_layer(self) -> nn.Linear:
        """The classifier's layer that reads the features."""
        raise NotImplementedError

    def unmasked(self, feature_map: torch.Tensor) -> torch.Tensor:
        """The feature map (B, C, h, w) with masked channels zero; after `prune`, without them."""
        if self.channel_mask is not None:
            feature_map = feature_map * self.channel_mask.to(feature_map.dtype)[:, None, None]
        return feature_map if self.kept_channels is None else feature_map[:, self.kept_channels]

    def prune(self, kept: torch.Tensor) -> None:
        """Leaves only the channels `kept` (k,), ascending: C and d become k. For detectors that will only score.

        The others are no longer made where `narrow` can do that, else taken from the feature map before it is pooled.
        The classifier is the caller's to resize. Raises DistFairError where features are not one per channel.
        """
        if self.features != self.channels:
            raise DistFairError(f"{type(self).__name__} makes {self.features} features of {self.channels} channels: "
                                "masked channels cannot be removed")  # fmt: skip
        if len(kept) < self.channels and not self.narrow(kept):
            self.kept_channels = kept.to(self.channel_mask.device)
        self.channel_mask = None
        self.channels = self.features = len(kept)

    def narrow(self, kept: torch.Tensor) -> bool:
        """Removes all channels but `kept` (k,) from the layers that make the feature map; False where it cannot."""
        return False

    def forward(self, images: torch.Tensor) -> Outputs:
        """Features and logits with nothing in between."""
        outputs = self.extract(images)
        outputs.logits = self.classify(outputs.features)
        return outputs

    def scoring_parameters(self) -> int:
        """How many parameters the score needs; the others only serve training."""
        return sum(parameter.numel() for parameter in self.parameters())


def keep_outputs(layer: nn.Module, kept: torch.Tensor) -> None:
    """Narrows a convolution without groups or a batch norm, in place, to its output channels `kept` (k,)."""
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(layer, name, nn.Parameter(parameter.detach()[kept], parameter.requires_grad))
    for name, buffer in layer.named_buffers(recurse=False):
        if buffer.dim():  # all but the count of batches
            setattr(layer, name, buffer[kept])
    setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "num_features", len(kept))
