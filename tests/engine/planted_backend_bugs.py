"""Classic bugs of sharding: each function gives a patch, with which the backends have that bug."""

from contextlib import ExitStack, contextmanager
from unittest import mock

from dist_fair.collectives import Communicator
from dist_fair.engine.backends import fsdp, sharded, zero


def gradients_summed():
    """Over ranks, not averaged."""
    shard, configure = fsdp.fully_shard, zero._configuration

    def summing(module, **settings):
        shard(module, **settings).set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def without_average(*arguments):
        return configure(*arguments) | {"gradient_allreduce_op": "sum"}

    return _all(mock.patch.object(fsdp, "fully_shard", summing),
                mock.patch.object(zero, "_configuration", without_average))  # fmt: skip


def norm_of_own_part():
    """Gradients are clipped by the norm of what this rank holds of them."""
    whole = Communicator.sum

    def own(self, tensor, name):
        return tensor if name == "gradient norm" else whole(self, tensor, name)

    return mock.patch.object(Communicator, "sum", own)


def moments_of_the_next_rank():
    """A state is loaded with each rank's moments one rank off."""
    return _all(*(mock.patch.object(kind, "_take", _shifted(kind._take)) for kind in (fsdp.Fsdp, zero.Zero)))


def _shifted(take):
    def shifted(self, parameter, value, moment=None):
        if moment is not None and value.dim():
            value = value.flatten().roll(-(-value.numel() // self.module.comm.world)).view(value.shape)
        take(self, parameter, value, moment)

    return shifted


def steps_one_ahead():
    """Adam's count of steps begins at 1, as where its state was made by a step with gradients of zero."""
    return _all(*(mock.patch.object(kind, "_take", _ahead(kind._take)) for kind in (fsdp.Fsdp, zero.Zero)))


def _ahead(take):
    def ahead(self, parameter, value, moment=None):
        take(self, parameter, value + 1 if moment == "step" else value, moment)

    return ahead


def buffers_left_behind():
    """What changes in the whole module stays there."""
    of = sharded.Whole.of

    @contextmanager
    def unheard(self, module, whole):
        before = [value.clone() for value in module.buffers()]
        with of(self, module, whole) as plain:
            yield plain
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)

    return mock.patch.object(sharded.Whole, "of", unheard)


def _all(*patches):
    stack = ExitStack()
    for patch in patches:
        stack.enter_context(patch)
    return stack
