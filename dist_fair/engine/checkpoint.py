"""Checkpoints: one logical state in full names, without pickle, whole or not there.

    checkpoints/step-00000200/model.safetensors       parameters and buffers of detector and interventions
                              optimizer.safetensors   moments, named STATE/PARAMETER
                              state.json              step, recipe, SHA-256 of the other files

There is no sampler, schedule or generator state: all are functions of the step. Written into a folder beside the
target, every file and the folder fsynced, then renamed: a folder with the final name is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dist_fair.errors import DistFairError, nearest

FORMAT = 1
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose hashes were checked."""

    folder: Path
    step: int
    recipe: dict

    def tensors(self, part: str) -> Tensors:
        """The tensors of "model" or "optimizer", on the CPU."""
        return load_file(self.folder / f"{part}.safetensors")


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint; names sort like steps."""
    return f"step-{step:08d}"


def write(root: Path, step: int, recipe: Mapping, parts: Mapping[str, Tensors]) -> Path:
    """Writes root/step-N atomically and returns it; an existing one is replaced."""
    target, aside = root / name_of(step), root / f".{name_of(step)}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for part, tensors in parts.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / f"{part}.safetensors")
    state = {"format": FORMAT, "step": step, "recipe": recipe,
             "sha256": {f"{part}.safetensors": _sha256(aside / f"{part}.safetensors") for part in parts}}  # fmt: skip
    (aside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for path in [*aside.iterdir(), aside]:
        _fsync(path)
    replaced = root / f".{name_of(step)}.replaced"
    if target.exists():
        os.replace(target, replaced)
    os.replace(aside, target)
    _fsync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def read(folder: Path) -> Checkpoint:
    """Opens a checkpoint and checks every hash. Raises DistFairError naming the file that is missing or damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        step, recipe, hashes = int(state["step"]), dict(state["recipe"]), dict(state["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistFairError(f"{folder} is no checkpoint of dist_fair: state.json: {error}") from None
    if state.get("format") != FORMAT:
        raise DistFairError(f"{folder}/state.json has format {state.get('format')}; this version reads {FORMAT}")
    for name, expected in hashes.items():
        path = folder / Path(name).name
        if not path.is_file() or _sha256(path) != expected:
            raise DistFairError(f"{path} is missing or damaged (its SHA-256 is not the one in state.json); resume from "
                                "an older checkpoint with resume=PATH")  # fmt: skip
    return Checkpoint(folder, step, recipe)


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None."""
    found = sorted(path for path in root.glob("step-*") if (path / "state.json").is_file())
    return found[-1] if found else None


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a killed run left half-written."""
    for path in [*sorted(root.glob("step-*"))[:-keep], *root.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def find(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one of a run folder."""
    if (path / "state.json").is_file():
        return path
    found = newest(path / "checkpoints")
    if found is None:
        raise DistFairError(f"{path} is neither a checkpoint nor a run folder with one in checkpoints/")
    return found


def optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, owned: Callable[[str], bool] = lambda name: True
) -> Tensors:
    """The optimizer's state by parameter name, of the parameters `owned`: {"exp_avg/detector.conv1.weight": ...}."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value).detach().cpu().clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None and owned(names[id(parameter)])
    }


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Puts the state of `optimizer_tensors` back. Unknown parameters and shapes that differ raise DistFairError."""
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        key, _, owner = name.partition("/")
        if owner not in parameters or (value.dim() and value.shape != parameters[owner].shape):
            raise DistFairError(f"optimizer state '{name}' {tuple(value.shape)} does not fit this recipe's detector")
        parameter = parameters[owner]
        optimizer.state[parameter][key] = value.to(parameter.device) if value.dim() else value


def load_model(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Loads all parameters and buffers, or none: names and shapes are checked first."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        hint = nearest(extra[0], missing) if extra and missing else ""
        raise DistFairError(f"{source} does not fit this recipe: missing {missing[:5]}, unexpected {extra[:5]}. {hint}")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise DistFairError(f"{source}: '{name}' is {tuple(value.shape)}, the recipe has {tuple(own[name].shape)}")
    module.load_state_dict(tensors)


def open_part(path: Path) -> Tensors:
    """The model tensors of a checkpoint, run folder or safetensors file."""
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DistFairError(f"{path} is no safetensors file: {error}") from None
    return read(find(path)).tensors("model")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
