"""From a recipe to the parts of a run: data, detector, interventions. What can be refused is refused here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dist_fair import keyed
from dist_fair.collectives import Communicator
from dist_fair.data.index import INDEX_NAME, Index, read_index
from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.data.window import paired
from dist_fair.demographics import Groups
from dist_fair.detectors import build_detector
from dist_fair.engine import checkpoint
from dist_fair.engine.accumulation import refuse_batch_statistics
from dist_fair.engine.activations import checkpoint_activations
from dist_fair.engine.device.layout import memory_format
from dist_fair.engine.module import TrainingModule
from dist_fair.errors import DistFairError, nearest
from dist_fair.interventions.base import Facts, Settings, build, registered
from dist_fair.recipe.schema import Data, DetectorSettings, Recipe


def dataset_folder(data: Data, entry: str) -> Path:
    """The folder meant by an entry of data.train or data.eval: absolute, or under data.root."""
    return Path(entry) if Path(entry).is_absolute() else Path(data.root) / entry


def dataset_names(entries: Sequence[str]) -> dict[str, str]:
    """Entry -> the name under which its results are filed: 'celebdf/test' becomes 'celebdf-test'."""
    names = {entry: "-".join(part for part in Path(entry).parts if part != "/") for entry in entries}
    if len(set(names.values())) < len(entries):
        raise DistFairError(f"data.eval={list(entries)}: two entries with one name: each data set once")
    return names


def prepare_demo(data: Data, comm: Communicator) -> None:
    """Draws the demo faces if they are what is asked for and are not there: rank 0 draws, the others wait."""
    folders = [dataset_folder(data, entry) for entry in (*data.train, *data.eval)]
    if data.name == "demo" and not all((folder / INDEX_NAME).is_file() for folder in folders):
        if comm.rank == 0:
            from dist_fair.data import demo

            demo.make(Path(data.root))
        comm.barrier("demo faces")


def training_index(recipe: Recipe) -> Index:
    """All training samples with the declared attributes.

    Raises DistFairError if a declared value, or a group that an intervention of the recipe looks at, is absent.
    """
    data = recipe.data
    index = Index.concatenate([read_index(dataset_folder(data, entry)) for entry in data.train])
    index = index.with_values(data.attributes)
    for attribute in data.attributes:
        _check_groups(index, [attribute], "data.attributes")
    for name, settings in recipe.interventions.items():
        if attributes := getattr(settings, "attributes", None):
            _check_groups(index, attributes, f"interventions.{name}.attributes")
    return index


def _check_groups(index: Index, attributes: Sequence[str], key: str) -> None:
    declared = [*index.attributes]
    if unknown := [name for name in attributes if name not in declared]:
        raise DistFairError(f"{key}={list(attributes)}: data.attributes has no '{unknown[0]}': "
                            f"{nearest(unknown[0], declared)} (+data.attributes.{unknown[0]}=[] adds it)")  # fmt: skip
    groups = Groups.of(attributes, vocabulary(index))
    counts = np.bincount(groups.codes(codes_of(index)) + 1, minlength=len(groups) + 1)[1:]
    if absent := [name for name, count in zip(groups.names, counts, strict=True) if count == 0]:
        raise DistFairError(
            f"{key}={list(attributes)}: no training sample of group {', '.join(absent)} in {', '.join(index.folders)}; "
            "leave the value out of data.attributes, choose other attributes, or add data"
        )


def evaluation_indexes(data: Data, training: Mapping[str, Sequence[str]]) -> dict[str, Index]:
    """Name -> samples of each evaluation set, attributes in the values of the training data."""
    return {
        name: read_index(dataset_folder(data, entry)).with_values(training)
        for entry, name in dataset_names(data.eval).items()
    }


def vocabulary(index: Index) -> dict[str, tuple[str, ...]]:
    """Attribute -> its values, in code order."""
    return {name: column.values for name, column in index.attributes.items()}


def codes_of(index: Index) -> dict[str, np.ndarray]:
    """Attribute -> codes (N,)."""
    return {name: column.codes for name, column in index.attributes.items()}


def training_plan(recipe: Recipe, index: Index) -> TrainingPlan:
    """The plan of micro-batches; `train.accumulate` of them make a step."""
    tapes = [TapeSpec(name, tape.label, tape.share, tape.where) for name, tape in recipe.data.tapes.items()]
    return TrainingPlan(
        index,
        tapes or [TapeSpec("all", None)],
        batch_size=recipe.train.batch_size // recipe.train.accumulate,
        lanes=recipe.data.lanes,
        window=recipe.data.window,
        seed=recipe.seed,
    )


def total_steps(recipe: Recipe, plan: TrainingPlan) -> int:
    """Optimizer steps of the whole run: train.steps, or train.epochs in steps, rounded up; whatever accumulate is."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return math.ceil(recipe.train.epochs * math.ceil(plan.steps_per_epoch / recipe.train.accumulate))


@dataclass(frozen=True)
class Parts:
    """What a run trains, and on what."""

    index: Index
    plan: TrainingPlan
    steps: int
    module: TrainingModule


def assemble(recipe: Recipe, comm: Communicator) -> Parts:
    """Index, plan, detector and interventions; the same initial weights on every rank."""
    index = training_index(recipe)
    plan = training_plan(recipe, index)
    plan.part(0, comm.rank, comm.world)
    steps = total_steps(recipe, plan)
    return Parts(index, plan, steps, build_module(recipe, plan, steps, comm))


def build_module(recipe: Recipe, plan: TrainingPlan, steps: int, comm: Communicator) -> TrainingModule:
    """Detector and interventions of a recipe, initialised from the seed."""
    torch.manual_seed(keyed.integer(recipe.seed, "detector"))
    chosen = recipe.detector
    needs = extras_needed(recipe, plan.index)
    detector = build_detector(chosen.name, chosen.pretrained, chosen.norm, chosen.arguments, comm, needs)
    for extra in needs:
        if extra not in detector.offers:
            raise DistFairError(f"an intervention reads '{extra}', which detector.name={chosen.name} does not give "
                                f"({', '.join(detector.offers) or 'it gives none'}): detector.name=pg_fdd does; or "
                                "leave the intervention out")  # fmt: skip
    refuse_batch_statistics(recipe, detector)
    checkpoint_activations(recipe, detector)
    torch.manual_seed(keyed.integer(recipe.seed, "interventions"))
    facts = Facts(plan.index, plan.frequencies, recipe.seed, steps, detector.channels, paired(plan),
                  pixel_range(recipe.data))  # fmt: skip
    settings: dict[str, Settings] = recipe.interventions
    interventions, width = build(settings, facts, detector.features)
    if not any(part.terms for part in interventions.values()):
        raise DistFairError("interventions: none of them has an objective, nothing would be learned: "
                            "add cross_entropy, +interventions.cross_entropy={}")  # fmt: skip
    if width != detector.features:
        detector.resize_classifier(width)
    module = TrainingModule(detector, interventions, comm, recipe.train.precision)
    if chosen.init_from:
        load_detector(module, chosen)
    return module


def on_device(module: TrainingModule, device: torch.device, recipe: Recipe) -> TrainingModule:
    """The module on its device, its images, and its weights where ranks hold whole ones, in the best memory format.

    Sharding backends cut weights as they come, and want them contiguous.
    """
    if device.type != "cuda":
        return module.to(device)
    module.layout = memory_format(module.detector, recipe.data.image_size, device)
    return module.to(device, memory_format=module.layout) if recipe.train.backend == "ddp" else module.to(device)


def pixel_range(data: Data) -> tuple[float, float]:
    """What black and white become under data.mean and data.std, the lowest and the highest over colours."""
    ends = [(end - mean) / std for mean, std in zip(data.mean, data.std, strict=True) for end in (0.0, 1.0)]
    return min(ends), max(ends)


def extras_needed(recipe: Recipe, index: Index) -> dict[str, int]:
    """What the interventions of a recipe need of the detector's extras; see `Intervention.needs`."""
    needs: dict[str, int] = {}
    for name, settings in recipe.interventions.items():
        for extra, classes in registered()[name].needs(settings, index).items():
            if needs.setdefault(extra, classes) != classes:
                raise DistFairError(f"interventions.{name} wants {classes} classes of '{extra}', another one "
                                    f"{needs[extra]}: give both the same attributes")  # fmt: skip
    return needs


def load_detector(module: TrainingModule, settings: DetectorSettings) -> None:
    """Starts from the detector (not the interventions) of another run, checkpoint or safetensors file.

    A classifier that saw another number of features (a projection came, went or changed) is not taken: it starts anew.
    """
    source = Path(settings.init_from)
    tensors = checkpoint.open_part(source)
    found = {name.removeprefix("detector."): value for name, value in tensors.items() if name.startswith("detector.")}
    found, own = found or tensors, module.detector.state_dict()
    head = [name for name in own if name.startswith("classifier.")]
    if any(name in found and found[name].shape != own[name].shape for name in head):
        found = found | {name: own[name] for name in head}
    checkpoint.load_model(module.detector, found, source)
