"""Detectors that settings allow and devices do not: what only a real step finds."""

import torch

from dist_fair.detectors import registered
from dist_fair.detectors.registry import make_detector

ASSERTION = "save_mean->defined() INTERNAL ASSERT FAILED at Normalization.cu:607"
MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
FULL = "full"


class _Crash(torch.autograd.Function):
    """Forward fine, backward an assertion in a kernel, as the synced norm on the first GPU that saw a real batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(f"{ASSERTION}, please report a bug to PyTorch.\nC++ CapturedTraceback:")


def crashing(pretrained, arguments, needs):
    """A small ResNet whose backward pass crashes."""
    return _with(arguments, lambda features: _Crash.apply(features))


def full(pretrained, arguments, needs):
    """A small ResNet that does not fit."""

    def grow(features):
        if features.requires_grad:
            raise torch.OutOfMemoryError(f"{MEMORY} of which 1.50 GiB is free.")
        return features

    return _with(arguments, grow)


def _with(arguments, change):
    detector = make_detector("resnet18", False, arguments, {})
    classify = detector.classify
    detector.classify = lambda features, keys=None: classify(change(features), keys)
    return detector


DETECTORS = {"crashing": crashing, FULL: full}


def known(monkeypatch):
    """Recipes may name them from here on."""
    from dist_fair.detectors import registry

    for name, factory in DETECTORS.items():
        monkeypatch.setitem(registry._registry, name, factory)
    assert DETECTORS.keys() <= registered().keys()
