"""Batches, cases and a whole module to try DAID's alignment on, what runs on each rank, and bugs to plant there."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.data.index import Column
from dist_fair.data.window import Window
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.engine.module import TrainingModule
from dist_fair.interventions import pair_alignment, pairs
from dist_fair.interventions.base import Facts, registered
from dist_fair.interventions.low_rank_projection import LowRankProjection  # noqa: F401  (registers)
from tests.interventions import worlds
from tests.interventions.cases import VOCABULARY, parts
from tests.interventions.cases import batch as plain_batch
from tests.interventions.exactness import averaged, calls

SIZE = 17
MANIPULATIONS = ("Deepfakes", "FaceSwap", "NeuralTextures")
KINDS = ("usual", "one class", "unknown", "one group", "ties", "zero feature")

CASES = {
    "all": {},
    "one attribute": {"attributes": ["race"]},
    "opposite": {"pairs": "opposite:gender"},
    "opposite of two": {"pairs": "opposite:race", "attributes": ["race", "gender"], "epsilon": 0.25},
    "opposite of one": {"pairs": "opposite:gender", "attributes": ["gender"]},
    "manipulation": {"match": "manipulation"},
    "opposite and manipulation": {"match": "manipulation", "pairs": "opposite:gender"},
    "balanced": {"balanced": True},
    "balanced opposite": {"balanced": True, "pairs": "opposite:gender"},
    "balanced manipulation": {"balanced": True, "match": "manipulation"},
    "hardest": {"pairs": "hardest", "hardest": 1},
    "hardest of a manipulation": {"pairs": "hardest", "hardest": 2, "match": "manipulation"},
    "three hardest": {"pairs": "hardest", "hardest": 3, "attributes": ["gender"]},
    "more than there are": {"pairs": "hardest", "hardest": 50},
}


def build(settings, name="pair_alignment", features=4, manipulations=MANIPULATIONS, vocabulary=VOCABULARY):
    none = np.zeros(0, np.int32)
    columns = {key: Column(values, none) for key, values in vocabulary.items()}
    index = SimpleNamespace(attributes=columns, manipulations=Column(manipulations, none))
    kind = registered()[name]
    facts = Facts(index=index, frequencies=np.zeros(0), seed=5, steps=100, channels=0)
    return kind(kind.Settings(**settings), facts, features)


def batch(size=SIZE, kind="usual"):
    """A global batch with manipulations, fakes of unknown ones too, and features (size, 4) fp64; see `cases.batch`.

    kind: also one group (whoever is known), ties (four directions, orthogonal to each other), zero feature (two rows).
    """
    made, features, _ = plain_batch(size, kind=kind)
    fakes = made.labels == 1
    manipulations = torch.where(fakes, (fakes.cumsum(0) + 3) % 4 - 1, -1)  # of every fourth fake unknown
    made = replace(made, manipulations=manipulations)
    if kind == "one group":
        made = replace(made, attributes={name: codes.clamp_max(0) for name, codes in made.attributes.items()})
    if kind == "ties":
        features = torch.eye(4, dtype=torch.float64)[torch.arange(size) % 4] * features[:, :1].abs()
    if kind == "zero feature":
        features[1], features[7] = 0, 0
    return made, features


class Flat(Detector):
    """Images (B, 4) -> features (B, 6) by one matrix, an isometry, initialised the same everywhere."""

    def __init__(self, width):
        super().__init__(1, 6)
        random = torch.Generator().manual_seed(3)
        matrix = torch.linalg.qr(torch.randn(6, 4, generator=random, dtype=torch.float64)).Q.T
        self.matrix = nn.Parameter(matrix.contiguous())
        self.classifier = nn.Parameter(torch.randn(width, 2, generator=random, dtype=torch.float64))

    def extract(self, images, keys=None):
        return Outputs(images.new_zeros(len(images), 0), images @ self.matrix, images.new_zeros(0))

    def classify(self, features, keys=None):
        return features @ self.classifier


def module(comm, case, projection=()):
    """Detector, projection to 3 features (if any settings) and alignment, as the engine puts them together."""
    torch.manual_seed(11)
    chosen, width = {}, 6
    if projection:
        chosen["low_rank_projection"] = build(dict(projection), "low_rank_projection", features=6)
        width = chosen["low_rank_projection"].width
    chosen["pair_alignment"] = build(CASES[case], features=width)
    return TrainingModule(Flat(width), nn.ModuleDict(chosen), comm, "fp64")


def step(comm, case, kind, projection, sizes, bug=None):
    """Loss, parameter gradients averaged over ranks as DDP does, and bytes put on the wire, of one training step."""
    whole, features = batch(sum(sizes), kind)
    rows = parts(sizes)[comm.rank]
    model = module(comm, case, projection)
    scale = (BUGS[bug](comm, model) if bug else None) or 1.0
    loss = model(Window([replace(whole, images=features).rows(rows, tuple(sizes))]), 0.0).loss
    (loss * scale).backward()
    return loss.item(), averaged(model.named_parameters(), comm), calls(comm)


# Bugs: each takes (comm, model), plants itself, and may return a factor for the loss. --------------------------------


def local_counts(comm, model):
    """Sums of unit vectors are global, the numbers they are divided by are local."""
    reduce, groups = Communicator.replicated_sum, model.interventions["pair_alignment"].shape

    def half(self, tensor, name):
        whole = reduce(self, tensor, name)
        kept, global_ = tensor.view(*groups, -1), whole.view(*groups, -1)
        return torch.cat([global_[..., :-1], kept[..., -1:]], dim=-1).view(-1)

    Communicator.replicated_sum = half


def other_order(comm, model):
    """A gather with exact gradients whose rows are in an order of its own: the last rank's first."""
    gather = Communicator.replicated_gather

    def backwards(self, rows, name, sizes):
        return torch.cat(gather(self, rows, name, sizes).split(list(sizes))[::-1])

    Communicator.replicated_gather = backwards


def one_end(comm, model):
    """Partners are constants: the column half of the gradient is lost."""
    mean = pairs.mean_of_chosen

    def half(units, partners, there):
        together = sum(units.detach()[partners[:, one]] * there[:, one, None] for one in range(partners.shape[1]))
        return (units * together).sum() / there.sum(), mean(units, partners, there)[1]

    pair_alignment.mean_of_chosen = half


def unordered_ties(comm, model):
    """Partners by the cosines as the machine rounds them, in top-k's own order among equals."""

    def partners(units, contrast, match, k):
        cosines = (units @ units.T).detach()
        paired = (match[:, None] == match) & (contrast[:, None] != contrast)
        found = cosines.masked_fill(~paired, torch.inf).flip(1).topk(min(k, len(units)), largest=False)
        return len(units) - 1 - found.indices, found.values < torch.inf

    pair_alignment.hardest_partners = partners


BUGS = {bug.__name__: bug for bug in (local_counts, other_order, one_end, unordered_ties)}
BUGS |= {name: worlds.BUGS[name] for name in ("no_factor", "times_world", "detached", "local", "reversed_ranks")}
