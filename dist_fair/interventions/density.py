"""Densities of predictions on a grid over [0, 1]: Gaussian kernels, reflected at both ends."""

import torch

FLOOR = 1e-12  # of a histogram's mass, in every bin: entropic transport takes the logarithm


def grid(points: int, like: torch.Tensor) -> torch.Tensor:
    """Midpoints of equal bins of [0, 1], (points,), in the dtype and on the device of `like`."""
    return (torch.arange(points, dtype=like.dtype, device=like.device) + 0.5) / points


def kernels(predictions: torch.Tensor, at: torch.Tensor, bandwidth: float | torch.Tensor) -> torch.Tensor:
    """sum over p' in {p, -p, 2 - p} of exp(-((t - p') / h)^2 / 2), (..., n, m), of predictions p (n,) at t (m,).

    The mirror images keep the mass inside [0, 1]. bandwidth: a number, or a tensor that broadcasts.
    """
    p = predictions[:, None]
    return sum(torch.exp(-0.5 * ((at - image) / bandwidth) ** 2) for image in (p, -p, 2 - p))


def histogram(numerators: torch.Tensor) -> torch.Tensor:
    """Kernel sums (..., m) as a distribution over the bins: sums to one, every bin at least about FLOOR.

    Where nothing was summed it is uniform, so that nobody who leaves it out gets a NaN in the gradient.
    """
    total = numerators.sum(-1, keepdim=True)
    q = numerators / torch.where(total > 0, total, 1) + FLOOR
    return q / q.sum(-1, keepdim=True)


def silverman(predictions: torch.Tensor, bins: int) -> torch.Tensor:
    """0.9 min(sd, IQR / 1.34) n^(-1/5) of predictions (n,), n > 0, a detached scalar clamped to [1 / bins, 0.2].

    sd divides by n. Of a single prediction, or of tied ones, the bandwidth is one bin.
    """
    p = predictions.detach()
    spread = torch.minimum(p.std(correction=0), torch.quantile(p, p.new_tensor([0.25, 0.75])).diff()[0] / 1.34)
    return (0.9 * spread * len(p) ** -0.2).clamp(1 / bins, 0.2)
