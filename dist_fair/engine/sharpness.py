"""Sharpness-aware minimisation: a step takes the gradient at the worst point near the weights, not at the weights.

    e = rho g / (||g|| + 1e-12)             g = grad L(w), one norm over all parameters       (Foret et al. 2021, eq. 2)
    e = rho w^2 g / (||w g|| + 1e-12)       adaptive: distances relative to |w|               (Kwon et al. 2021)
    the optimizer steps from w, by grad L(w + e): only this gradient is clipped, decayed, or seen by its moments

Both passes are the same step: the same rows, the same random numbers (dist_fair.keyed_rows), batch statistics of the
same batch. The second pass updates no running statistics. There is no state: a checkpoint is that of a plain run.

Whose loss L is. Under DDP most implementations take the first gradient without synchronising it: each rank climbs its
own loss, and the method depends on how many rows a rank happens to hold. Here `scope` says it, in samples:

    global    L is the loss of the step. Both gradients are averaged over ranks, so e is the same on each of them. Wire:
              twice that of a plain step; under sharding one number more, for the norm. Memory: a copy of the weights.
    m         Each m rows are a step of their own (m-sharpness, their section 4.1), to every objective and without any
              collective: grad = 1/K sum_k grad L_k(w + e_k), K groups over all micro-batches and ranks. A group is m
              neighbours in canonical order, so they are the same on every number of ranks W for which m W divides the
              micro-batch. Wire: one all-reduce of gradients. Memory: two copies of those besides.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.plan import TrainingPlan, divisors
from dist_fair.data.window import Window, paired
from dist_fair.engine.accumulation import batch_statistics
from dist_fair.engine.module import Losses, TrainingModule
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Sam

# Beside a step's losses, which are those at w: L(w + e) - L(w), and the norm that e is divided by.
MEASURES = ("sam/sharpness", "sam/ascent_norm")


def gradients(
    sam: Sam,
    module: TrainingModule,
    batches: Sequence[Batch],
    progress: float,
    backward: Callable[[Sequence[Batch]], list[Losses]],
) -> list[Losses]:
    """Leaves a step's gradients, averaged over ranks, in the parameters; returns its losses at w, and MEASURES.

    backward: adds the gradients of the step's loss at the present weights to the parameters', averaged over ranks.
    """
    if sam.rho is None:
        return backward(batches)
    if sam.scope == "global":
        return climbed(module, sam, lambda: backward(batches))
    return climbed_in_groups(module, sam, batches, progress)


def climbed(module: nn.Module, sam: Sam, backward: Callable[[], list[Losses]]) -> list[Losses]:
    """Leaves the gradients at w + e in the parameters, which must come without any; the losses are those at w."""
    history = backward()
    with statistics_held(module), perturbed(list(module.parameters()), sam) as norm:
        above = backward()
    found = [(upper.loss.detach() - losses.loss.detach(), norm) for losses, upper in zip(history, above, strict=True)]
    return [replace(losses, numbers=losses.numbers | dict(zip(MEASURES, measures, strict=True)))
            for losses, measures in zip(history, found, strict=True)]  # fmt: skip


def climbed_in_groups(module: TrainingModule, sam: Sam, batches: Sequence[Batch], progress: float) -> list[Losses]:
    """The same for each `sam.scope` rows alone; gradients, losses and measures are means over groups and ranks."""
    comm, parameters = module.comm, [parameter for parameter in module.parameters() if parameter.requires_grad]
    total, history = [torch.zeros_like(parameter) for parameter in parameters], []
    with _alone(module):
        for group in (group for batch in batches for group in groups(batch, sam.scope)):
            history += climbed(module, sam, lambda group=group: _backward(module, group, progress))
            for parameter, gradient in zip(parameters, total, strict=True):
                if parameter.grad is not None:
                    gradient += parameter.grad
                    parameter.grad = None
    flat = comm.sum(torch.cat([gradient.flatten() for gradient in total]), "sam/gradients")
    flat /= len(history) * comm.world
    for parameter, part in zip(parameters, flat.split([gradient.numel() for gradient in total]), strict=True):
        parameter.grad = part.view_as(parameter)
    return _averaged(history, comm)


def groups(batch: Batch, size: int) -> list[Batch]:
    """A rank's rows in groups of `size` neighbours, each the batch of a world of one rank."""
    return [batch.rows(slice(start, start + size), (size,)) for start in range(0, len(batch), size)]


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter], sam: Sam) -> Iterator[torch.Tensor]:
    """Within it parameters are at w + e and without gradients; after it they are at w, to the bit.

    Yields ||g||, or ||w g|| if adaptive: a scalar, over all parameters, whole or sharded (DTensor). Where that is not
    finite there is no e, and the caller is to stop.
    """

    def stretched(slope: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return slope * weight.abs() if sam.adaptive else slope

    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    kept = [parameter.detach().clone() for parameter in parameters]
    slopes = [stretched(parameter.grad, weight) for parameter, weight in zip(parameters, kept, strict=True)]
    norm = get_total_norm(slopes)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    scale = sam.rho / (norm + 1e-12)
    try:
        with torch.no_grad():
            for parameter, weight, slope in zip(parameters, kept, slopes, strict=True):
                parameter += (stretched(slope, weight) * scale).nan_to_num(0.0)
                parameter.grad = None
        yield norm
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, kept, strict=True):
                parameter.copy_(weight)


@contextmanager
def statistics_held(module: nn.Module) -> Iterator[None]:
    """Within it a forward pass in training updates no running statistics, and is the same otherwise.

    By the flag of torch's batch norms, `track_running_stats`, which all that keeps statistics here has too.
    """
    tracking = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
    try:
        for part in tracking:
            part.track_running_stats = False
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True


def refuse_inexact_sam(sam: Sam, module: TrainingModule, plan: TrainingPlan, world: int) -> None:
    """Raises DistFairError where statistics cannot be held, and for scope=m without whole, uncoupled groups."""
    if sam.rho is None:
        return
    layers = batch_statistics(module)
    stubborn = [name for name in layers if not isinstance(module.get_submodule(name), _BatchNorm)]
    if stubborn:
        kind = type(module.get_submodule(stubborn[0])).__name__
        raise DistFairError(f"optimizer.sam.rho={sam.rho}: layer '{stubborn[0]}' ({kind}) updates running statistics "
                            "in both passes; use a backbone with nn.BatchNorm or group norm")  # fmt: skip
    if sam.scope == "global":
        return
    scope = f"optimizer.sam.scope={sam.scope}"
    layers += [name for name, part in module.interventions.named_modules(prefix="interventions")
               if getattr(part, "track_running_stats", False) and name not in layers]  # fmt: skip
    if layers:
        more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
        raise DistFairError(f"{scope}: '{layers[0]}'{more} has statistics of the batch, which groups of {sam.scope} "
                            "samples do not share: detector.norm=frozen, or a backbone with group norm such as "
                            "detector.name=resnet50_gn, without interventions that keep moments; or "
                            "optimizer.sam.scope=global")  # fmt: skip
    _refuse_groups(sam.scope, plan, world, scope)


def _refuse_groups(size: int, plan: TrainingPlan, world: int, scope: str) -> None:
    rows, lane = plan.batch_size // world, plan.batch_size // plan.lanes if paired(plan) else 1
    sizes = [one for one in divisors(rows) if one % lane == 0]
    if size in sizes:
        return
    ranks = [one for one in divisors(plan.lanes) if plan.batch_size % (one * size) == 0 and size % lane == 0]
    pairs = f", each of whole lanes, {lane} paired reals and fakes" if lane > 1 else ""
    raise DistFairError(
        f"{scope}: the {rows} rows that each of {world} rank(s) has of a micro-batch of {plan.batch_size} are no whole "
        f"groups of {size}{pairs}: set optimizer.sam.scope to one of {sizes}"
        + (f", or launch on a number of ranks of {ranks}" if ranks else "")
    )


@contextmanager
def _alone(module: TrainingModule) -> Iterator[None]:
    """Within it the module's objectives are those of this rank's rows."""
    comm = module.comm
    module.comm = comm.alone()
    try:
        yield
    finally:
        module.comm = comm


def _backward(module: TrainingModule, group: Batch, progress: float) -> list[Losses]:
    losses = module(Window([group]), progress)
    losses.loss.backward()
    return [losses]


def _averaged(history: Sequence[Losses], comm: Communicator) -> list[Losses]:
    """Losses and numbers of each of this rank's groups as means over ranks: what is logged, and stops a run, agrees."""
    names = [name for name, value in history[0].numbers.items() if value is not None]
    rows = [torch.stack([losses.loss.detach().double(), *(losses.numbers[name].double() for name in names)])
            for losses in history]  # fmt: skip
    table = comm.sum(torch.stack(rows), "sam/numbers") / comm.world
    return [replace(losses, loss=row[0], numbers=losses.numbers | dict(zip(names, row[1:], strict=True)))
            for losses, row in zip(history, table, strict=True)]  # fmt: skip
