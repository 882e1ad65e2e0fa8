"""The typed schema of a recipe: every key, its default, its range, its meaning. `composition` reads the files, `checks`
refuses what contradicts itself.

Lengths of time inside a run (warm-up, delays, ramps, stages) are parts of the run in [0, 1], so that a recipe keeps its
shape when `train.steps` changes.
"""
# ruff: noqa: RUF009  (setting, part and section return dataclass fields, they are not shared defaults)

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dist_fair.errors import DistFairError


def setting(
    default: Any, meaning: str, *, choices: tuple = (), least: float = -math.inf, most: float = math.inf
) -> Any:
    """A dataclass field with its meaning and the values it may take; `least` and `most` belong to the range."""
    metadata = {"meaning": meaning, "choices": choices, "least": least, "most": most}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def part(default: float, meaning: str) -> Any:
    """A part, probability or relative amount: a number in [0, 1]."""
    return setting(default, meaning, least=0, most=1)


def section(kind: type) -> Any:
    """A nested group of settings."""
    return dataclasses.field(default_factory=kind)


@dataclass
class Tape:
    """A stream of training samples. Every batch takes `share` parts of it."""

    label: int | None = setting(None, "0: real samples, 1: fake ones, null: both", choices=(None, 0, 1))
    share: int = setting(1, "parts of each batch", least=1)
    where: dict[str, str] = setting({}, "only samples with these attribute values")


@dataclass
class Augmentation:
    """Random changes of training images, keyed by seed, epoch and sample."""

    flip: float = part(0.5, "probability of mirroring left and right")
    shift: float = part(0.0, "largest shift, as part of the width")
    brightness: float = part(0.0, "largest relative change")
    contrast: float = part(0.0, "largest relative change")
    noise: float = part(0.0, "largest standard deviation of pixel noise, images in 0..1")
    blur: float = part(0.0, "probability of a Gaussian blur")
    jpeg: float = part(0.0, "probability of JPEG compression")
    jpeg_quality: list[int] = setting([50, 95], "lowest and highest quality", least=1, most=100)


@dataclass
class Data:
    """What is learned from and what is tested on: usually a card of shards/."""

    name: str = setting("", "name of the data set")
    root: str = setting("", "folder that holds the shard folders")
    train: list[str] = setting([], "shard folders to train on, under root or absolute")
    eval: list[str] = setting([], "shard folders to evaluate on, under root or absolute")
    attributes: dict[str, list[str]] = setting({}, "attribute -> its values; [] means all that are found")
    image_size: int = setting(64, "side of the square input, pixels", least=8)
    mean: list[float] = setting([0.5, 0.5, 0.5], "subtracted from RGB in 0..1")
    std: list[float] = setting([0.5, 0.5, 0.5], "divides RGB after that", least=1e-6)
    lanes: int | None = setting(None, "lanes of the tape, a multiple of the ranks; null: from the micro-batch", least=1)
    window: int = setting(1024, "samples that are shuffled together", least=1)
    workers: int = setting(0, "loading processes per rank", least=0)
    stage_to: str | None = setting(None, "each node first copies its shards to this local folder; $TMPDIR is expanded")
    tapes: dict[str, Tape] = setting({}, "streams that make up a batch; {}: one of everything")
    bad_samples: str = setting("fail", "what an unreadable image does", choices=("fail", "substitute"))
    max_pixels: int = setting(50_000_000, "larger images are bad samples", least=1)
    augment: Augmentation = section(Augmentation)


@dataclass
class DetectorSettings:
    """What is trained: usually a card of recipes/detector/."""

    name: str = setting("", "one of dist_fair's detectors or any timm model")
    pretrained: bool | str = setting(False, "true or a timm tag downloads weights; a path reads them")
    norm: str = setting("synced", "statistics of batch norm", choices=("synced", "local", "frozen"))
    init_from: str | None = setting(
        None, "start from this run, checkpoint or file; not its classifier if the width differs"
    )
    arguments: dict[str, Any] = setting({}, "further arguments of the model")


@dataclass
class Train:
    """How long and how large."""

    steps: int | None = setting(None, "optimizer steps; this or epochs", least=1)
    epochs: float | None = setting(None, "passes over the data; this or steps", least=1e-9)
    stop_after: int | None = setting(None, "stop this invocation, checkpointed, after so many steps", least=1)
    batch_size: int = setting(32, "samples per step over all ranks", least=1)
    accumulate: int = setting(1, "a step is made of so many smaller batches", least=1)
    accumulate_exact: bool = setting(False, "objectives see the smaller batches as one; the detector mostly runs twice")
    precision: str = setting("fp32", "bf16: of the detector alone; fp64: for proofs", choices=("fp32", "bf16", "fp64"))
    tf32: bool = setting(False, "fp32 on a GPU rounds what it multiplies to 10 bits of mantissa: faster, not exact")
    deterministic: bool = setting(False, "the same command gives the same bytes; refuses what cannot, costs some pace")
    compile: str = setting(
        "none",
        "torch.compile: of the objectives, or of all, the detector too; takes a minute or more to start",
        choices=("none", "objectives", "all"),
    )
    backend: str = setting(
        "ddp",
        "who holds what: fsdp and zero3 share out the weights too",
        choices=("ddp", "fsdp", "zero1", "zero2", "zero3"),
    )
    offload: bool = setting(False, "fsdp, zero1-3: what is shared out stays in the memory of the CPU")
    checkpoint_activations: bool = setting(False, "the backbone keeps few activations and computes the others again")
    ranks: int | None = setting(None, "stop unless launched with so many ranks", least=1)
    clip: float | None = setting(None, "largest global gradient norm", least=1e-12)


@dataclass
class Sam:
    """Sharpness-aware minimisation: each step takes the gradient at the worst point near the weights."""

    rho: float | None = setting(None, "distance to that point, 0.05 in the paper; null: off", least=1e-12)
    adaptive: bool = setting(False, "ASAM: distances are relative to the size of each weight")
    scope: int | str = setting("global", "whose worst point: global, the step's; m: of each m samples", least=1)


@dataclass
class Optimizer:
    """An optimizer of torch or timm."""

    name: str = setting("sgd", "sgd, adamw or any other of timm's")
    lr: float = setting(0.01, "learning rate, for any number of ranks", least=0)
    weight_decay: float = setting(0.0, "L2 penalty or decoupled decay, as the optimizer has it", least=0)
    momentum: float | None = setting(None, "null: the optimizer's default", least=0, most=1)
    arguments: dict[str, Any] = setting({}, "further arguments of the optimizer")
    sam: Sam = section(Sam)


@dataclass
class Schedule:
    """The learning rate over the run."""

    name: str = setting("constant", "shape", choices=("constant", "cosine", "step"))
    warmup: float = part(0.0, "part of the run with a linear rise from 0")
    floor: float = part(0.0, "cosine: the last learning rate, as part of lr")
    every: float = part(0.3, "step: multiply after each such part of the run")
    factor: float = part(0.1, "step: by this")


@dataclass
class Checkpoint:
    """When the state is written."""

    every: int = setting(500, "steps between checkpoints; the last step always has one", least=1)
    keep: int = setting(2, "newest checkpoints to keep", least=1)
    best: str | None = setting(None, "keep the best one too, by a number of metrics.jsonl: min:loss, max:NAME")

    def criterion(self) -> tuple[str, str] | None:
        """`best` as (min or max, name); None where only the newest are kept. Raises DistFairError."""
        if self.best is None:
            return None
        order, _, name = self.best.partition(":")
        if order not in ("min", "max") or not name:
            raise DistFairError(f"checkpoint.best={self.best}: min:NAME or max:NAME of a number in metrics.jsonl, such "
                                "as min:loss; or null")  # fmt: skip
        return order, name


@dataclass
class Evaluation:
    """Scores and fairness on data.eval."""

    at_end: bool = setting(True, "evaluate when training ends")
    batch_size: int = setting(64, "samples per forward pass over all ranks", least=1)
    bootstrap: int = setting(200, "resamples of videos behind each interval; 0: no intervals", least=0)
    figures: bool = setting(True, "draw radar, scores and ROC of each set: about a second a set")


@dataclass
class Wandb:
    """Weights & Biases: the same numbers as metrics.jsonl."""

    mode: str = setting("auto", "auto: offline without a key", choices=("auto", "online", "offline", "disabled"))
    project: str = setting("dist_fair", "W&B project")
    name: str | None = setting(None, "W&B run name; null: the name of the run folder")
    tags: list[str] = setting([], "W&B tags")


@dataclass
class Log:
    """The console."""

    every: int = setting(10, "steps between lines", least=1)


@dataclass
class Recipe:
    """The whole experiment. interventions: name -> its typed settings, in the order in which they act."""

    recipe: str = setting("", "name of the recipe, or path of a YAML file")
    seed: int = setting(0, "of everything random", least=0, most=2**63 - 1)
    out: str = setting("runs/${recipe}", "run folder")
    data: Data = section(Data)
    detector: DetectorSettings = section(DetectorSettings)
    interventions: dict[str, Any] = setting({}, "what makes it fair: name -> settings; null leaves one out")
    train: Train = section(Train)
    optimizer: Optimizer = section(Optimizer)
    schedule: Schedule = section(Schedule)
    checkpoint: Checkpoint = section(Checkpoint)
    resume: str = setting("auto", "auto: go on if the run folder has a checkpoint; never; or a checkpoint's path")
    evaluation: Evaluation = section(Evaluation)
    wandb: Wandb = section(Wandb)
    log: Log = section(Log)


# Settings that leave the trajectory as it is: with other values it still is the same experiment, and may be resumed.
# data.name stays in: with data.root left out, it is what tells one data set from another.
FREE = ("recipe", "out", "resume", "data.root", "data.eval", "data.workers", "data.stage_to", "train.stop_after",
        "train.ranks", "train.backend", "train.offload", "train.checkpoint_activations", "train.tf32",
        "train.deterministic", "train.compile", "checkpoint", "evaluation", "wandb", "log")  # fmt: skip


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, value, field) of every setting below a dataclass instance."""
    for field in dataclasses.fields(settings):
        key, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{key}.")
            continue
        yield key, value, field
        if isinstance(value, dict):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from walk(item, f"{key}.{name}.")
