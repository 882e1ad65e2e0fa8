"""The classic bugs of synced batch norm, to be planted in a rank: each must make the comparison fail.

python: planted_norm_bugs.PLANTS[name](comm)
"""

import torch

from dist_fair.detectors import norm

_moments, _local, _add = norm.global_moments, norm.local_backward, norm.add_statistics_gradient


def local_statistics(comm):
    """nn.BatchNorm under DDP: every rank normalises with its own moments."""

    def moments(x, comm):
        _moments(x, comm)
        mean, var = x.mean(dim=_reduced(x)), x.var(dim=_reduced(x), correction=0)
        return mean, var, mean.new_full((1,), x.numel() / x.shape[1]).double()

    norm.global_moments = moments


def counts_ignored_in_forward(comm):
    """pytorch #22192: mean of the ranks' means, also where ranks hold different numbers of rows."""

    def moments(x, comm):
        _, _, count = _moments(x, comm)
        mean, square = x.mean(dim=_reduced(x)), x.square().mean(dim=_reduced(x))
        mean, square = comm.sum(torch.stack([mean, square]), "plant") / comm.world
        return mean, square - mean * mean, count

    norm.global_moments = moments


def counts_ignored_in_backward(comm):
    """pytorch PR #36688: the gradient's means over the local N instead of the global one, times W."""

    def add(dx, s1, s2, x, scale, mean, variance, count, eps, comm):
        count = torch.full_like(count, comm.world * x.numel() / x.shape[1])
        return _add(dx, s1, s2, x, scale, mean, variance, count, eps, comm)

    norm.add_statistics_gradient = add


def detached_statistics(comm):
    """Mean and variance treated as constants: what an all-reduce without autograd gives."""

    def add(dx, *rest):
        _add(dx.clone(), *rest)
        return dx

    norm.add_statistics_gradient = add


def one_over_w(comm):
    """lightly #1977: the gradient through the statistics 1/W of what it should be."""

    def add(dx, s1, s2, *rest):
        return _add(dx, s1 / comm.world, s2 / comm.world, *rest)

    norm.add_statistics_gradient = add


def times_w(comm):
    """The factor W, which dy already carries, a second time."""

    def add(dx, s1, s2, *rest):
        return _add(dx, s1 * comm.world, s2 * comm.world, *rest)

    norm.add_statistics_gradient = add


def summed_weight_gradient(comm):
    """Weight and bias gradients summed over ranks here, and then averaged by DDP once more."""

    def local(*arguments):
        dx, s1, s2 = _local(*arguments)
        s1, s2 = comm.sum(torch.stack([s1, s2]), "plant")
        return dx, s1 / comm.world**0.5, s2 / comm.world**0.5

    norm.local_backward = local


def biased_running_variance(comm):
    """Running variance over N instead of N - 1."""
    norm.unbiasing = lambda count: 1.0


def locally_unbiased_running_variance(comm):
    """Running variance with a local N / (N - 1)."""
    unbiasing = norm.unbiasing
    norm.unbiasing = lambda count: unbiasing(count / comm.world)


def single_precision_moments(comm):
    """E[x^2] - E[x]^2 in fp32."""

    def moments(x, comm):
        count = comm.sum(torch.tensor([x.numel() / x.shape[1]]), "plant")
        sums = torch.stack([x.sum(dim=_reduced(x)), x.square().sum(dim=_reduced(x))])
        mean, square = comm.sum(sums, "plant") / count
        return mean, (square - mean * mean).clamp(min=0), count.double()

    norm.global_moments = moments


def _reduced(x):
    return [0, *range(2, x.ndim)]


PLANTS = {
    plant.__name__: plant
    for plant in (
        local_statistics,
        counts_ignored_in_forward,
        counts_ignored_in_backward,
        detached_statistics,
        one_over_w,
        times_w,
        summed_weight_gradient,
        biased_running_variance,
        locally_unbiased_running_variance,
    )
}
