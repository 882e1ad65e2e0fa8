"""Fully sharded data parallel, torch's own (FSDP2): parameters, gradients and moments in W parts.

Accelerate's plugin for it is silently ignored on a CPU (plain DDP trains), so this is torch's `fully_shard` itself. The
unit of sharding is a block: its parameters are gathered when it runs and let go after it, in both directions. What is
in no block, and what interventions own, belongs to the whole module: it is at hand from the beginning of the forward
pass to the end of the backward pass, also for what is computed outside of anybody's `forward`.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_fair.data.window import Window
from dist_fair.engine.backends.base import MakeOptimizer
from dist_fair.engine.backends.sharded import Sharded, Whole, open_output
from dist_fair.engine.launch import join_alone
from dist_fair.engine.module import Losses, TrainingModule
from dist_fair.errors import DistFairError

# As parts of all parameters. A smaller block is none: a collective for a norm costs more than it saves. In a larger one
# its own blocks are sharded too: a stage of ConvNeXt-T is 0.56 of the model.
_SMALLEST, _LARGEST = 1e-3, 0.1


class Fsdp(Sharded):
    """See Backend. offload: parameters, gradients and moments stay on the CPU, and the optimizer steps there."""

    name = "fsdp"

    def __init__(
        self, module: TrainingModule, make_optimizer: MakeOptimizer, accelerator: Accelerator, offload: bool = False
    ):
        self.module, self.device = module, accelerator.device
        self.copy, self.total = Whole(module), sum(parameter.numel() for parameter in module.parameters())
        join_alone(self.device)
        open_output(module)
        mesh = init_device_mesh(self.device.type, (module.comm.world,))
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        self.blocks = blocks(module.detector)
        for part in (*self.blocks, module):
            fully_shard(part, mesh=mesh, offload_policy=policy)
        self.optimizer = make_optimizer(module)
        self._prove()

    def differentiate(self, window: Window, progress: float, share: float, last: bool) -> Losses:
        self.module.set_requires_gradient_sync(last)
        loss, losses = self.module(window, progress)
        (loss * share).backward()
        return losses

    def step(self, broken: torch.Tensor) -> None:
        if not broken.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self) -> AbstractContextManager[TrainingModule]:
        return self.copy.of(self.module, self._whole)

    def describe(self) -> str:
        return (f"fsdp: {self.module.comm.world} ranks, this one with {self._held():,} of {self.total:,} parameters, "
                f"{len(self.blocks)} blocks")  # fmt: skip

    def _held(self) -> int:
        return sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in self.module.parameters())

    def _prove(self) -> None:
        plain = [name for name, parameter in self.module.named_parameters() if not isinstance(parameter, DTensor)]
        comm, held = self.module.comm, self._held()
        together = int(comm.sum(torch.tensor(held, device=self.device), "fsdp/parameters"))
        if plain or together != self.total or (held == self.total and comm.world > 1):
            raise DistFairError(f"train.backend=fsdp: torch {torch.__version__} did not shard {plain or 'anything'}: "
                                f"this rank has {held:,} of {self.total:,} parameters, all ranks together "
                                f"{together:,}; set another train.backend")  # fmt: skip

    def _gradients(self) -> Iterable[torch.Tensor]:
        return [parameter.grad.to_local() for parameter in self.module.parameters() if parameter.grad is not None]

    def _moments(self, parameter: nn.Parameter) -> list[str]:
        return [moment for moment, value in self.optimizer.state.get(parameter, {}).items() if value is not None]

    def _whole(self, parameter: nn.Parameter, moment: str | None = None) -> torch.Tensor:
        part = parameter if moment is None else torch.as_tensor(self.optimizer.state[parameter][moment])
        return part.detach().to(self.device).full_tensor() if isinstance(part, DTensor) else part

    def _take(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
        if moment is not None and not value.dim():
            self.optimizer.state[parameter][moment] = value
            return
        part = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        if moment is None:
            parameter.to_local().copy_(part.to_local())
        else:
            self.optimizer.state[parameter][moment] = part.to(parameter.to_local().device)


def blocks(detector: nn.Module) -> list[nn.Module]:
    """What is sharded for itself, inner ones first: elements of Sequentials and ModuleLists that are no such containers
    themselves. These are called through their `forward`, as sharding needs it, with activation checkpointing too."""
    total = _count(detector)

    def below(module: nn.Module) -> list[nn.Module]:
        container, found = isinstance(module, nn.Sequential | nn.ModuleList), []
        for child in module.children():
            block = container and not isinstance(child, nn.Sequential | nn.ModuleList)
            found += below(child) if not block or _count(child) > _LARGEST * total else []
            found += [child] if block and _count(child) >= _SMALLEST * total else []
        return found

    return below(detector)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
