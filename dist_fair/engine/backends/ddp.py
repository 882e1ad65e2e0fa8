"""DistributedDataParallel through Accelerate: every rank holds everything, gradients are all-reduced in backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dist_fair.data.window import Window
from dist_fair.engine import checkpoint
from dist_fair.engine.backends.base import Backend, MakeOptimizer, Tensors, refuse_misfit
from dist_fair.engine.module import Losses, TrainingModule


class Ddp(Backend):
    """See Backend. On one rank there is no wrapper, and nothing else differs."""

    name = "ddp"

    def __init__(self, module: TrainingModule, make_optimizer: MakeOptimizer, accelerator: Accelerator):
        self.module, self.accelerator = module, accelerator
        self.optimizer = make_optimizer(module)
        self.wrapped = accelerator.prepare_model(module)

    def differentiate(self, window: Window, progress: float, share: float, last: bool) -> Losses:
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            losses = self.wrapped(window, progress)
            self.accelerator.backward(losses.loss * share)
        return losses

    def clip(self, limit: float | None) -> torch.Tensor:
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        if limit is not None:
            clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def step(self, broken: torch.Tensor) -> None:
        if self.optimizer.defaults.get("fused"):
            # What torch's GradScaler tells them: where it is 1, weights, moments and counts stay as they are.
            self.optimizer.found_inf = broken.float()
            self.optimizer.step()
        elif not broken.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self, owned: Callable[[str], bool]) -> dict[str, Tensors]:
        whole = self.module.state_dict()
        model = {name: value.detach().to("cpu", copy=True) for name, value in whole.items() if owned(name)}
        return {"model": model, "optimizer": checkpoint.optimizer_tensors(self.module, self.optimizer, owned)}

    def load(self, model: Tensors, optimizer: Tensors, source: Path) -> None:
        trained = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        refuse_misfit(self.module.state_dict(), trained, model, optimizer, source)
        checkpoint.load_model(self.module, model, source)
        checkpoint.load_optimizer(self.module, self.optimizer, optimizer)

    @contextmanager
    def whole(self) -> Iterator[TrainingModule]:
        yield self.module

    def describe(self) -> str:
        held = sum(parameter.numel() for parameter in self.module.parameters())
        return f"ddp: {self.module.comm.world} ranks, each all {held:,} parameters"
