"""DistributedDataParallel through Accelerate: every rank holds everything, gradients are all-reduced in backward."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator

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

    def clip(self, limit: float | None) -> float:
        return float(self.accelerator.clip_grad_norm_(self.module.parameters(), limit or math.inf))

    def step(self) -> None:
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
