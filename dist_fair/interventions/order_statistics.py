"""The mean of the worst part of some losses (conditional value at risk), without a search on the host.

    CVaR_alpha(l)  =  min over lambda of  lambda + sum_i [l_i - lambda]_+ / k,      k = alpha n

is the mean of the k largest of n losses, the last of them in part; with k below 1 it is the largest. By the envelope
theorem its gradient is that of the mean with its weights held fixed: means come with their weights, both without a
graph. Nothing here waits for the device, and R rows of losses take as many kernels as one.
"""

import math

import torch
from torch.nn import functional

TAU_1, TAU_2 = 1e-3, 1e-4  # of PG-FDD's smoothed form, as in its released code
LARGEST_EXPONENT = math.log(torch.finfo(torch.float32).max)  # 88.7: beyond it exp overflows in fp32
BITS = 60  # by which a bracket is narrowed down: one of 1e3 is then narrower than fp64 can tell


@torch.no_grad()
def worst_parts(values: torch.Tensor, members: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CVaR of the values (R, n), at least 0, of each group: means (R, G), and the weights (R, G, n) that make them.

    members: (G, n), ones and zeros. k: (G, 1), alpha times their number. Weights are 1/k for the floor(k) largest of a
    group, what is left of 1 for the next, 0 for the rest. Of equal values the first counts as larger. A group without
    members has 0.
    """
    own = torch.addcmul(members - 1, values[:, None], members)  # -1 for whoever is not in a group: last in it
    rank = own.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    weights = (k - rank).clamp_(0, 1).div_(k.clamp_min(torch.finfo(k.dtype).tiny))
    return (weights * own).sum(-1), weights


@torch.no_grad()
def smoothed_worst_part(
    values: torch.Tensor, present: torch.Tensor, alpha: float, guarded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """PG-FDD's smoothed CVaR_alpha of those of the values (R, n) that are present, (1, n) ones: (R,), 0 if none is.

        F(lambda) = lambda + tau_2 lambda^2 / (2 alpha) + 1/(alpha n) sum_i tau_1 log(1 + exp((l_i - lambda) / tau_1))

    at its minimum, and the derivatives of that by the values, (R, n), lambda held fixed. Values must be at least 0, and
    0 where not present. guarded: at the minimum over [max - 88.7 tau_1, max], which is where the released code's search
    ends.
    """
    count = present.sum()
    number = alpha * count.clamp_min(1)
    scaled = values / TAU_1
    high = scaled.amax(1, keepdim=True)
    scaled = torch.where(present > 0, scaled, -torch.inf)
    threshold = _threshold(scaled, high, number, alpha, guarded)
    excess, threshold = scaled - threshold, TAU_1 * threshold[:, 0]
    soft = functional.logsigmoid(-excess).sum(1) / number
    found = threshold * (1 + TAU_2 / (2 * alpha) * threshold) - TAU_1 * soft
    return found * count.clamp_max(1), excess.sigmoid_().div_(number)


def _threshold(
    scaled: torch.Tensor, high: torch.Tensor, number: torch.Tensor, alpha: float, guarded: bool
) -> torch.Tensor:
    """The lambda of least F, (R, 1): where its increasing derivative is 0, or the end of the bracket next to that.

    Lambda, the values (R, n) and the largest of them, (R, 1), in units of tau_1. At -1 the derivative is below 0, one
    above the largest value it is above 0. Each round looks at many points of the bracket at once, up to 1,024 of few
    values: ten times fewer rounds than bisection, of eight kernels each.
    """
    if not guarded:
        high = high + 1 / TAU_1
    low = high - LARGEST_EXPONENT if guarded else torch.full_like(high, -1 / TAU_1)
    width, slope = high - low, number * (TAU_1 * TAU_2 / alpha)
    bits = min(max(20 - scaled.numel().bit_length(), 6), 10)  # a round; a million numbers in memory, or 64 a value
    steps = torch.arange(1, 2**bits, device=scaled.device, dtype=scaled.dtype)
    rounds = math.ceil(BITS / bits)
    for part in [2.0 ** (-bits * (done + 1)) for done in range(rounds)]:
        points = torch.addcmul(low, steps, width, value=part)
        shares = (scaled[..., None] - points[:, None]).sigmoid_().sum(1)
        below = shares > torch.addcmul(number, slope, points)
        low = torch.addcmul(low, below.sum(1, keepdim=True, dtype=low.dtype), width, value=part)
    return low + width * 2.0 ** (-bits * rounds - 1)
