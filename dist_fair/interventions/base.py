"""What makes a detector fair: one file per intervention, each overriding only the hooks it needs.

An objective is a function of the global batch. Each rank makes a *summary* of its own rows; one exchange turns all
summaries into the global one; the loss is a function of that, the same on every rank:

    summarise   local     rows of this rank                 -> {name: Sum(tensor) | Gather(rows)}
    exchange    wire      all Sums of the step in one all-reduce, all Gathers in one all-gather (`replicated` verbs)
    objective   global    {name: tensor}                    -> {term: scalar}, equal on all ranks

A Sum must be additive over samples: the summary of a union is the sum of the summaries. A Gather has one row per
sample and comes back in canonical order. Neither an intervention nor the engine ever multiplies by W: that factor
lives in the backward of the collectives (see dist_fair.collectives).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.demographics import Groups
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.errors import DistFairError, nearest
from dist_fair.interventions.at_inference import Step


@dataclass
class Sum:
    """A tensor of any shape, additive over samples."""

    tensor: torch.Tensor


@dataclass
class Gather:
    """One row per sample, (B,) or (B, k). Integers travel as floats: exact up to 2**24."""

    rows: torch.Tensor


Summary = dict[str, Sum | Gather]


@dataclass
class Settings:
    """Settings of an intervention: typed, with defaults, checked in __post_init__ of the subclass.

    A field with metadata={"inference": True} only matters in evaluation: `dist-fair evaluate` may change it.
    """


@dataclass
class Delayed(Settings):
    """Settings of an intervention that transforms or weighs: it does so in training from `delay` on.

    delay: part of the whole run, in [0, 1). Before it the run is as if the intervention were left out.
    """

    delay: float = 0.0

    def __post_init__(self):
        if not 0 <= self.delay < 1:
            raise DistFairError(f"delay={self.delay}: part of the run, at least 0 and below 1")


@dataclass
class Weighted(Settings):
    """Settings of an intervention with an objective: its terms enter the loss with this weight.

    delay, ramp: parts of the whole run, in [0, 1]. The weight is 0 before `delay`, then rises linearly over `ramp`.
    """

    weight: float = 1.0
    delay: float = 0.0
    ramp: float = 0.0

    def __post_init__(self):
        if self.weight < 0:
            raise DistFairError(f"weight={self.weight}: must not be negative")
        if not (0 <= self.delay <= 1 and 0 <= self.ramp <= 1):
            raise DistFairError(f"delay={self.delay}, ramp={self.ramp}: parts of the run, between 0 and 1")


@dataclass(frozen=True)
class Facts:
    """What is known before the first step.

    index: the training data, sample by sample. frequencies: (N,) fp64, how often each of its samples is drawn, as a
    part of all draws of the run (they sum to 1): the tapes may leave samples out or draw some more often than others.
    seed, steps: of the run. channels: C of the feature map. paired: whether each rank has as many reals as fakes.
    pixels: the lowest and the highest value that an image of the detector can have.
    """

    index: Index
    frequencies: np.ndarray
    seed: int
    steps: int
    channels: int
    paired: bool = False
    pixels: tuple[float, float] = (-1.0, 1.0)

    def groups(self, attributes: Sequence[str]) -> Groups:
        """The groups that attributes of the training data form."""
        return groups_of(attributes, self.index)

    def drawn(self, groups: Groups) -> np.ndarray:
        """How often each group is drawn, as a part of all draws, (G,) fp64."""
        codes = groups.codes({name: self.index.attributes[name].codes for name in groups.attributes})
        return np.bincount(codes + 1, self.frequencies, len(groups) + 1)[1:]


def groups_of(attributes: Sequence[str], index: Index) -> Groups:
    """The groups that attributes of some data form."""
    return Groups.of(attributes, {name: column.values for name, column in index.attributes.items()})


class ScoringData(Protocol):
    """Training samples without augmentation, for decisions about the structure of a detector."""

    def batches(self, size: int, count: int, *key: int | str) -> Iterable[Batch]:
        """`count` global batches of `size` samples drawn by `key`; yields this rank's rows, on its device."""
        ...


class Intervention(nn.Module):
    """Base of all interventions. A module, so that its parameters and buffers train, move and are saved.

    Hooks of a step (all but `restructure`) never wait for the device: they ask for no number that lies there, and for
    no shape that depends on one. What stays the same is a buffer, which is made once; persistent=False where whoever
    builds the recipe makes it again. So they can be compiled, and where they are not, each operation is a launch.

    width: the number of features that leave `transform`, given those that enter.
    terms: the names of the terms that `objective` gives, so that a log has a place for them while their weight is 0.
    measures: the names of further numbers that `objective` gives, which are logged and do not enter the loss.
    couples: whether it looks at samples together, so that a batch's loss is not the mean of those of its equal parts.
    reads: the extras of the detector's outputs that it needs. It always runs, if with weight 0: the parts of the
    detector that make them have no other loss, and DDP wants a gradient for every parameter.
    """

    terms: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[tuple[str, ...]] = ()
    couples: bool = True
    Settings: ClassVar[type[Settings]] = Settings
    settings: Settings

    @classmethod
    def needs(cls, settings: Settings, index: Index) -> dict[str, int]:
        """The extras of the detector that it reads: name -> number of classes of logits, 0 for what has none."""
        return {}

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__()
        self.settings, self.width = settings, features
        self.reads = tuple(self.needs(settings, facts.index))

    def begun(self, progress: float) -> bool:
        """Whether `transform` and `weigh` act at `progress`, the part of the run that is done, in [0, 1)."""
        return not isinstance(self.settings, Delayed) or progress >= self.settings.delay

    def acts(self, progress: float) -> bool:
        """Whether the step at `progress` would be another one without it; a scheduled restructuring left aside."""
        return self.weight(progress) > 0 if isinstance(self.settings, Weighted) else self.begun(progress)

    def weight(self, progress: float) -> float:
        """The weight of the terms at `progress`, the part of the run that is done, in [0, 1)."""
        if not isinstance(self.settings, Weighted):
            return 0.0
        passed = progress - self.settings.delay
        if passed < 0:
            return 0.0
        risen = 1.0 if self.settings.ramp == 0 else min(1.0, passed / self.settings.ramp)
        return self.settings.weight * risen

    def transform(self, features: torch.Tensor, batch: Batch, comm: Communicator) -> torch.Tensor:
        """Features (B, d) -> (B, width), between detector and classifier; in evaluation too."""
        return features

    @classmethod
    def at_inference(cls, settings: Settings, tensors: Mapping[str, torch.Tensor]) -> Step | None:
        """What `transform` does in evaluation, for a detector that is exported; None: it leaves features as they are.

        tensors: its own of a checkpoint, by name. Raises DistFairError where a deployed detector cannot do it.
        """
        if cls.transform is not Intervention.transform:
            raise DistFairError(f"interventions: {cls.__name__} transforms features, but has no at_inference that says "
                                "how without demographics: a detector trained with it cannot be exported")  # fmt: skip
        return None

    def weigh(self, batch: Batch) -> torch.Tensor | None:
        """Sample weights (B,) or None. The weights of all interventions are multiplied."""
        return None

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """This rank's summary. weights: (B,), the product of what `weigh` gave."""
        return {}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named scalars from the global summary, `terms` and `measures`; a term is multiplied by `weight` in the loss.

        An objective of parameters alone has no summary. It is the same on every rank, so the mean of the W equal
        gradients is its gradient: no factor there either.
        """
        return {}

    def restructures(self, step: int) -> bool:
        """Whether `restructure` is to be called before this step; the same answer on every rank."""
        return False

    def restructure(self, step: int, detector: Detector, data: ScoringData, comm: Communicator) -> dict[str, object]:
        """Changes the detector's structure, by its buffers; returns what to record. All weights are at hand."""
        raise NotImplementedError


_registry: dict[str, type[Intervention]] = {}


def register(name: str) -> Callable[[type[Intervention]], type[Intervention]]:
    """Makes an intervention known to recipes under `name`."""

    def add(kind: type[Intervention]) -> type[Intervention]:
        _registry[name] = kind
        return kind

    return add


def registered() -> dict[str, type[Intervention]]:
    """All interventions by name."""
    return dict(_registry)


def build(settings: Mapping[str, Settings], facts: Facts, features: int) -> tuple[nn.ModuleDict, int]:
    """The interventions of a recipe, in its order, and the number of features the classifier gets to see."""
    built = nn.ModuleDict()
    for name, chosen in settings.items():
        if name not in _registry:
            raise DistFairError(f"interventions.{name}: no such intervention: {nearest(name, [*_registry])}")
        built[name] = _registry[name](chosen, facts, features)
        features = built[name].width
    return built, features


def exchange(
    summaries: Mapping[str, Summary], comm: Communicator, sizes: Sequence[int]
) -> dict[str, dict[str, torch.Tensor]]:
    """Local summaries of all interventions -> global ones; one all-reduce, one all-gather for any recipe."""
    parts = [(owner, key, part) for owner, summary in summaries.items() for key, part in summary.items()]
    sums = [(owner, key, part.tensor) for owner, key, part in parts if isinstance(part, Sum)]
    gathers = [(owner, key, part.rows) for owner, key, part in parts if isinstance(part, Gather)]
    result: dict[str, dict[str, torch.Tensor]] = {owner: {} for owner in summaries}
    if sums:
        whole = comm.replicated_sum(_joined([tensor.reshape(-1) for *_, tensor in sums]), "summaries/sum")
        pieces = whole.split([tensor.numel() for *_, tensor in sums])
        for (owner, key, tensor), piece in zip(sums, pieces, strict=True):
            result[owner][key] = piece.view(tensor.shape)
    if gathers:
        columns = [rows.reshape(len(rows), rows.shape[1:].numel()) for *_, rows in gathers]
        whole = comm.replicated_gather(_joined(columns, dim=1), "summaries/gather", sizes)
        pieces = whole.split([column.shape[1] for column in columns], dim=1)
        for (owner, key, rows), piece in zip(gathers, pieces, strict=True):
            result[owner][key] = piece.reshape(len(whole), *rows.shape[1:])
    return result


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The tensors in one, in fp32 at least; in fp64 where any of them is."""
    wire = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    tensors = [tensor.to(wire) for tensor in tensors]
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
