"""Densities of predictions on a grid over [0, 1]: Gaussian kernels, reflected at both ends."""

import torch
from torch.autograd.function import once_differentiable

FLOOR = 1e-12  # of a histogram's mass, in every bin: entropic transport takes the logarithm


def grid(points: int, like: torch.Tensor) -> torch.Tensor:
    """Midpoints of equal bins of [0, 1], (points,), in the dtype and on the device of `like`."""
    return (torch.arange(points, dtype=like.dtype, device=like.device) + 0.5) / points


def mirrored(at: torch.Tensor) -> torch.Tensor:
    """Points t (m,) and their mirror images -t and 2 - t at the ends of [0, 1], (3, m): the images of `kernels`."""
    return torch.stack([at, -at, 2 - at])


def kernels(predictions: torch.Tensor, images: torch.Tensor, bandwidth: float | torch.Tensor) -> torch.Tensor:
    """sum over t' in {t, -t, 2 - t} of exp(-((t' - p) / h)^2 / 2), (n, m), of predictions p (n,) at points t (m,).

    images: (3, m), see `mirrored`; they keep the mass inside [0, 1]. bandwidth: a number, or one for each prediction,
    (n, 1, 1). Differentiable in the predictions, once: the slope is made with the value, from the same exponentials.
    """
    return _Kernels.apply(predictions, images, bandwidth)


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predictions: torch.Tensor, images: torch.Tensor, bandwidth: float | torch.Tensor) -> torch.Tensor:
        distances, precision = images - predictions[:, None, None], bandwidth**-2
        heights = distances.square().mul_(-0.5 * precision).exp_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((distances.mul_(heights).sum(1, keepdim=True) * precision)[:, 0])
        return heights.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        (slope,) = ctx.saved_tensors
        return (gradient * slope).sum(1), None, None


def silverman(predictions: torch.Tensor, members: torch.Tensor, bins: int) -> torch.Tensor:
    """0.9 min(sd, IQR / 1.34) n^(-1/5) of each of k sets of predictions, detached (k,), clamped to [1 / bins, 0.2].

    predictions: (n,) ascending, n > 0. members: (k, n) bool. sd divides by n. Of a single prediction, of tied ones or
    of none the bandwidth is one bin.
    """
    p, inside = predictions.detach(), members.to(predictions)
    number = inside.sum(1).clamp_min(1)
    mean = inside @ p / number
    deviation = ((inside * (p - mean[:, None]).square()).sum(1) / number).sqrt()
    first, third = (_quantile(p, members.cumsum(1), u * (number - 1)) for u in (0.25, 0.75))
    return (0.9 * torch.minimum(deviation, (third - first) / 1.34) * number**-0.2).clamp(1 / bins, 0.2)


def _quantile(p: torch.Tensor, ranks: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Between the members floor(place) and the next, counted from 0. ranks: (k, n), how many members are up to here."""
    low = place.floor()
    wanted = torch.stack([low, low + 1], dim=1) + 1
    below, above = p[torch.searchsorted(ranks, wanted).clamp_max(len(p) - 1)].unbind(1)
    return torch.where(place > low, below + (place - low) * (above - below), below)
