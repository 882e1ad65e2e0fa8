"""Optimizers and learning-rate schedules by name, from torch and timm."""

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from dist_fair.errors import DistFairError, nearest
from dist_fair.recipe.schema import Optimizer, Schedule

# torch's own under the names people expect: timm's "sgd" is Nesterov, these are the textbook ones.
_TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(module: nn.Module, settings: Optimizer, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer over all parameters that train, in the order of `named_parameters`.

    fused: torch's own as one kernel, which can leave out a step without asking the host (see Backend.step); others are
    as they are. Raises DistFairError for an unknown name or an argument that the optimizer does not take.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    arguments = dict(settings.arguments, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.momentum is not None:
        arguments["momentum"] = settings.momentum
    known = [*_TORCH, *timm.optim.list_optimizers()]
    if settings.name not in known:
        raise DistFairError(f"optimizer.name={settings.name}: no such optimizer: {nearest(settings.name, known)}")
    try:
        if settings.name in _TORCH:
            if fused and not arguments.keys() & {"fused", "foreach", "capturable", "differentiable"}:
                arguments["fused"] = True
            return _TORCH[settings.name](parameters, **arguments)
        return timm.optim.create_optimizer_v2(parameters, opt=settings.name, **arguments)
    except (TypeError, ValueError) as error:
        raise DistFairError(f"optimizer.name={settings.name} does not take these settings: {error}") from None


def build_schedule(optimizer: torch.optim.Optimizer, settings: Schedule, steps: int) -> Scheduler:
    """The learning rate as a pure function of the step: call `step_update(step)` before each step.

    Warm-up, step length and cosine are given as parts of the run and become whole steps here.
    """
    warmup = round(settings.warmup * steps)
    shared = {"warmup_t": warmup, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False}
    if settings.name == "cosine":
        floor = settings.floor * optimizer.param_groups[0]["lr"]
        return CosineLRScheduler(optimizer, t_initial=max(1, steps - warmup), lr_min=floor, **shared)
    factor = settings.factor if settings.name == "step" else 1.0
    every = settings.every if settings.name == "step" else 1.0
    return StepLRScheduler(optimizer, decay_t=max(1, round(every * steps)), decay_rate=factor, **shared)
