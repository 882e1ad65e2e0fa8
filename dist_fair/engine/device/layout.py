"""How a detector's maps lie in memory: channels last, as its images come, unless torch computes wrongly there.

Convolutions of a GPU are made for channels last; the loader's bytes, permuted, lie so anyway. But torch 2.11 and others
give avg_pool2d with a padding a wrong gradient of such a map on a GPU, without a word (PyTorch issue 188344, of June
2026). So the kernel is tried on the device at hand; where it is wrong, detectors that pool so get contiguous images.
"""

from functools import cache

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dist_fair.detectors.base import Detector


def memory_format(detector: Detector, side: int, device: torch.device) -> torch.memory_format:
    """That of images and weights of a detector on a device. side: of its images, pixels; the detector is on the CPU."""
    wrong = device.type == "cuda" and _pools_wrongly(device) and pools_with_padding(detector, side)
    return torch.contiguous_format if wrong else torch.channels_last


@torch.no_grad()
def pools_with_padding(detector: Detector, side: int) -> bool:
    """Whether it averages over windows that reach beyond the map; by running it once, on a black image."""
    training, parameter = detector.training, next(detector.parameters())
    images = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
    with _Pools() as pools:
        detector.eval().extract(images)
    detector.train(training)
    return pools.padded


class _Pools(TorchDispatchMode):
    """Notes whether anything within it is an average pool with a padding."""

    def __init__(self):
        super().__init__()
        self.padded = False

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        if function is torch.ops.aten.avg_pool2d.default:
            padding = arguments[3] if len(arguments) > 3 else (named or {}).get("padding", 0)
            self.padded |= any(padding) if isinstance(padding, list | tuple) else bool(padding)
        return function(*arguments, **(named or {}))


@cache
def _pools_wrongly(device: torch.device) -> bool:
    """Whether the gradient of a padded average pool depends on how the map lies."""
    x = torch.arange(32.0, device=device).view(1, 2, 4, 4)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.contiguous(memory_format=layout).detach().requires_grad_()
        (functional.avg_pool2d(image, 2, 1, 1) * torch.arange(5.0, device=device)).sum().backward()
        gradients.append(image.grad)
    return not torch.allclose(*gradients)
