"""Batches, cases and a model to try PG-FDD's forgery losses on, what runs on each rank, and bugs to plant there."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dist_fair import keyed
from dist_fair.collectives import Communicator
from dist_fair.data.index import Column
from dist_fair.detectors.base import Outputs
from dist_fair.interventions import base, contrastive_loss, reconstruction_loss
from dist_fair.interventions.base import Facts, registered
from dist_fair.keyed_rows import dropout, mixed, uniform
from tests.interventions import daid_worlds, reference_forgery, worlds
from tests.interventions.cases import batch as plain_batch
from tests.interventions.cases import parts
from tests.interventions.daid_worlds import MANIPULATIONS, SIZE
from tests.interventions.exactness import averaged, calls, restored

SHARED, SPECIFIC = "shared_forgery", "specific_forgery"
CONTRASTIVE, RECONSTRUCTION = "contrastive_loss", "reconstruction_loss"
# Distances are about 3: some triplets are beyond a margin of 1.
CASES = {
    "shared": (SHARED, {}),
    "specific": (SPECIFIC, {}),
    "contrastive": (CONTRASTIVE, {"margin": 1.0}),
    "the paper's margin": (CONTRASTIVE, {}),
    "without specific": (CONTRASTIVE, {"margin": 1.0, "specific": False}),
    "self pairs": (CONTRASTIVE, {"margin": 1.0, "self_pairs": True}),
    "local": (CONTRASTIVE, {"margin": 1.0, "scope": "local"}),
    "released": (CONTRASTIVE, {"scope": "local", "self_pairs": True}),
    "reconstruction": (RECONSTRUCTION, {}),
}
HEADS = ["shared", "specific"]
TRIPLETS = [case for case, (name, _) in CASES.items() if name == CONTRASTIVE]
LOCAL = [case for case in TRIPLETS if CASES[case][1].get("scope") == "local"]
GLOBAL = [case for case in TRIPLETS if case not in LOCAL]

# usual: fakes of three manipulations and of unknown ones. lone: one real, and of each manipulation one fake. repeated:
# some samples are there twice.
KINDS = ("usual", "no fakes", "no reals", "lone", "unknown", "repeated")
LANE = 4  # rows of a lane of the paired batches: real, real, fake, fake


def index(manipulations=MANIPULATIONS, unknown=True, size=20):
    """Training data, every other sample a fake, each fourth fake of unknown manipulation (if any)."""
    codes = np.full(size, -1, np.int32)
    if manipulations:
        codes[1::2] = np.arange(size // 2) % len(manipulations)
        codes[1::8] = -1 if unknown else 0
    labels = np.arange(size, dtype=np.int8) % 2
    return SimpleNamespace(attributes={}, labels=labels, manipulations=Column(manipulations, codes))


def build(case, data=None, paired=True, drawn=None, pixels=(-1.0, 1.0)):
    name, settings = CASES[case] if isinstance(case, str) else case
    kind, data = registered()[name], data or index()
    drawn = np.full(20, 1 / 20) if drawn is None else drawn
    facts = Facts(data, drawn, seed=5, steps=100, channels=0, paired=paired, pixels=pixels)
    return kind(kind.Settings(**settings), facts, 4)


def batch(kind="usual", size=SIZE):
    """A global batch, images (size, 3, 6, 6), with keys, and features (size, 4) fp64. kind: of KINDS, or paired."""
    made, features, _ = plain_batch(size, kind="one class" if kind == "no fakes" else "usual")
    labels = {"no reals": torch.ones_like(made.labels), "lone": (torch.arange(size) != 4).long(),
              "paired": torch.arange(size) // 2 % 2}.get(kind, made.labels)  # fmt: skip
    fakes = labels == 1
    manipulations = torch.where(fakes, (fakes.cumsum(0) + 3) % 4 - 1, -1)  # of every fourth fake unknown
    if kind == "lone":
        manipulations = torch.where(fakes & (fakes.cumsum(0) <= 3), fakes.cumsum(0) - 1, -1)
    if kind == "unknown":
        manipulations = torch.full_like(labels, -1)
    made = replace(made, labels=labels, manipulations=manipulations, images=made.images.clamp(-1, 1))
    samples = torch.arange(size)
    if kind == "repeated":
        samples = samples.where(samples % 3 > 0, samples // 2)
        made, features = made.rows(samples, (size,)), features + 0.3 * features.flip(0)
    return replace(made, samples=samples, keys=mixed(samples, 77)), features


class Forgery(nn.Module):
    """Features (B, 4) -> all extras that the forgery losses read, and a decoder; initialised the same everywhere."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(1)

        def matrix(*shape):
            return nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))

        self.shared_logits, self.specific_logits = matrix(4, 2), matrix(4, 1 + len(MANIPULATIONS))
        self.shared, self.specific = matrix(4, 5), matrix(4, 3)
        self.code, self.condition = matrix(4, 2 * 9), matrix(4, 2 * 9)
        self.mix = matrix(3, 4)

    def forward(self, images):
        extras = {name: images @ getattr(self, name) for name in ("shared_logits", "specific_logits", *SPACES)}
        for name in ("code", "condition"):
            extras[name] = (images @ getattr(self, name)).view(-1, 2, 3, 3)
        return Outputs(images[:, :2], images, images, extras, self.decode)

    def decode(self, code, condition, keys):
        """(B, 2, 3, 3) both -> (B, 3, 6, 6), with dropout."""
        maps = dropout(torch.cat([code, code * condition], dim=1), 0.3, mixed(keys, 9))
        return functional.interpolate(torch.einsum("oc,bchw->bohw", self.mix, maps), scale_factor=2).tanh()


SPACES = ("shared", "specific")


def draws(keys):
    """Space -> the two random numbers of each sample, (B, 2)."""
    return {space: uniform(mixed(keys, keyed.integer("contrastive_loss", space)), 2) for space in SPACES}


def naive(case, whole, outputs, sizes=None):
    """The reference's numbers; the first is the loss. sizes: rows of each rank, for what is local."""
    name, settings = CASES[case]
    if name == SHARED:
        return [reference_forgery.shared_forgery(outputs.extras["shared_logits"], whole)]
    if name == SPECIFIC:
        return [reference_forgery.specific_forgery(outputs.extras["specific_logits"], whole)]
    if name == RECONSTRUCTION:
        return reference_forgery.reconstruction(outputs, whole, mixed)
    settings = {"margin": 3.0, **settings}
    rows = parts(sizes) if settings.pop("scope", "global") == "local" else [slice(None)]
    spaces = SPACES if settings.pop("specific", True) else SPACES[:1]
    numbers = draws(whole.keys)
    return [sum(reference_forgery.contrastive(space, outputs.extras[space], numbers[space], whole, rows, **settings)
                for space in spaces)]  # fmt: skip


def step(comm, case, kind, sizes, bug=None):
    """Terms and measures, parameter gradients averaged over ranks as DDP does, and bytes on the wire, of one step."""
    whole, images = batch(kind, sum(sizes))
    rows = parts(sizes)[comm.rank]
    model, loss = Forgery(), build(case)
    with restored(*PATCHED):
        scale = (BUGS[bug](comm, loss) if bug else None) or 1.0
        weights = torch.ones(len(images[rows]))
        summary = loss.summarise(model(images[rows]), whole.rows(rows, tuple(sizes)), weights)
        found = loss.objective(base.exchange({"it": summary}, comm, sizes)["it"])
        (found[loss.terms[0]] * scale).backward()
    return {name: one.item() for name, one in found.items()}, averaged(model.named_parameters(), comm), calls(comm)


# Bugs: each takes (comm, loss), plants itself, and may return a factor for the loss. ---------------------------------

PATCHED = [(contrastive_loss, "uniform"), (contrastive_loss, "triplets"), (contrastive_loss, "forgery_labels")]
PATCHED += [(functional, "pairwise_distance")]
PATCHED += [(reconstruction_loss, "partners"), (reconstruction_loss, "mixed")]


def over_world(comm, loss):
    """Gradients averaged twice."""
    return 1 / comm.world


def local_number(comm, loss):
    """Sums of losses are global, the numbers that they are divided by are this rank's."""
    reduce = Communicator.replicated_sum

    def half(self, tensor, name):
        whole = reduce(self, tensor, name)
        last = torch.arange(len(tensor)) % (3 if len(tensor) == 6 else 2) == (2 if len(tensor) == 6 else 1)
        return torch.where(last, tensor, whole)

    Communicator.replicated_sum = half


def rank_draws(comm, loss):
    """Draws from a generator of each rank's own."""
    random = torch.Generator().manual_seed(comm.rank)
    contrastive_loss.uniform = lambda keys, count: torch.rand(len(keys), count, generator=random)


def place_draws(comm, loss):
    """Draws by the place in the rank's part of the batch."""
    contrastive_loss.uniform = lambda keys, count: uniform(torch.arange(len(keys)), count)


def local_triplets(comm, loss):
    """Triplets of this rank's rows alone, in the gathered batch."""
    gather = Communicator.replicated_gather

    def own(self, rows, name, sizes):
        whole, start = gather(self, rows, name, sizes), sum(sizes[: self.rank])
        return whole[start : start + len(rows)]

    Communicator.replicated_gather = own


def one_end(comm, loss):
    """Positives and negatives are constants: only anchors get a gradient."""
    distance = functional.pairwise_distance
    functional.pairwise_distance = lambda anchors, others: distance(anchors, others.detach())


def with_self(comm, loss):
    """A sample may be its own positive, as in the released code."""
    found = contrastive_loss.triplets
    contrastive_loss.triplets = lambda *arguments: found(*arguments[:-1], True)


def unknown_is_a_class(comm, loss):
    """Fakes of unknown manipulation are each other's positives."""
    labels = contrastive_loss.forgery_labels
    contrastive_loss.forgery_labels = lambda batch: labels(batch) % (1 + len(MANIPULATIONS))


def forgery_decides(comm, loss):
    """The target of a crossed image is the one whose forgery it has."""
    summarise = loss.summarise

    def crossed(outputs, batch, weights):
        others, decode = reconstruction_loss.partners(batch.labels), outputs.decode
        plain = outputs.extras["code"]
        outputs.decode = lambda code, condition, keys: (
            decode(code, condition, keys) if torch.equal(code, plain) else decode(plain, condition[others], keys)
        )
        return summarise(outputs, batch, weights)

    loss.summarise = crossed


def next_partner(comm, loss):
    """The n-th real and the fake after the n-th."""
    right = reconstruction_loss.partners

    def wrong(labels):
        fakes = (labels == 1).nonzero()[:, 0]
        shifted = torch.arange(len(labels)).index_copy(0, fakes, fakes.roll(1))
        return shifted[right(labels)]

    reconstruction_loss.partners = wrong


def rows_that_mirror(comm, loss):
    """The first row and the last: by the place in the rank's part."""
    reconstruction_loss.partners = lambda labels: torch.arange(len(labels)).flip(0)


def same_dropout(comm, loss):
    """The same elements dropped whosever forgery it is."""
    reconstruction_loss.mixed = lambda keys, others: mixed(keys, keys.expand_as(others))


BUGS = {
    bug.__name__: bug
    for bug in (
        over_world, local_number, rank_draws, place_draws, local_triplets, one_end, with_self, unknown_is_a_class,
        forgery_decides, next_partner, rows_that_mirror, same_dropout,
    )
}  # fmt: skip
BUGS |= {name: worlds.BUGS[name] for name in ("no_factor", "times_world", "detached", "local", "reversed_ranks")}
BUGS["other_order"] = daid_worlds.BUGS["other_order"]
