"""From a trained recipe to a detector in use: what only training needs is left out, masked channels are removed."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from dist_fair.detectors.base import Detector
from dist_fair.detectors.weights import load_state
from dist_fair.engine.checkpoint_writing import fsync
from dist_fair.engine.deployment import CONFIG, MODEL, DeployedDetector, Description, built, config_text
from dist_fair.errors import DistFairError
from dist_fair.interventions.at_inference import STEPS, Step, others
from dist_fair.interventions.base import registered
from dist_fair.recipe.schema import Recipe

Tensors = Mapping[str, torch.Tensor]


def deploy(recipe: Recipe, tensors: Tensors, provenance: Mapping[str, object], place: str) -> DeployedDetector:
    """The detector of a recipe with the tensors of a checkpoint; its scores are those of the whole module.

    place: of the tensors, for error texts. Raises DistFairError if they are not of this recipe, or if the score needs
    what nobody knows of a face in use.
    """
    precision, chosen = recipe.train.precision, recipe.detector
    detector = built(chosen.name, chosen.arguments, precision)
    steps = _steps(recipe, tensors, place)
    width = steps[-1].width if steps else detector.features
    if width != detector.features:
        detector.resize_classifier(width)
    own = _part(tensors, "detector.")
    load_state(detector, {name: own[name] for name in detector.state_dict() if name in own}, place)
    channels, (steps, masked) = detector.channels, _without_masked(detector, steps)
    kinds = {kind: name for name, kind in STEPS.items()}
    description = Description(
        name=chosen.name,
        arguments=dict(chosen.arguments),
        channels=channels,
        masked=masked,
        steps=[{"kind": kinds[type(step)], **step.options} for step in steps],
        image_size=recipe.data.image_size,
        mean=[*recipe.data.mean],
        std=[*recipe.data.std],
        precision=precision,
        provenance=dict(provenance),
    )
    return DeployedDetector(detector, steps, description)


def _steps(recipe: Recipe, tensors: Tensors, place: str) -> list[Step]:
    """What the recipe's interventions do to features at inference, in recipe order."""
    steps, kinds = [], registered()
    for name, settings in recipe.interventions.items():
        try:
            steps.append(kinds[name].at_inference(settings, _part(tensors, f"interventions.{name}.")))
        except KeyError as error:
            raise DistFairError(f"{place} does not fit its recipe: interventions.{name} has no {error} there") from None
    return [step for step in steps if step is not None]


def _part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _without_masked(detector: Detector, steps: Sequence[Step]) -> tuple[list[Step], list[int]]:
    """Removes the masked channels from the detector, in place, and from the steps; these, and which they were.

    A masked channel's feature is 0. Behind a norm it is another constant, which enters the projection or classifier:
    constants go through the steps until a layer takes what they add up to into itself.
    """
    mask = detector.channel_mask
    if not ((mask == 0) | (mask == 1)).all() or not mask.any():
        raise DistFairError(f"channel_mask: {int((mask == 1).sum())} of {len(mask)} entries are 1, "
                            f"{int((mask == 0).sum())} are 0: a detector needs ones, and no other numbers")  # fmt: skip
    kept = mask.nonzero()[:, 0]
    masked, narrow = others(kept, len(mask)), []
    constants: torch.Tensor | None = torch.zeros(len(masked), dtype=torch.float64)
    for step in steps:
        if constants is not None:
            step, constants = step.without(kept, constants)
        narrow.append(step)
    detector.prune(kept)
    if constants is not None:
        _narrow_classifier(detector, kept, masked, constants)
    return narrow, masked.tolist()


@torch.no_grad()
def _narrow_classifier(detector: Detector, kept: torch.Tensor, masked: torch.Tensor, constants: torch.Tensor) -> None:
    wide = detector.features_layer()
    detector.resize_classifier(len(kept))
    layer = detector.features_layer()
    layer.weight.copy_(wide.weight[:, kept])
    layer.bias.copy_(wide.bias.double() + wide.weight[:, masked].double() @ constants)


def write(folder: Path, detector: DeployedDetector, replace: bool = False) -> None:
    """Makes the folder with both files, or leaves all as it was: written aside, fsynced, renamed.

    replace: an exported detector may lie there, and goes. Raises DistFairError if anything else does.
    """
    refuse_occupied(folder, replace)
    model = save(detector.tensors())
    aside, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "replaced"))
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir(parents=True)
        for name, data in ((MODEL, model), (CONFIG, config_text(detector.description, model).encode())):
            with (aside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        fsync(aside)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(aside, folder)
        fsync(folder.parent)
    except OSError as error:
        if replaced.exists() and not folder.exists():
            os.replace(replaced, folder)
        raise DistFairError(f"{folder} could not be written: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def refuse_occupied(folder: Path, replace: bool) -> None:
    """Raises DistFairError if something lies at `folder`, unless it is an exported detector and may be replaced."""
    if not folder.exists():
        return
    if not _is_exported(folder):
        raise DistFairError(f"{folder} is there and no exported detector: choose another --out")
    if not replace:
        raise DistFairError(f"{folder} is there: choose another --out, or --replace it")


def _is_exported(folder: Path) -> bool:
    """Whether the folder holds both files of an export, in a format that is ours, and nothing else."""
    try:
        names = {path.name for path in folder.iterdir()}
        return names == {CONFIG, MODEL} and "format" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False
