"""Scalars that come with their gradient, where a formula is shorter than what autograd would record.

Sorting, searching and picking the worst are steps to a solution, not a part of how it depends on its inputs: by the
envelope theorem the gradient is that of the objective with the solution held fixed. And an objective on a summary is
a handful of numbers, so that on a GPU each operation that autograd records and reverses is a launch, and nothing else.
"""

import torch
from torch.autograd.function import once_differentiable


def with_gradient(value: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The scalar `value` as a function of `inputs` whose gradient is `gradient`, of their shape; both without a graph.

    To be differentiated once.
    """
    return _WithGradient.apply(inputs, value, gradient)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        ctx.kind = inputs.dtype
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient).to(ctx.kind), None, None
