"""The mean of the worst part of some losses (conditional value at risk), without a search on the host.

    CVaR_alpha(l)  =  min over lambda of  lambda + sum_i [l_i - lambda]_+ / k,      k = alpha n

is the mean of the k largest of n losses, the last of them in part; with k below 1 it is the largest. By the envelope
theorem its gradient is that of the mean with its weights held fixed. Nothing here waits for the device.
"""

import math

import torch
from torch.nn import functional

TAU_1, TAU_2 = 1e-3, 1e-4  # of PG-FDD's smoothed form, as in its released code
LARGEST_EXPONENT = math.log(torch.finfo(torch.float32).max)  # 88.7: beyond it exp overflows in fp32
POINTS, ROUNDS = 64, 10  # 64^10 = 2^60: a bracket of 1e3 is then narrower than fp64 can tell


@torch.no_grad()
def worst_part_weights(values: torch.Tensor, codes: torch.Tensor, groups: int, alpha: float) -> torch.Tensor:
    """Weights (n,) with which the values (n,) of each group, by its code, add up to its CVaR_alpha.

    1/k for the largest floor(k) values of a group of k / alpha members, what is left of 1 for the next, 0 for the rest.
    Of equal values the first counts as larger. A value of code -1 has the weight 0.
    """
    order = values.argsort(descending=True, stable=True)
    order = order[codes[order].argsort(stable=True)]
    codes = codes[order]
    edges = torch.searchsorted(codes, torch.arange(groups + 1, device=codes.device))
    rank = torch.arange(len(values), device=codes.device) - edges[codes.clamp_min(0)]
    k = (alpha * edges.diff().to(values))[codes.clamp_min(0)]
    weights = torch.where(codes < 0, 0, (k - rank).clamp(0, 1) / k)
    return torch.empty_like(values).scatter(0, order, weights)


def smoothed_worst_part(values: torch.Tensor, present: torch.Tensor, alpha: float, guarded: bool) -> torch.Tensor:
    """PG-FDD's smoothed CVaR_alpha of those of the values (n,) that are present, (n,) bool; 0 if none is.

        F(lambda) = lambda + tau_2 lambda^2 / (2 alpha) + 1/(alpha n) sum_i tau_1 log(1 + exp((l_i - lambda) / tau_1))

    at its minimum; lambda is a constant to autograd. Values must be at least 0, and 0 where not present.
    guarded: at the minimum over [max - 88.7 tau_1, max], which is where the released code's search ends.
    """
    number = alpha * present.sum().clamp_min(1).to(values)
    threshold = _threshold(values.detach(), present, number, alpha, guarded)
    excess = -TAU_1 * functional.logsigmoid((threshold - values) / TAU_1)
    found = threshold + TAU_2 / (2 * alpha) * threshold**2 + torch.where(present, excess, 0).sum() / number
    return torch.where(present.any(), found, 0)


@torch.no_grad()
def _threshold(
    values: torch.Tensor, present: torch.Tensor, number: torch.Tensor, alpha: float, guarded: bool
) -> torch.Tensor:
    """The lambda of least F, a scalar: where its increasing derivative is 0, or the end of the bracket next to that.

    At -1 the derivative is below 0, one above the largest value it is above 0. Each round looks at all inner points of
    a division by 64 at once: six times fewer steps than bisection, each as quick.
    """
    high = values.max() + (0 if guarded else 1)
    low = high - LARGEST_EXPONENT * TAU_1 if guarded else torch.full_like(high, -1)
    steps = torch.arange(1, POINTS, device=values.device, dtype=values.dtype) / POINTS
    for _ in range(ROUNDS):
        points, width = low + (high - low) * steps, (high - low) / POINTS
        shares = torch.where(present[:, None], torch.sigmoid((values[:, None] - points) / TAU_1), 0)
        below = (1 + TAU_2 / alpha * points - shares.sum(0) / number < 0).sum()
        low = low + below * width
        high = low + width
    return (low + high) / 2
