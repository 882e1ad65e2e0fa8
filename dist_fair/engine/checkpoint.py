"""Checkpoints: one logical state in full names, without pickle, whole or not there.

    checkpoints/step-00000200/model.safetensors       parameters and buffers of detector and interventions
                              optimizer.safetensors   moments, named STATE/PARAMETER
                              state.json              step, recipe, values of the last step; who wrote it;
                                                      of each file its size, SHA-256 and the tensors in it

A large state is dealt to several files a part, model-00002-of-00008.safetensors. There is no sampler, schedule or
generator state: all are functions of the step. Written into a folder beside the target, every file and the folder
fsynced, then renamed: a folder with the final name is complete. What is read is checked before it is used: file names,
hashes, names, shapes and kinds of numbers; it may come from a stranger.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError, nearest

FORMAT = 2  # 1: a file a part, their hashes, and no lists of tensors
PARTS = ("model", "optimizer")
LARGEST = 2**28  # bytes of state.json that are read; a million tensors need half of them
Tensors = dict[str, torch.Tensor]

_FILE = re.compile(r"(model|optimizer)(?:-(\d{5})-of-(\d{5}))?\.safetensors")
_STEP = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.replaced")


class DamagedError(DistFairError):
    """A checkpoint that lacks something or is not what was written; older ones may be whole."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint. tensors: the names in it; None in format 1, which does not say."""

    part: str
    sha256: str
    tensors: frozenset[str] | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    recipe: of the trajectory, see Resolved.trajectory. values: numbers told with the step before it. writer: versions,
    backend and number of ranks, for people. files: by name.
    """

    folder: Path
    format: int
    step: int
    recipe: dict
    values: dict
    writer: dict
    files: dict[str, File]

    def tensors(self, part: str, wanted: Callable[[str], bool] = lambda name: True) -> Tensors:
        """The tensors of "model" or "optimizer" whose names are `wanted`, on the CPU; only these are read."""
        # Copies: what safetensors gives is a view of the file, which another node may remove (a bus error on NFS).
        return {name: tensor.clone() for name, tensor in self.each(part, wanted)}

    def each(self, part: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, torch.Tensor]]:
        """The same one at a time, as views of the files. Raises DistFairError where state.json says otherwise."""
        for name, file in self.files.items():
            if file.part != part:
                continue
            try:
                with safe_open(self.folder / name, "pt") as opened:
                    found = {*opened.keys()}
                    if file.tensors is not None and found != file.tensors:
                        raise DamagedError(f"{self.folder / name}: state.json lists other tensors than it has: "
                                           f"{sorted(found ^ file.tensors)[:5]}")  # fmt: skip
                    yield from ((tensor, opened.get_tensor(tensor)) for tensor in sorted(found) if wanted(tensor))
            except (SafetensorError, OSError) as error:
                raise DamagedError(f"{self.folder / name} is no safetensors file: {error}") from None

    def check(self, parts: tuple[str, ...] = PARTS) -> None:
        """Raises DamagedError naming the first file of `parts` that is missing or has another hash."""
        for name, file in self.files.items():
            path = self.folder / name
            if file.part in parts and not (path.is_file() and sha256(path) == file.sha256):
                raise DamagedError(f"{path} is missing or damaged (its SHA-256 is not the one in state.json)")


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def file_name(part: str, number: int, count: int) -> str:
    """The name of a part's file, number 0..count-1."""
    return f"{part}.safetensors" if count == 1 else f"{part}-{number + 1:05d}-of-{count:05d}.safetensors"


# Reading --------------------------------------------------------------------------------------------------------------


def read(folder: Path, parts: tuple[str, ...] = PARTS) -> Checkpoint:
    """Opens a checkpoint and checks the hashes of `parts`. Raises DistFairError naming what is missing or damaged."""
    try:
        found = look(folder)
        found.check(parts)
    except DamagedError as error:
        raise DamagedError(f"{error}; name an older checkpoint by its path") from None
    return found


def look(folder: Path) -> Checkpoint:
    """What state.json says, checked as far as it can be without the other files. Raises DistFairError."""
    state = _json(folder / "state.json")
    if state.get("format") not in range(1, FORMAT + 1):
        told = str(state.get("format"))[:20]
        raise DistFairError(f"{folder}/state.json has format {told}; this version reads 1 to {FORMAT}")
    try:
        step, recipe, values, writer = state["step"], state["recipe"], state.get("values", {}), state.get("writer", {})
        if type(step) is not int or not 0 <= step < 2**63:
            raise ValueError(f"{str(step)[:20]} is no step")
        if not all(isinstance(one, dict) for one in (recipe, values, writer)):
            raise ValueError("recipe, values and writer are not objects")
        values = {name: float(value) for name, value in values.items()}
        return Checkpoint(folder, state["format"], step, recipe, values, writer, _files(state))
    except KeyError as error:
        raise DamagedError(f"{folder} is no checkpoint of dist_fair: state.json lacks {str(error)[:80]}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedError(f"{folder} is no checkpoint of dist_fair: state.json: {str(error)[:200]}") from None


def _json(path: Path) -> dict:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST:,} bytes")
        state = json.loads(path.read_bytes())
        if not isinstance(state, dict):
            raise ValueError("not an object")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{path.parent} is no checkpoint of dist_fair: state.json: {error.strerror}") from None
    except OSError as error:  # the file system's trouble of the moment, no damage
        raise DistFairError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path.parent} is no checkpoint of dist_fair: state.json: {str(error)[:200]}") from None
    return state


def _files(state: Mapping) -> dict[str, File]:
    """The files of a state by name. Raises ValueError for other names than `file_name` gives, gaps and duplicates."""
    listed = state["format"] > 1
    told = state["files"] if listed else {name: {"sha256": one} for name, one in state["sha256"].items()}
    files = {}
    for name, entry in sorted(told.items()):
        match = _FILE.fullmatch(name)
        if not match or not isinstance(entry["sha256"], str):
            raise ValueError(f"'{name[:80]}' is no file of a checkpoint")
        files[name] = File(match[1], entry["sha256"], frozenset(entry["tensors"]) if listed else None)
    for part in PARTS:
        own = [name for name in files if files[name].part == part]
        if not own or own != [file_name(part, number, len(own)) for number in range(len(own))]:
            raise ValueError(f"the files of the {part} are not one whole set: {own[:5]}")
        names = Counter(tensor for name in own for tensor in told[name].get("tensors", ()))
        if twice := [tensor for tensor, count in names.items() if count > 1]:
            raise ValueError(f"'{str(twice[0])[:80]}' is there twice")
    return files


def complete(root: Path) -> list[Path]:
    """The complete checkpoints below `root`, oldest first. Other folders, such as a person's copies, are no matter."""
    found = {}
    # The old one of a step that was killed between the renames of `commit` goes first, and is replaced by a new one.
    for path in [*root.glob(".step-*.replaced"), *root.glob("step-*")]:
        if (match := _STEP.fullmatch(path.name)) and (path / "state.json").is_file():
            found[int(match[1] or match[2])] = path
    return [found[step] for step in sorted(found)]


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None. Its hashes are not checked."""
    return found[-1] if (found := complete(root)) else None


def newest_undamaged(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below `root` that is as it was written, or None; and what is wrong with newer ones.

    For a run that goes on by itself: a step is a function of the state before it, so an older checkpoint costs time and
    gives the same trajectory, and a job that is requeued at night need not wait for a person. Whoever takes it must say
    what it passed over. Where none is whole, starting anew would throw a run away unasked: DistFairError.
    """
    faults = []
    for folder in reversed(complete(root)):
        try:
            found = look(folder)
            found.check()
            return found, faults
        except DamagedError as error:
            faults.append(str(error))
    if faults:
        raise DamagedError(f"no checkpoint in {root} is whole: {faults[0]}; name another with resume=PATH, or start "
                           "anew in another out=")  # fmt: skip
    return None, []


def agree(found: Checkpoint | None, comm: Communicator) -> None:
    """Raises DistFairError on every rank unless all of them found the same checkpoint, or none.

    A node of a shared file system may see a folder some seconds late, and damage by its own memory or cable.
    """
    text = "" if found is None else json.dumps([found.step, [file.sha256 for file in found.files.values()]])
    comm.agree(hashlib.sha256(text.encode()).digest()[:16], "the checkpoint to go on from")


def find(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one of a run folder."""
    if (path / "state.json").is_file():
        return path
    found = newest(path / "checkpoints")
    if found is None:
        raise DistFairError(f"{path} is neither a checkpoint nor a run folder with one in checkpoints/")
    return found


def open_part(path: Path) -> Tensors:
    """The model tensors of a checkpoint, run folder or safetensors file."""
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DistFairError(f"{path} is no safetensors file: {error}") from None
    return read(find(path), ("model",)).tensors("model")


# To and from modules --------------------------------------------------------------------------------------------------


def optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, owned: Callable[[str], bool] = lambda name: True
) -> Tensors:
    """The optimizer's state by parameter name, of the parameters `owned`: {"exp_avg/detector.conv1.weight": ...}."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None and owned(names[id(parameter)])
    }


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Puts the state of `optimizer_tensors` back, all or nothing. What does not fit raises DistFairError."""
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        owner = parameters.get(name.partition("/")[2])
        if owner is None or (value.dim() and (value.shape != owner.shape or not value.is_floating_point())):
            raise DistFairError(f"optimizer state '{name}' {_described(value)} does not fit this recipe's detector")
    on_device = {id(one) for group in optimizer.param_groups for one in group["params"]
                 if group.get("fused") or group.get("capturable")}  # fmt: skip
    for name, value in tensors.items():
        key, _, owner = name.partition("/")
        parameter = parameters[owner]
        if value.dim():
            # Laid out in memory as the parameter is: fused kernels pair elements by their place in it.
            like = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            optimizer.state[parameter][key] = like.copy_(value)
        else:
            optimizer.state[parameter][key] = value.to(parameter.device) if id(parameter) in on_device else value


def load_model(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Loads all parameters and buffers, or none: names, shapes and kinds of numbers are checked first."""
    refuse_other_tensors(module.state_dict(), tensors, source)
    module.load_state_dict(tensors)


def refuse_other_tensors(own: Tensors, tensors: Tensors, source: Path) -> None:
    """Raises DistFairError unless `tensors` have the names, shapes and kinds of numbers of a module's `own`."""
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        hint = nearest(extra[0], missing) if extra and missing else ""
        raise DistFairError(f"{source} does not fit this recipe: missing {missing[:5]}, unexpected {extra[:5]}. {hint}")
    for name, value in tensors.items():
        refuse_other_tensor(name, value, own[name], source)


def refuse_other_tensor(name: str, value: torch.Tensor, own: torch.Tensor, source: Path) -> None:
    """The same for one. Floats may be of another precision: backends keep weights in different ones."""
    same = value.dtype == own.dtype or (value.is_floating_point() and own.is_floating_point())
    if value.shape != own.shape or not same:
        raise DistFairError(f"{source}: '{name}' is {_described(value)}, the recipe has {_described(own)}")


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
