"""The classic bugs of synced batch norm, to be planted in a rank: each must make the comparison fail.

python: planted_norm_bugs.PLANTS[name](comm)
"""

import torch

from dist_fair.detectors import norm

_moments, _means = norm.global_moments, norm.global_means


def local_statistics(comm):
    """nn.BatchNorm under DDP: every rank normalises with its own moments."""

    def moments(x, comm):
        _moments(x, comm)
        mean, var = x.mean(dim=_reduced(x)), x.var(dim=_reduced(x), correction=0)
        return torch.stack([mean, var]), _values(x)

    norm.global_moments = moments


def counts_ignored_in_forward(comm):
    """pytorch #22192: mean of the ranks' means, also where ranks hold different numbers of rows."""

    def moments(x, comm):
        _, count = _moments(x, comm)
        mean, square = x.mean(dim=_reduced(x)), x.square().mean(dim=_reduced(x))
        mean, square = comm.sum(torch.stack([mean, square]), "plant") / comm.world
        return torch.stack([mean, square - mean * mean]), count

    norm.global_moments = moments


def counts_ignored_in_backward(comm):
    """pytorch PR #36688: the gradient's means over the local N instead of the global one, times W."""

    def counted(backward):
        def around(dy, x, weight, mean, variance, invstd, count, *others):
            return backward(dy, x, weight, mean, variance, invstd, comm.world * _values(x), *others)

        return around

    _wrap_backward(counted)


def detached_statistics(comm):
    """Mean and variance treated as constants: what an all-reduce without autograd gives."""

    def means(s1, s2, count, comm):
        return [torch.zeros_like(one) for one in _means(s1, s2, count, comm)]

    norm.global_means = means


def one_over_w(comm):
    """lightly #1977: the gradient through the statistics 1/W of what it should be."""
    norm.global_means = lambda s1, s2, count, comm: _means(s1 / comm.world, s2 / comm.world, count, comm)


def times_w(comm):
    """The factor W, which dy already carries, a second time."""
    norm.global_means = lambda s1, s2, count, comm: _means(s1 * comm.world, s2 * comm.world, count, comm)


def summed_weight_gradient(comm):
    """Weight and bias gradients summed over ranks here, and then averaged by DDP once more."""

    def summed(backward):
        def around(*arguments):
            dx, dweight, dbias = backward(*arguments)
            return dx, *comm.sum(torch.stack([dweight, dbias]), "plant")

        return around

    _wrap_backward(summed)


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
        return torch.stack([mean, (square - mean * mean).clamp(min=0)]), count[0].double()

    norm.global_moments = moments


def _reduced(x):
    return [0, *range(2, x.ndim)]


def _values(x):
    return torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)


def _wrap_backward(wrap):
    """Both ways of the backward pass, a GPU's and any device's."""
    norm.gpu_backward, norm.native_backward = wrap(norm.gpu_backward), wrap(norm.native_backward)


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
