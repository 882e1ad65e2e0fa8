"""What a rank computes alone of a synced batch norm on a GPU: the kernels of torch.nn.SyncBatchNorm, without its wire.

    moments          x                          ->  mean_r, var_r (biased), in fp32 for half precision
    normalised       x, global mean and std     ->  y
    sums             dy, x                      ->  S1_r = sum dy, S2_r = sum dy (x - mean), and dweight
    input_gradient   dy, x, S1/N, S2/N          ->  dx

They exist for CUDA alone, each is one launch (and where maps are large and channels_last a fill of its counters), and
they are not differentiable; dist_fair.detectors.norm puts the wire between them. What they want of their arguments:

- x is contiguous or channels_last, and dy is what x is: torch has kernels for either, for a mixture it has copies, and
  a dx that is contiguous whatever x is. `dense` sees to it, as a rule without a copy.
- mean, invstd and sums are in fp32, in fp64 for fp64. weight and bias are in that type too: some of the kernels also
  take x's own, others read it as fp32.
- batch_norm_backward_elemt divides by the sum of a tensor of int32, to hold each rank's number of values. Here the sums
  come divided, in fp64, and the tensor holds a 1: a global number of values, 2^31 on 2,048 ranks with 64 maps of
  128 x 128 each, would not fit.
- batch_norm_stats gives 1 / sqrt(var + eps), from which a small variance cannot be had back; batch_norm_update_stats,
  given no running statistics, gives the variance itself in the same pass.
"""

from functools import cache

import torch


def serve(x: torch.Tensor) -> bool:
    """Whether these kernels exist where x is."""
    return x.is_cuda


def dense(x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """x in the format of `like`, by default its own: channels_last or channels_last_3d, contiguous if it is neither."""
    like = x if like is None else like
    for wanted in (torch.channels_last, torch.channels_last_3d):
        if like.is_contiguous(memory_format=wanted):
            return x.contiguous(memory_format=wanted)
    return x.contiguous()


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of x (B, C, ...), dense."""
    return torch.batch_norm_update_stats(x, None, None, 0.0)


def normalised(x, mean, invstd, weight, bias, eps: float) -> torch.Tensor:
    """y = weight (x - mean) invstd + bias, of x's type and format. weight, bias: (C,) or None; eps is not looked at."""
    return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)


def sums(dy, x, mean, invstd, weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """S1 = sum dy, S2 = sum dy (x - mean) and dweight = S2 invstd, (C,) each; no dweight without a weight."""
    weighted = weight is not None
    s1, s2, dweight, _ = torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, weighted, False)
    return s1, s2, dweight if weighted else None


def input_gradient(dy, x, mean, invstd, weight, mean1, mean2) -> torch.Tensor:
    """dx = weight invstd (dy - mean1 - (x - mean) invstd^2 mean2). mean1, mean2: global S1/N and S2/N, (C,)."""
    return torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, mean1, mean2, _one(x.device))


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones(1, dtype=torch.int32, device=device)
