"""Weights from files: safetensors, or a state dict that torch reads without executing anything.

All is checked before anything is loaded: a module is either as it was, or has all of its weights from the file.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from dist_fair.errors import DistFairError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_NESTS = ("state_dict", "model_state_dict", "model", "detector")
_NAMED_AT_MOST = 10


def load_weights(module: nn.Module, path: str | Path, heads: Collection[str] = ()) -> list[str]:
    """Loads `module` (a detector, or the backbone of one) from a file; returns the names in the file it left out.

    Names may carry a prefix ("module.", "backbone.", ...): the one under which most of the module's names are found.
    heads: names of submodules of the file's model that the module may lack, because they are its classifier; with
    heads, what lies beside the prefix is left out too. Everything else must match, name by name and shape by shape.
    Raises DistFairError for a file that cannot be read, holds code, or does not match.
    """
    return load_state(module, read_state(path), str(path), heads)


def load_state(
    module: nn.Module, state: Mapping[str, torch.Tensor], place: str, heads: Collection[str] = ()
) -> list[str]:
    """Loads `module` from a state dict, as load_weights does; place: where it is from, for error texts."""
    wanted = module.state_dict()
    prefix = _prefix(state, wanted)
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    beside = [name for name in state if not name.startswith(prefix)]
    left_out = [prefix + name for name in found if name not in wanted and name.split(".")[0] in heads]
    left_out += beside if heads else []
    unexpected = [] if heads else beside
    unexpected += [prefix + name for name in found if name not in wanted and prefix + name not in left_out]
    # Files from before torch 0.4.1 count no batches; the count only matters to momentum=None.
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")}
    loaded = counters | {name: _fitted(tensor, wanted[name]) for name, tensor in found.items() if name in wanted}
    missing = [name for name in wanted if name not in loaded]
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in loaded.items()
        if tensor.shape != wanted[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in problems.items() if names)
        raise DistFairError(f"{place}: not the weights of this {type(module).__name__}; nothing was loaded; {text}")
    module.load_state_dict(loaded)
    return left_out


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file by name, on the CPU. Nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise DistFairError(f"{path}: no such file; give a file of weights ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise DistFairError(f"{path}: weights are read from {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers find wrong with a file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DistFairError(
            f"{path}: cannot be read as weights without executing it ({reason}); "
            f"save the state dict alone, best as safetensors"
        ) from error
    return _tensors(content, path)


def _tensors(content: object, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
        nest = next((name for name in _NESTS if isinstance(content.get(name), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    raise DistFairError(f"{path}: holds no state dict (names to tensors), neither at the top nor under {_NESTS}")


def _prefix(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """The prefix under which most of the wanted names are found; the shortest of those."""
    probes = sorted(wanted, key=len)[-20:]
    candidates = {name.removesuffix(probe) for name in state for probe in probes if name.endswith(probe)} | {""}
    whole = [prefix for prefix in candidates if prefix == "" or prefix.endswith(".")]
    return min(whole, key=lambda prefix: (-sum(prefix + name in state for name in wanted), len(prefix)))


def _fitted(tensor: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A pointwise convolution stored as a matrix (Cadene's Xception file) becomes (out, in, 1, 1) again."""
    if tensor.ndim == 2 and wanted.shape == (*tensor.shape, 1, 1):
        return tensor[:, :, None, None]
    return tensor


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
