"""The decoder of PG-FDD (Lin et al. 2024, sec. 3.1): an image from what is forged and what it is forged on.

The code says what to draw; the condition, by the mean and spread of each of its channels, in which manner: AdaIN
(Huang and Belongie 2017) takes the code's own mean and spread out and puts the condition's in, before each stage.
"""

import torch
from torch import nn
from torch.nn import functional

from dist_fair import keyed
from dist_fair.detectors.timm_backbone import full_precision
from dist_fair.keyed_rows import dropout, mixed

_STAGES = 3
_EPS = 1e-5


def adain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Adaptive instance norm: x (B, C, h, w) with the mean and standard deviation of y (B, C, h', w'), per sample and
    channel over all positions: (x - mean(x)) / std(x) * std(y) + mean(y), std = sqrt(unbiased variance + 1e-5).

    In fp32 for half-precision input. Not defined for one position: it has no variance. What it gives has exactly the
    mean of y, whatever x: averaged over positions, nothing of x is left.
    """
    x, y = x.to(full_precision(x)), y.to(full_precision(y))
    variance_x, mean_x = torch.var_mean(x, dim=(2, 3), keepdim=True)
    variance_y, mean_y = torch.var_mean(y, dim=(2, 3), keepdim=True)
    return (x - mean_x) * ((variance_y + _EPS) / (variance_x + _EPS)).sqrt() + mean_y


class ConditionalDecoder(nn.Module):
    """A conditional U-Net: code and condition, both (B, width, h, w) -> images (B, 3, H, W) in (-1, 1).

    Three stages halve the channels and double the sides: bilinear x2, dropout, two 3x3 convolutions with ReLU. AdaIN
    comes before each; for its statistics the condition goes through the first two stages too, by the same weights and
    with dropout of its own. Then a 1x1 convolution to RGB, bilinear to the size of the image, tanh.
    """

    def __init__(self, width: int, rate: float):
        super().__init__()
        widths = [width >> stage for stage in range(_STAGES + 1)]
        self.rate = rate
        self.stages = nn.ModuleList(map(_convolutions, widths, widths[1:]))
        self.rgb = nn.Conv2d(widths[-1], 3, 1)

    def forward(
        self, code: torch.Tensor, condition: torch.Tensor, size: tuple[int, int], keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """size: (H, W). keys: (B,) of the rows, for dropout; None for none."""
        for number in range(_STAGES):
            code = self._stage(number, adain(code, condition), keys, "code")
            if number + 1 < _STAGES:
                condition = self._stage(number, condition, keys, "condition")
        return _resized(self.rgb(code), size).tanh()

    def _stage(self, number: int, x: torch.Tensor, keys: torch.Tensor | None, path: str) -> torch.Tensor:
        x = _resized(x, (2 * x.shape[2], 2 * x.shape[3]))
        if keys is not None:
            x = dropout(x, self.rate, mixed(keys, keyed.integer("dropout", "decoder", path, number)))
        return self.stages[number](x)


def _convolutions(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
    )


def _resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return functional.interpolate(x, size, mode="bilinear", align_corners=True)
