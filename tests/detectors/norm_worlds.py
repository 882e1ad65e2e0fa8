"""Norms to train, batches for them, and worlds for one process: ranks that are pretended, a stand-in for a GPU."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_fair.collectives import Communicator
from dist_fair.detectors import norm_kernels
from dist_fair.detectors.norm import convert_norms

CHANNELS = 5
SHAPES = {"rows": (), "sequence": (6,), "volume": (4, 3, 2)}  # behind (B, C); other kinds have IMAGES
IMAGES = (6, 5)
LAYOUTS = ("contiguous", "channels_last")


def network(kind):
    """Norm, non-linearity, mixing, norm: a gradient through the second norm's statistics reaches the first."""
    torch.manual_seed(3)
    if kind == "rows":
        layers = [nn.BatchNorm1d(CHANNELS), nn.Tanh(), nn.Linear(CHANNELS, 4), nn.BatchNorm1d(4)]
    elif kind == "sequence":
        layers = [nn.BatchNorm1d(CHANNELS), nn.Tanh(), nn.Conv1d(CHANNELS, 4, 3), nn.BatchNorm1d(4, affine=False)]
    elif kind == "volume":
        layers = [nn.BatchNorm3d(CHANNELS), nn.Tanh(), nn.Conv3d(CHANNELS, 4, 2), nn.BatchNorm3d(4)]
        layers[-1].bias = None
    elif kind == "timm":
        layers = [BatchNormAct2d(CHANNELS, act_layer=nn.SiLU), nn.Conv2d(CHANNELS, 4, 3), BatchNormAct2d(4)]
    elif kind == "untracked":
        untracked = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
        layers = [untracked, nn.Tanh(), nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4, momentum=0.4)]
    else:
        layers = [nn.BatchNorm2d(CHANNELS), nn.Tanh(), nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4, momentum=None)]
    module = nn.Sequential(*layers).double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def maps(shape, layout, rows, channels=CHANNELS, seed=4):
    """(B, C, *shape) fp64. channels_last as the loader's images are: (B, *shape, C) in memory, the channels moved."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, *shape, channels)) * (generator.random(channels) + 0.5) + 2
    x = torch.from_numpy(x).movedim(-1, 1)
    return x if layout == "channels_last" else x.contiguous()


def train(comm, kind, layout, sizes, mode, steps=3):
    """Outputs, gradients and buffers of this rank after some steps of an objective that couples all rows."""
    module = convert_norms(network(kind), mode, comm)
    whole = maps(SHAPES.get(kind, IMAGES), layout, sum(sizes))
    start = sum(sizes[: comm.rank])
    for step in range(steps):
        x = (whole[start : start + sizes[comm.rank]] * (1 + step)).requires_grad_()
        module.zero_grad()
        y = module(x)
        coefficients = torch.linspace(-1, 1, y.shape[1:].numel(), dtype=torch.float64).view(y.shape[1:])
        means = comm.replicated_sum(((y + 0.3) ** 3 * coefficients).flatten(2 if y.ndim > 2 else 1).sum(0), "test")
        (means / len(whole)).square().sum().backward()
    return {
        "outputs": y.detach(),
        "inputs": x.grad / comm.world,  # the one gradient rule
        # DDP's average
        **{name: comm.sum(p.grad, "ddp") / comm.world for name, p in module.named_parameters()},
        **{f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()},
    }


def expected(kind, layout, rows):
    """What torch's norm gives on the whole batch."""
    return train(Communicator(), kind, layout, (rows,), "local")


def differences(ranks, expected):
    """The names of results that differ from the whole batch's by more than 1e-10."""
    found = set()
    for name, value in expected.items():
        if name in ("outputs", "inputs"):
            actual = [torch.cat([rank[name] for rank in ranks])]
        else:
            actual = [rank[name] for rank in ranks]
        for tensor in actual:
            if not torch.allclose(tensor.double(), value.double(), rtol=1e-10, atol=1e-10):
                found.add(name)
    return found


# One process as a rank of several -------------------------------------------------------------------------------------


def pretended(copies=1):
    """A communicator of several ranks: the others hold no rows, or `copies` ranks hold the same ones as this."""
    comm = Communicator()
    comm.world = 2
    comm.names = []

    def sum_over_ranks(tensor, name):
        assert tensor.dtype == torch.float64
        assert not torch.compiler.is_compiling()
        comm.names.append(name)
        return tensor.detach() * copies

    comm.sum = sum_over_ranks
    return comm


class Calls(TorchDispatchMode):
    """Within it: every call that torch dispatches, (operation, arguments), but for views and new memory."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("detach", "empty_like", "new_empty"):
            self.made.append((name, arguments))
        return function(*arguments, **(keywords or {}))

    def names(self):
        return [name for name, _ in self.made]


# A GPU ----------------------------------------------------------------------------------------------------------------


@contextmanager
def gpu_kernels():
    """Within it norms on the CPU take the way of a GPU: its four kernels are the functions below.

    They are registered with torch, so that order and types of arguments are checked as on a GPU, and refuse what the
    real ones would misread, copy, or return in another format.
    """
    library = torch.library.Library("aten", "IMPL", "CPU")
    for kernel in (batch_norm_update_stats, batch_norm_elemt, batch_norm_backward_reduce, batch_norm_backward_elemt):
        library.impl(kernel.__name__, kernel)
    with mock.patch.object(norm_kernels, "serve", return_value=True):
        yield
    del library


def batch_norm_update_stats(x, running_mean, running_var, momentum):
    checked(x)
    assert running_mean is running_var is None
    precise = x.to(accumulated(x)).transpose(0, 1).flatten(1)
    return precise.mean(1), precise.var(1, correction=0)


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    checked(x, weight, bias, mean, invstd)
    y = (x - column(mean, x)) * column(invstd, x) * column(weight, x, 1) + column(bias, x, 0)
    return torch.empty_like(x).copy_(y)


def batch_norm_backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    checked(x, mean, invstd, weight)
    checked(dy, like=x)
    assert input_g
    assert weight is not None or not (weight_g or bias_g)  # they are made of the weight's type
    centred = (x - column(mean, x)) * dy
    s1, s2 = (one.to(accumulated(x)).transpose(0, 1).flatten(1).sum(1) for one in (dy, centred))
    return s1, s2, s2 * invstd if weight_g else s2.new_empty(0), s1.clone() if bias_g else s1.new_empty(0)


def batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    checked(x, mean, invstd, weight, sum_dy, sum_dy_xmu)
    checked(dy, like=x)
    assert count.dtype == torch.int32
    total = count.sum()
    projected = (x - column(mean, x)) * column(invstd**2 * sum_dy_xmu / total, x)
    dx = (dy - column(sum_dy / total, x) - projected) * column(invstd, x) * column(weight, x, 1)
    return torch.empty_like(x).copy_(dx)


def checked(x, *vectors, like=None):
    """x must be dense, as `like` is, and not empty; vectors (C,), contiguous, in the type of sums over x."""
    assert x.numel()
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    fitting = [one for one in formats if (x if like is None else like).is_contiguous(memory_format=one)]
    assert any(x.is_contiguous(memory_format=one) for one in fitting), f"strides {x.stride()} of {tuple(x.shape)}"
    for vector in vectors:
        assert vector is None or (vector.dtype, vector.shape) == (accumulated(x), (x.shape[1],))
        assert vector is None or vector.is_contiguous()


def accumulated(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def column(vector, x, otherwise=None):
    """(C,) -> (C, 1, ...), to go with x (B, C, ...)."""
    return otherwise if vector is None else vector.view(-1, *[1] * (x.ndim - 2))
