"""How W ranks share a module in training: who holds parameters, gradients and moments, and what crosses the wire.

             parameters    gradients     moments       wire of a step (P parameters)
    ddp      all           all           all           all-reduce of P
    fsdp     a W-th part   a W-th part   a W-th part   all-gather of P twice, reduce-scatter of P
    zero1    all           all           a W-th part   all-reduce of P, all-gather of P
    zero2    all           a W-th part   a W-th part   all-reduce of P (let go bucket by bucket), all-gather of P
    zero3    a W-th part   a W-th part   a W-th part   all-gather of P twice, reduce-scatter of P

All of them *average* gradients over ranks, which is what the one gradient rule (dist_fair.collectives) expects. Buffers
are whole and equal on every rank. A backend's state is logical: whole tensors in full names, the same for all of them,
so that a checkpoint of one is a checkpoint of any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from dist_fair.data.window import Window
from dist_fair.engine import checkpoint
from dist_fair.engine.module import Losses, TrainingModule
from dist_fair.errors import DistFairError

Tensors = dict[str, torch.Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Backend(ABC):
    """A module in training. Every method but `describe` is called on all ranks together.

    module: the bare TrainingModule; its parameters may be sharded. optimizer: whose learning rate the schedule sets.
    """

    name: str
    module: TrainingModule
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def differentiate(self, window: Window, progress: float, share: float, last: bool) -> Losses:
        """Adds the gradients of `share` times the window's loss to the parameters'.

        last: this is the last window before they are used; by then they are averaged over ranks.
        """

    @abstractmethod
    def clip(self, limit: float | None) -> torch.Tensor:
        """The global norm of the averaged gradients, a scalar on the device; they are then scaled down to `limit`."""

    @abstractmethod
    def step(self, broken: torch.Tensor) -> None:
        """Takes an optimizer step, unless `broken`, and drops the gradients.

        broken: bool, a scalar on the device. Where the optimizer is a fused one of torch nobody waits for it.
        """

    @abstractmethod
    def state(self, owned: Callable[[str], bool]) -> dict[str, Tensors]:
        """{"model": parameters and buffers, "optimizer": moments, named STATE/PARAMETER}: whole, copies on the CPU.

        owned: of which tensors the caller wants to hold a copy, by parameter or buffer name.
        """

    @abstractmethod
    def load(self, model: Tensors, optimizer: Tensors, source: Path) -> None:
        """Takes over what `state` gave, whole tensors on every rank; DistFairError, before anything changed, where
        names or shapes do not fit. source: named in the error."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[TrainingModule]:
        """A plain module with the present weights, whole on every rank; changed buffers are taken over at the end."""

    @abstractmethod
    def describe(self) -> str:
        """What each rank holds, counted, not as configured: "ddp: 2 ranks, each all 1,234 parameters"."""


def refuse_misfit(own: Tensors, trained: Collection[str], model: Tensors, optimizer: Tensors, source: Path) -> None:
    """Raises DistFairError unless a state has just a module's tensors, and each trained parameter the same moments or
    none of any.

    own: what the module has, whole; on "meta" will do. trained: the parameters that an optimizer steps.
    """
    checkpoint.refuse_other_tensors(own, model, source)
    kept: dict[str, set[str]] = {}
    for name, value in optimizer.items():
        moment, _, owner = name.partition("/")
        if owner not in trained:
            raise DistFairError(f"{source} does not fit this recipe: it has '{name}', but no such parameter trains")
        if value.dim():
            checkpoint.refuse_other_tensor(name, value, own[owner], source)
        kept.setdefault(owner, set()).add(moment)
    every = set().union(*kept.values())
    if uneven := [name for name in sorted(kept) if kept[name] != every]:
        raise DistFairError(f"{source}: of '{uneven[0]}' it has the moments {sorted(kept[uneven[0]])}, of others "
                            f"{sorted(every)}: it is damaged; resume from an older checkpoint")  # fmt: skip
