"""ZeRO 1 to 3 by DeepSpeed: moments in W parts, then gradients too, then weights too (Rajbhandari et al. 2020).

DeepSpeed keeps this rank's parts, the "master weights", in flat fp32 tensors, which a torch optimizer steps. Ours are
its engine's forward, backward and step; not its checkpoints, precisions, schedules, clipping or accumulation counters:
the norm must be known before a step is taken, windows may have any share of a step, and a state must fit any backend.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from torch import nn

from dist_fair.data.window import Window
from dist_fair.engine.backends.base import MakeOptimizer, Tensors
from dist_fair.engine.backends.sharded import Sharded, Whole, open_output
from dist_fair.engine.launch import join_alone
from dist_fair.engine.module import Losses, TrainingModule
from dist_fair.errors import DistFairError

_BUCKET = 2**24  # elements; DeepSpeed's 5e8 are a buffer of 2 GB, whatever the model


@dataclass(frozen=True)
class Part:
    """This rank's part of a parameter, flattened: elements [start, start + size), which are size ones of `flat` from
    `offset` on.
    """

    flat: torch.Tensor
    offset: int
    size: int
    start: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The part in a tensor laid out like `flat`."""
        return flat[self.offset : self.offset + self.size]


class Zero(Sharded):
    """See Backend. stage: 1, 2 or 3. offload: master weights, moments and their gradients, and with stage 3 the weights
    too, stay on the CPU, and the optimizer steps there."""

    def __init__(
        self, module: TrainingModule, make_optimizer: MakeOptimizer, accelerator: Accelerator, stage: int, offload: bool
    ):
        self.name, self.stage, self.offload = f"zero{stage}", stage, offload
        self.module, self.device = module, accelerator.device
        self.copy = Whole(module) if stage == 3 else None
        self.total = sum(parameter.numel() for parameter in module.parameters())
        join_alone(self.device)
        open_output(module)
        self.optimizer = make_optimizer(module)
        deepspeed = _deepspeed(self.device)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=_configuration(stage, offload, self.total)
        )
        self.entered = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        self.parts = {parameter: self._part(parameter) for parameter in module.parameters() if parameter.requires_grad}
        self._prove()

    def differentiate(self, window: Window, progress: float, share: float, last: bool) -> Losses:
        self.engine.set_gradient_accumulation_boundary(last)
        entered = len(self.entered)
        loss, losses = self.engine(window, progress)
        self.engine.backward(loss * share)
        del self.entered[entered:]  # a module that backward runs again is left halfway, before its entry is taken out
        return losses

    def step(self, broken: torch.Tensor) -> None:
        if not broken.item():
            self.engine.step()

    def load(self, model: Tensors, optimizer: Tensors, source: Path) -> None:
        scalars, names = defaultdict(set), {name.partition("/")[2] for name in optimizer}
        for name, value in optimizer.items():
            if not value.dim():
                scalars[name.partition("/")[0]].add(value.item())
        trained = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        if (names and names < trained) or any(len(values) > 1 for values in scalars.values()):
            raise DistFairError(f"{source}: not all parameters have made as many steps, as they have with "
                                f"train.backend={self.name}; set it to ddp or fsdp")  # fmt: skip
        super().load(model, optimizer, source)

    def whole(self) -> AbstractContextManager[TrainingModule]:
        return self.copy.of(self.module, self._whole) if self.copy else nullcontext(self.module)

    def describe(self) -> str:
        what = {1: "moments", 2: "moments and gradients", 3: "moments, gradients and weights"}[self.stage]
        return (f"{self.name}: {self.module.comm.world} ranks, this one with {what} of {self._held():,} of "
                f"{self.total:,} parameters")  # fmt: skip

    def _held(self) -> int:
        return sum(part.size for part in self.parts.values())

    def _prove(self) -> None:
        comm, held, trained = self.module.comm, self._held(), sum(map(self._count, self.parts))
        together = int(comm.sum(torch.tensor(held, device=self.device), "zero/parameters"))
        local, stage = sum(one.numel() for one in self.module.parameters()), self.engine.zero_optimization_stage()
        stepped = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
        faults = {
            f"it is of stage {stage}": stage != self.stage,
            f"this rank steps {held:,} of {trained:,} parameters, all ranks together {together:,}":
                together != trained or (held == trained and comm.world > 1),
            f"this rank keeps {local:,} whole weights": (local == 0) != (self.stage == 3),
            # Of stage 3 the optimizer sees them only while it steps.
            "the optimizer does not step its parts":
                self.stage < 3 and stepped != {id(part.flat) for part in self.parts.values()},
        }  # fmt: skip
        if found := [fault for fault, there in faults.items() if there]:
            raise DistFairError(f"train.backend={self.name}: DeepSpeed's engine is not that: {'; '.join(found)}: set "
                                "another train.backend")  # fmt: skip

    def _part(self, parameter: nn.Parameter) -> Part:
        inner = self.engine.optimizer
        if self.stage == 3:
            group, offset, padded = inner.grad_position[inner.get_param_id(parameter)]
            start = min(padded * self.module.comm.rank, parameter.ds_numel)
            size = min(padded, parameter.ds_numel - start)
            return Part(inner.fp32_partitioned_groups_flat[group], offset, size, start)
        if parameter._hp_mapping is None:
            return Part(inner.single_partition_of_fp32_groups[0], 0, 0, 0)
        whole, flat = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
        group = parameter._hp_mapping.param_group_index
        return Part(inner.single_partition_of_fp32_groups[group], flat.start, flat.numel, whole.start)

    def _gradients(self) -> Iterable[torch.Tensor]:
        if self.offload:
            return [flat.grad for flat in {id(part.flat): part.flat for part in self.parts.values()}.values()]
        return [part for group in self.engine.optimizer.averaged_gradients.values() for part in group]

    def _moments(self, parameter: nn.Parameter) -> list[str]:
        state = self.optimizer.state.get(self.parts[parameter].flat, {}) if parameter in self.parts else {}
        return [moment for moment, value in state.items() if value is not None]

    def _whole(self, parameter: nn.Parameter, moment: str | None = None) -> torch.Tensor:
        if moment is None and self.stage < 3:
            return parameter
        if parameter not in self.parts:
            padded = self.module.comm.gather(parameter.ds_tensor.to(self.device), "zero/frozen")
            return padded[: self._count(parameter)].view(parameter.ds_shape)
        part = self.parts[parameter]
        flat = part.flat if moment is None else torch.as_tensor(self.optimizer.state[part.flat][moment])
        if not flat.dim():
            return flat
        whole = torch.zeros(self._count(parameter), dtype=flat.dtype, device=self.device)
        whole[part.start : part.start + part.size] = part.of(flat.detach())
        return self.module.comm.sum(whole, "zero/state").view(self._shape(parameter))

    def _take(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
        part = self.parts.get(parameter)
        own = value.flatten()[part.start : part.start + part.size] if part and value.dim() else None
        if moment is None:
            self._take_weights(parameter, value, part, own)
        elif own is None:
            self.optimizer.state[part.flat][moment] = value.clone()
        else:
            part.of(self.optimizer.state[part.flat].setdefault(moment, torch.zeros_like(part.flat))).copy_(own)

    def _take_weights(
        self, parameter: nn.Parameter, value: torch.Tensor, part: Part | None, own: torch.Tensor | None
    ) -> None:
        if part:
            part.of(part.flat).copy_(own)
        if self.stage < 3:
            parameter.copy_(value)
            return
        width = parameter.ds_tensor.numel()
        own = value.flatten()[width * self.module.comm.rank :][:width]
        parameter.ds_tensor[: own.numel()].copy_(own)

    def _shape(self, tensor: torch.Tensor) -> torch.Size:
        return getattr(tensor, "ds_shape", tensor.shape)

    def _count(self, parameter: nn.Parameter) -> int:
        return self._shape(parameter).numel()


def _configuration(stage: int, offload: bool, parameters: int) -> dict[str, object]:
    """DeepSpeed's. Everything fp32: half precision is autocast, inside our module.

    Nothing overlaps: where it did, gradients were reduced before they were there (DeepSpeed issues 5545 and 8061).
    """
    zero: dict[str, object] = {
        "stage": stage, "overlap_comm": False, "reduce_bucket_size": min(_BUCKET, parameters),
        "allgather_bucket_size": 2 * _BUCKET,
    }  # fmt: skip
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # all of them: what `describe` counts
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # of ours it divides by none: the loss is the mean already
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for a device, with errors alone on the console, and without anything to be compiled: by default it
    builds a collective in shared memory for the CPU, 30 s with a compiler, races between ranks included."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it looks for other makers' accelerators, and warns
    os.environ.setdefault("LOCAL_RANK", "0")  # a launcher sets it; for a single rank nobody has, and it is read anyway
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed
