"""Classic bugs: each function gives a patch, with which the program has that bug."""

from contextlib import ExitStack, nullcontext
from unittest import mock

import numpy as np
import torch

from dist_fair import collectives
from dist_fair.data import loading, plan
from dist_fair.detectors import conditional_decoder, norm, pg_fdd
from dist_fair.engine import loop, sharpness
from dist_fair.interventions.inverse_propensity import InversePropensity
from dist_fair.interventions.subgroup_norm import SubgroupNorm


def no_factor():
    """Gathered statistics, gradient 1/W: the factor that open_clip's default and lightly's Barlow Twins lacked."""
    return mock.patch.object(
        collectives._ReplicatedSum, "backward", staticmethod(lambda ctx, gradient: (gradient, None, None))
    )


def squared_factor():
    """The loss times W on top of a differentiable collective: DeCLUTR, tevatron, pytorch-metric-learning 363."""
    return mock.patch.object(
        collectives._ReplicatedSum,
        "backward",
        staticmethod(lambda ctx, gradient: (gradient * ctx.world**2, None, None)),
    )


def local_statistics():
    """Group statistics of each rank alone, as if the batch were the local one."""
    return mock.patch.object(collectives.Communicator, "replicated_sum", lambda self, tensor, name: tensor * self.world)


def detached_norm():
    """Global statistics in the norm, but no gradient through them."""
    return mock.patch.object(norm, "add_statistics_gradient", lambda dx, *_: dx)


def local_norm():
    """Batch norm per rank."""
    return mock.patch.object(collectives.Communicator, "sum", _local_unless_hash(collectives.Communicator.sum))


def _local_unless_hash(real):
    return lambda self, tensor, name: tensor.detach() if name.startswith("norm/") else real(self, tensor, name)


def double_norm_update():
    """Running statistics updated twice per step (SAM implementations before they froze the second pass)."""
    real = norm.SyncedBatchNorm._track

    def twice(self, *moments):
        real(self, *moments)
        real(self, *moments)

    return mock.patch.object(norm.SyncedBatchNorm, "_track", twice)


def per_rank_mask():
    """Channels scored on each rank's own samples: nni 5205, sparseml 429."""

    def own(self, rows, name, sizes=None):
        return rows.detach()[:, : rows.shape[1] // self.world].repeat(self.world, *[1] * (rows.ndim - 1))[: sum(sizes)]

    return mock.patch.object(collectives.Communicator, "exchange_columns", own)


def order_by_rank():
    """Samples dealt out by rank as DistributedSampler does: the global batch then depends on W."""
    real = plan.TrainingPlan.part

    def strided(self, step, rank, world):
        whole = real(self, step * world + rank if world > 1 else step, 0, 1)
        rows = slice(0, len(whole) // world)
        return plan.Selection(whole.samples[rows], whole.epochs[rows])

    return mock.patch.object(plan.TrainingPlan, "part", strided)


def augmented_by_rank():
    """Augmentation drawn from the rank's own stream."""
    real = loading.draws

    def by_rank(seed, epochs, samples):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return real(seed + rank, epochs, samples)

    return mock.patch.object(loading, "draws", by_rank)


def tail_repeated():
    """Evaluation padded by repetition, as DistributedSampler pads."""
    real = plan.EvaluationPlan.__getitem__

    def repeated(self, step):
        selection = real(self, step)
        return plan.Selection(np.where(selection.samples < 0, 0, selection.samples), selection.epochs)

    return mock.patch.object(plan.EvaluationPlan, "__getitem__", repeated)


def local_moments():
    """Subgroup norm by the moments of each rank's own rows, as every single-GPU code does under DDP."""
    return mock.patch.object(collectives.Communicator, "shared_sum", lambda self, tensor, name: tensor)


def detached_moments():
    """Global moments without a gradient: dist.all_reduce as it comes."""
    return mock.patch.object(collectives.Communicator, "shared_sum", collectives.Communicator.sum)


def moments_without_others():
    """The gradient through the moments stays on its rank: an all-reduce whose backward is the identity."""
    return mock.patch.object(
        collectives._SharedSum, "backward", staticmethod(lambda ctx, gradient: (gradient, None, None))
    )


def propensity_of_the_batch():
    """Weights from the group counts of the rank's own rows."""

    def weigh(self, batch):
        codes = sum(batch.attributes[name] * 10**place for place, name in enumerate(self.settings.attributes))
        _, which, counts = codes.unique(return_inverse=True, return_counts=True)
        return len(batch) / (len(counts) * counts[which])

    return mock.patch.object(InversePropensity, "weigh", weigh)


def double_moments_update():
    """Running moments moved twice a step."""
    real = SubgroupNorm._track

    def twice(self, *moments):
        real(self, *moments)
        real(self, *moments)

    return mock.patch.object(SubgroupNorm, "_track", twice)


def gathered_without_factor():
    """Gathered losses and features, gradient 1/W."""

    def backward(ctx, gradient):
        return gradient[ctx.start : ctx.stop], None, None, None

    return mock.patch.object(collectives._ReplicatedGather, "backward", staticmethod(backward))


def local_rows():
    """What is gathered are the rank's own rows: the worst part, and the triplets, of each rank alone."""
    return mock.patch.object(collectives.Communicator, "replicated_gather", lambda self, rows, name, sizes=None: rows)


def dropout_by_rank():
    """Dropout drawn anew on each rank, as torch's generators do it."""

    def by_rank(x, rate, keys):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return real(x, rate, keys + rank)

    real, patches = pg_fdd.dropout, ExitStack()
    for module in (pg_fdd, conditional_decoder):
        patches.enter_context(mock.patch.object(module, "dropout", by_rank))
    return patches


def local_ascent():
    """SAM's first gradient is not synchronised: each rank climbs its own loss (composer, GSAM under DDP)."""
    real, passes = loop.Trainer._backward, []

    def alternating(self, batches):
        passes.append(len(passes) % 2)
        with nullcontext() if passes[-1] else self.backend.wrapped.no_sync():
            return real(self, batches)

    return mock.patch.object(loop.Trainer, "_backward", alternating)


def statistics_twice():
    """Running statistics are updated by both of SAM's passes."""
    return mock.patch.object(sharpness, "statistics_held", return_value=nullcontext())
