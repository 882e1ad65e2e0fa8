"""Backends by name."""

from accelerate import Accelerator

from dist_fair.engine.backends.base import Backend, MakeOptimizer
from dist_fair.engine.module import TrainingModule
from dist_fair.recipe.schema import Train

__all__ = ["Backend", "make_backend"]


def make_backend(
    train: Train, module: TrainingModule, make_optimizer: MakeOptimizer, accelerator: Accelerator
) -> Backend:
    """The backend `train.backend` over a module on its device. Raises DistFairError for what it cannot do exactly."""
    from dist_fair.engine.backends.ddp import Ddp

    return Ddp(module, make_optimizer, accelerator)
