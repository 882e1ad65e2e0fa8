"""train.checkpoint_activations: what it is refused for. That it changes nothing else is in test_backends.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors import build_detector
from dist_fair.engine.activations import checkpoint_activations
from dist_fair.errors import DistFairError

RESNET = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32]}


def recipe(wanted=True):
    return SimpleNamespace(train=SimpleNamespace(checkpoint_activations=wanted),
                           detector=SimpleNamespace(name="resnet18", norm="synced"))  # fmt: skip


def detector(**arguments):
    return build_detector("resnet18", False, "synced", RESNET | arguments, Communicator(), {})


def test_blocks_run_again_in_backward():
    one, runs = detector(norm_layer="groupnorm"), []
    checkpoint_activations(recipe(), one)
    one.backbone.layer2[0].register_forward_pre_hook(lambda *_: runs.append(1))
    one(torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert len(runs) == 2


def test_it_is_off_by_default():
    one = detector()
    checkpoint_activations(recipe(wanted=False), one)
    assert not one.backbone.grad_checkpointing


def test_statistics_that_would_count_twice_are_refused():
    with pytest.raises(DistFairError, match=r"layer 'backbone\.bn1' of detector\.name=resnet18 keeps, .* batch twice"):
        checkpoint_activations(recipe(), detector())


class Without(nn.Module):
    def set_grad_checkpointing(self, enable=True):
        assert not enable, "as timm's models say it that cannot"


@pytest.mark.parametrize("backbone", [Without(), nn.Linear(2, 2)])
def test_a_backbone_that_cannot_is_refused(backbone):
    with pytest.raises(DistFairError, match=r"the backbone of detector\.name=resnet18 cannot"):
        checkpoint_activations(recipe(), nn.Sequential(backbone))
