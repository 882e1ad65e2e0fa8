"""What the backends have in common that hold parts of tensors: the norm, the logical state, the whole module."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dist_fair.engine.backends.base import Backend, Tensors, refuse_misfit
from dist_fair.engine.module import TrainingModule


class Sharded(Backend):
    """A Backend of which a rank holds parts of tensors. `_whole` and `_take` are called on all ranks together."""

    device: torch.device

    @abstractmethod
    def _gradients(self) -> Iterable[torch.Tensor]:
        """This rank's parts of the averaged gradients. Over all ranks they have each element once, zeros aside."""

    @abstractmethod
    def _moments(self, parameter: nn.Parameter) -> list[str]:
        """What the optimizer keeps of a parameter so far, such as exp_avg; the same on every rank."""

    @abstractmethod
    def _whole(self, parameter: nn.Parameter, moment: str | None = None) -> torch.Tensor:
        """A parameter or one of its moments, whole on every rank; it may be the one that is trained."""

    @abstractmethod
    def _take(self, parameter: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
        """Keeps this rank's part of a whole parameter or moment."""

    def clip(self, limit: float | None) -> torch.Tensor:
        parts = [part for part in self._gradients() if part.numel()]
        squares = [torch.linalg.vector_norm(part).to(self.device, torch.float64).square() for part in parts]
        own = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=self.device)
        norm = self.module.comm.sum(own, "gradient norm").sqrt()
        if parts and limit is not None:
            # What torch's clip_grad_norm_ multiplies by. Parts of one rank may lie on the CPU, if they are offloaded.
            torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0).to(parts[0].device, parts[0].dtype))
        return norm

    def state(self, owned: Callable[[str], bool]) -> dict[str, Tensors]:
        parameters, model, moments = named_parameters(self.module), {}, {}
        for name, value in self.module.state_dict().items():
            whole = self._whole(parameters[name]) if name in parameters else value
            if owned(name):
                model[name] = whole.detach().to("cpu", copy=True)
        for name, parameter in self.module.named_parameters():
            for moment in self._moments(parameter):
                whole = self._whole(parameter, moment)
                if owned(name):
                    moments[f"{moment}/{name}"] = whole.detach().to("cpu", copy=True)
        return {"model": model, "optimizer": moments}

    @torch.no_grad()
    def load(self, model: Tensors, optimizer: Tensors, source: Path) -> None:
        parameters, own = named_parameters(self.module), self.module.state_dict(keep_vars=True)
        shapes = {
            name: torch.empty(self._shape(value), dtype=value.dtype, device="meta") for name, value in own.items()
        }
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        refuse_misfit(shapes, trained, model, optimizer, source)
        for name, value in model.items():
            if name in parameters:
                self._take(parameters[name], value.to(self.device))
            else:
                own[name].copy_(value)
        for name, value in optimizer.items():
            moment, _, owner = name.partition("/")
            self._take(parameters[owner], value.to(self.device) if value.dim() else value, moment)

    def _shape(self, tensor: torch.Tensor) -> torch.Size:
        """Of the whole."""
        return tensor.shape


class Whole:
    """A copy of a module that has no weights of its own, and borrows them.

    Made before the module is sharded: hooks and partitioned parameters do not copy. Buffers are those of the module.
    """

    def __init__(self, module: TrainingModule):
        empty = {id(one): nn.Parameter(one.new_empty(0), one.requires_grad) for one in module.parameters()}
        shared = {id(one): one for one in (module.comm, *module.buffers())}
        self.copy = copy.deepcopy(module, empty | shared)

    @contextmanager
    def of(self, module: TrainingModule, whole: Callable[[nn.Parameter], torch.Tensor]) -> Iterator[TrainingModule]:
        """The copy with the present weights and buffers of `module`; changed buffers are taken over at the end."""
        names = dict(self.copy.named_parameters())
        for name, parameter in module.named_parameters():
            names[name].data = whole(parameter).detach()
        for name, buffer in module.named_buffers():
            _set_buffer(self.copy, name, buffer)
        self.copy.train(module.training)
        try:
            yield self.copy
        finally:
            for name, buffer in self.copy.named_buffers():
                _set_buffer(module, name, buffer)
            for parameter in names.values():
                parameter.data = parameter.new_empty(0)


def _set_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, buffer)


def open_output(module: TrainingModule) -> None:
    """Makes a forward pass give (loss, Losses): sharding libraries hang what backward is to do on the tensors of an
    output, and find those of a tuple, not those of our dataclass. Call it before theirs are hung."""
    module.register_forward_hook(lambda module, inputs, losses: (losses.loss, losses))


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under all of their names."""
    return dict(module.named_parameters(remove_duplicate=False))
