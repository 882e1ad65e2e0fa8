"""The classic bugs of sharpness-aware minimisation, each a context around a Trainer's run on one of several ranks."""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch

from dist_fair.collectives import Communicator
from dist_fair.engine import sharpness
from tests.engine.sharpness_worlds import DECAY, Small


def local_perturbation(made):
    """The first gradient is not synchronised: each rank climbs its own loss (composer, GSAM under DDP)."""
    backward, passes = made._backward, []

    def alternating(batches):
        passes.append(len(passes) % 2)
        with nullcontext() if passes[-1] else made.backend.wrapped.no_sync():
            return backward(batches)

    return mock.patch.object(made, "_backward", alternating)


def norm_of_each_tensor(made):
    """Each tensor is moved by rho, not all of them together."""

    @contextmanager
    def one_by_one(parameters, sam):
        with ExitStack() as stack:
            norms = [stack.enter_context(perturbed([parameter], sam)) for parameter in parameters]
            yield torch.stack(norms).square().sum().sqrt()

    perturbed = sharpness.perturbed
    return mock.patch.object(sharpness, "perturbed", one_by_one)


def double_statistics(made):
    """Running statistics are updated by both passes."""
    return mock.patch.object(sharpness, "statistics_held", return_value=nullcontext())


def decay_in_the_perturbation(made):
    """The perturbation follows the gradient that the optimizer would step by."""

    def decayed(parameters, sam):
        for parameter in parameters:
            parameter.grad += DECAY * parameter.detach()
        return perturbed(parameters, sam)

    perturbed = sharpness.perturbed
    return mock.patch.object(sharpness, "perturbed", decayed)


def redrawn(made):
    """Other dropout in the second pass."""
    draw, passes = Small.dropped, []

    def dropped(self, x, keys, salt):
        passes.append(salt)
        return draw(self, x, keys, salt + 100 * len(passes))

    return mock.patch.object(Small, "dropped", dropped)


def first_gradients_kept(made):
    """The gradients of both passes are added."""

    @contextmanager
    def adding(parameters, sam):
        first = [parameter.grad.clone() for parameter in parameters]
        with perturbed(parameters, sam) as norm:
            yield norm
        for parameter, gradient in zip(parameters, first, strict=True):
            parameter.grad += gradient

    perturbed = sharpness.perturbed
    return mock.patch.object(sharpness, "perturbed", adding)


def rows_of_a_rank(made):
    """The groups are the rows that each rank has, whatever their number."""

    def all_rows(batch, size):
        return [batch.rows(slice(None), (len(batch),))]

    return mock.patch.object(sharpness, "groups", all_rows)


def gradients_of_a_rank(made):
    """The gradients of the groups are averaged on each rank only."""
    add = Communicator.sum

    def own(self, tensor, name):
        return tensor * self.world if name == "sam/gradients" else add(self, tensor, name)

    return mock.patch.object(Communicator, "sum", own)


OF_THE_STEP = (
    local_perturbation, norm_of_each_tensor, double_statistics, decay_in_the_perturbation, redrawn, first_gradients_kept
)  # fmt: skip
OF_GROUPS = (rows_of_a_rank, gradients_of_a_rank)
BUGS = {bug.__name__: bug for bug in (*OF_THE_STEP, *OF_GROUPS)}
