"""How a checkpoint comes into being, beside its final name, and which ones stay. See engine.checkpoint."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import dist_fair
from dist_fair.engine import checkpoint
from dist_fair.engine.checkpoint import FORMAT, Tensors, file_name, name_of, sha256
from dist_fair.engine.run_folder import write_text
from dist_fair.errors import DistFairError, nearest

BEST = "best.json"  # in checkpoints/


def write(root: Path, step: int, recipe: Mapping, parts: Mapping[str, Tensors], **more: Mapping) -> Path:
    """Writes root/step-N from one process and returns it; an existing one is replaced. Raises OSError.

    more: values and writer, see Checkpoint. What is left of a failed write is removed.
    """
    folder = aside(root / name_of(step))
    begin(root, step)
    try:
        files = {file_name(part, 0, 1): write_file(folder / file_name(part, 0, 1), parts[part]) for part in parts}
        return commit(root, {"step": step, "recipe": recipe, **more}, files)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def aside(target: Path) -> Path:
    """Where a checkpoint is made."""
    return target.parent / f".{target.name}.partial"


def begin(root: Path, step: int) -> None:
    """Makes the empty folder in which a checkpoint is made; what a killed run left in it is removed."""
    folder = aside(root / name_of(step))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_file(path: Path, tensors: Tensors) -> dict:
    """Writes one file and waits until it is on disk; what state.json says of it. Raises OSError."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # it hides the system's error in its text
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path), "tensors": sorted(tensors)}


def commit(root: Path, state: Mapping, files: Mapping[str, Mapping]) -> Path:
    """Makes root/step-N of what was written beside it, by all ranks, and returns it.

    state: step, recipe, values, writer. files: name -> what `write_file` gave. Raises OSError, and DistFairError where
    the file of another rank is not in sight.
    """
    target = root / name_of(state["step"])
    folder = aside(target)
    for name, file in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise DistFairError(f"{path}, written by another rank, is not to be seen from here: out= must lie on a "
                                "file system that all nodes share")  # fmt: skip
    versions = {"dist_fair": dist_fair.__version__, "torch": torch.__version__}
    state = {"format": FORMAT, **state, "writer": {**versions, **state.get("writer", {})}, "files": dict(files)}
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    fsync(folder / "state.json")
    fsync(folder)
    # Between the two renames this step has no checkpoint of its name: `complete` then finds the replaced one.
    replaced = root / f".{target.name}.replaced"
    if target.exists():
        os.replace(target, replaced)
    os.replace(folder, target)
    fsync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


@dataclass(frozen=True)
class Best:
    """By what the best checkpoint is told. order: min or max. name: of a number told with each step."""

    order: str
    name: str

    def unknown(self, values: Mapping[str, object]) -> str | None:
        """What is wrong if a step that told `values` cannot be judged; None where it can, or could with a number."""
        if self.name in values:
            return None
        return f"checkpoint.best={self.order}:{self.name}: a step tells no such number: {nearest(self.name, [*values])}"

    def of(self, folders: Sequence[Path]) -> tuple[Path, float] | None:
        """The best of these checkpoints and its number, the older one of equals; those without the number are none."""
        sign, found = -1 if self.order == "max" else 1, []
        for folder in folders:
            try:
                value = checkpoint.look(folder).values.get(self.name)
            except checkpoint.DamagedError:
                continue
            if value is not None and math.isfinite(value):
                found.append((sign * value, folder))
        if not found:
            return None
        value, folder = min(found, key=lambda pair: pair[0])
        return folder, sign * value


def prune(root: Path, step: int, keep: int, best: Best | None = None) -> None:
    """Leaves the newest `keep` checkpoints up to `step`, just written, and the best one; best.json says which that is.

    The numbers lie in the checkpoints, so nothing is forgotten by a run that stops and resumes. Those of later steps
    stay: a run that was sent back to an older step will write them again. What a killed run left half-written goes.
    """
    there = checkpoint.complete(root)
    written = there.index(root / name_of(step)) + 1
    stay = {*there[:written][-keep:], *there[written:]}
    if best and (found := best.of(there)):
        folder, value = found
        stay.add(folder)
        told = {"checkpoint": folder.name, "by": f"{best.order}:{best.name}", "value": value}
        write_text(root / BEST, json.dumps(told, indent=1) + "\n")
    else:
        (root / BEST).unlink(missing_ok=True)
    for folder in there:
        if folder not in stay and not folder.name.startswith("."):
            # Renamed first: a removal that is cut short must not leave half a checkpoint under a final name.
            os.replace(folder, root / f".{folder.name}.pruned")
    for rest in {*root.glob(".step-*")} - stay:
        shutil.rmtree(rest, ignore_errors=True)


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
