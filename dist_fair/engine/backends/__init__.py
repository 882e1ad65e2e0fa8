"""Backends by name."""

import torch
from accelerate import Accelerator

from dist_fair.engine.backends.base import Backend, MakeOptimizer
from dist_fair.engine.module import TrainingModule
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Train

__all__ = ["Backend", "make_backend"]


def make_backend(
    train: Train, module: TrainingModule, make_optimizer: MakeOptimizer, accelerator: Accelerator
) -> Backend:
    """The backend `train.backend` over a module on its device; called on all ranks together.

    Raises DistFairError for what it cannot do exactly, and if it did not become what was asked for.
    """
    refuse_idle_offload(train, accelerator.device)
    if train.backend == "fsdp":
        from dist_fair.engine.backends.fsdp import Fsdp

        return Fsdp(module, make_optimizer, accelerator, train.offload)
    if train.backend.startswith("zero"):
        from dist_fair.engine.backends.zero import Zero

        return Zero(module, make_optimizer, accelerator, int(train.backend[-1]), train.offload)
    from dist_fair.engine.backends.ddp import Ddp

    return Ddp(module, make_optimizer, accelerator)


def refuse_idle_offload(train: Train, device: torch.device) -> None:
    """Raises DistFairError for train.offload where there is nothing to offload from."""
    if train.offload and device.type == "cpu":
        raise DistFairError("train.offload=true has no effect: this run is on the CPU anyway; leave it out")
