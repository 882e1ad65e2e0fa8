"""Channels last, unless torch's kernels are wrong there and the detector has need of them."""

import pytest
import torch
from torch import nn

from dist_fair.detectors.registry import make_detector
from dist_fair.detectors.timm_backbone import SoftPool2d
from dist_fair.engine.device import layout
from dist_fair.engine.device.layout import memory_format, pools_with_padding

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}


@pytest.mark.parametrize(
    ("name", "arguments", "padded"),
    [
        ("resnet18", SMALL, False),
        ("resnet18", {**SMALL, "smooth": True}, False),
        ("resnet18", {**SMALL, "avg_down": True}, False),  # windows of 2 x 2, side by side
        ("inception_v4", {}, True),
    ],
)
def test_detectors_that_average_beyond_the_map_are_found(name, arguments, padded):
    detector = make_detector(name, False, arguments, {})
    detector.train()
    assert pools_with_padding(detector, 96) == padded
    assert detector.training


@pytest.mark.parametrize(("wrong", "padded", "expected"), [
    (False, True, torch.channels_last),
    (True, False, torch.channels_last),
    (True, True, torch.contiguous_format),
])  # fmt: skip
def test_only_both_together_give_contiguous_images(monkeypatch, wrong, padded, expected):
    monkeypatch.setattr(layout, "_pools_wrongly", lambda device: wrong)
    monkeypatch.setattr(layout, "pools_with_padding", lambda detector, side: padded)
    assert memory_format(nn.Identity(), 64, torch.device("cuda")) == expected
    assert memory_format(nn.Identity(), 64, torch.device("cpu")) == torch.channels_last


def test_a_cpu_pools_rightly():
    assert not layout._pools_wrongly(torch.device("cpu"))


def test_soft_pool_is_a_weighted_mean_of_what_is_in_the_map():
    """By its definition, window by window; beyond the map there is nothing to weigh."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    found = SoftPool2d(3, 2, 1)(x)
    for row in range(3):
        for column in range(3):
            part = x[:, :, max(0, 2 * row - 1) : 2 * row + 2, max(0, 2 * column - 1) : 2 * column + 2].flatten(2)
            expected = (part.softmax(2) * part).sum(2)
            torch.testing.assert_close(found[:, :, row, column], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_pool_has_one_gradient_however_the_map_lies(dtype):
    """PyTorch issue 188344: avg_pool2d with a padding had two."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, 8, 16, 16, dtype=torch.float64), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    gradients = []
    for device, format in (("cpu", torch.contiguous_format), ("cuda", torch.channels_last)):
        image = x.to(device, dtype).contiguous(memory_format=format).detach().requires_grad_()
        (SoftPool2d(3, 2, 1)(image) * weights.to(device, dtype)).sum().backward()
        gradients.append(image.grad.double().cpu())
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)
