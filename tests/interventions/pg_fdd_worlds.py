"""Batches, cases and a model to try PG-FDD's losses on, what runs on each rank, and bugs to plant there."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.data.index import Column
from dist_fair.demographics import Groups
from dist_fair.detectors.base import Outputs
from dist_fair.interventions import base, conditional_value_at_risk
from dist_fair.interventions.base import Facts, registered
from dist_fair.interventions.margin_loss import MarginLoss  # noqa: F401  (registers)
from tests.interventions import daid_worlds, worlds
from tests.interventions.cases import VOCABULARY, parts
from tests.interventions.cases import batch as plain_batch
from tests.interventions.exactness import averaged, calls, restored

SIZE = 17
KINDS = ("usual", "one class", "unknown", "ties", "close", "by group", "singles")
TRAINING = 60  # samples of the training data

CVAR, MARGIN = "conditional_value_at_risk", "margin_loss"
WITHOUT = {"attributes": [], "inner_alpha": None}
CASES = {
    "dag": (CVAR, WITHOUT),
    "dag, a third": (CVAR, {**WITHOUT, "alpha": 0.3}),
    "dag, less than a sample": (CVAR, {**WITHOUT, "alpha": 0.05}),
    "dag, all": (CVAR, {**WITHOUT, "alpha": 1.0}),
    "dag, smoothed": (CVAR, {**WITHOUT, "outer": "smoothed", "alpha": 0.3}),
    "daw": (CVAR, {}),
    "daw, a third": (CVAR, {"inner_alpha": 0.37, "alpha": 0.7}),
    "daw, less than a sample": (CVAR, {"inner_alpha": 0.05, "alpha": 0.05}),
    "daw, all": (CVAR, {"inner_alpha": 1.0, "alpha": 1.0}),
    "daw, one attribute": (CVAR, {"attributes": ["race"], "inner_alpha": 0.3}),
    "smoothed": (CVAR, {"outer": "smoothed"}),
    "smoothed, all": (CVAR, {"outer": "smoothed", "alpha": 1.0}),
    "guarded": (CVAR, {"outer": "guarded"}),
    "guarded, few": (CVAR, {"outer": "guarded", "alpha": 0.2}),
    "margin": (MARGIN, {}),
    "margin, one attribute": (MARGIN, {"attributes": ["race"], "scale": 3.0, "max_margin": 1.5}),
    "no margin": (MARGIN, {"scale": 1.0, "max_margin": 0.0}),
}
RISKS = [case for case, (name, _) in CASES.items() if name == CVAR]
MARGINS = [case for case, (name, _) in CASES.items() if name == MARGIN]


def index(vocabulary=VOCABULARY, size=TRAINING):
    """Training data with unknown values and with a group, male/Black, that has no sample."""
    random = np.random.default_rng(3)
    codes = {name: random.integers(-1, len(values), size) for name, values in vocabulary.items()}
    if vocabulary is VOCABULARY:
        codes["race"][(codes["gender"] == 1) & (codes["race"] == 1)] = 2
    columns = {name: Column(values, codes[name].astype(np.int32)) for name, values in vocabulary.items()}
    return SimpleNamespace(attributes=columns)


def frequencies(size=TRAINING):
    """Uneven, and not one for every sample."""
    drawn = np.random.default_rng(4).integers(0, 4, size)
    return drawn / drawn.sum()


def build(case, data=None, drawn=None):
    name, settings = CASES[case] if isinstance(case, str) else case
    kind, data = registered()[name], data or index()
    facts = Facts(data, frequencies() if drawn is None else drawn, seed=5, steps=100, channels=0)
    return kind(kind.Settings(**settings), facts, 4)


def batch(kind="usual", size=SIZE):
    """A global batch, features (size, 4) fp64 and weights (size,); see `cases.batch`.

    kind: also ties (losses are equal within a group and label), close (losses within 0.05), by group (sorted by group,
    so that no group needs to be on two ranks), singles (one sample per group).
    """
    made, features, weights = plain_batch(size, kind=kind)
    codes = Groups.of(["gender", "race"], VOCABULARY).codes(made.attributes)
    if kind == "ties":
        weights = torch.ones(size, dtype=torch.float64)
        features[:, 0], features[:, 1] = 1 + codes / 8, 0
    if kind == "close":
        features, weights = features / 100, torch.ones(size, dtype=torch.float64)
    if kind == "by group":
        order = codes.argsort(stable=True)
        made, features, weights = made.rows(order, (size,)), features[order], weights[order]
    if kind == "singles":
        first = torch.tensor([int(code) not in codes[:row].tolist() for row, code in enumerate(codes)])
        attributes = {name: torch.where(first, values, -1) for name, values in made.attributes.items()}
        made = replace(made, attributes=attributes)
    return made, features, weights


class Heads(nn.Module):
    """Features (B, 4) -> logits (B, 2) and demographic logits (B, 6 or 3), initialised the same everywhere.

    Only the first two features move the logits. Samples that agree in one, and have no other, have equal losses to the
    last bit on any number of ranks; the other features tell them apart in the gradient.
    """

    def __init__(self, groups):
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.scale = nn.Parameter(torch.rand(4, generator=random, dtype=torch.float64) + 1)
        self.classifier = nn.Parameter(torch.randn(4, 2, generator=random, dtype=torch.float64))
        self.demographics = nn.Parameter(torch.randn(4, groups, generator=random, dtype=torch.float64) / 4)
        self.classifier.data[2:] = 0

    def forward(self, images):
        features = images * self.scale
        extras = {"demographic_logits": features @ self.demographics}
        return Outputs(features @ self.classifier, features, features, extras)


def heads(case):
    _, settings = CASES[case]
    return Heads(3 if settings.get("attributes") == ["race"] else 6)


def step(comm, case, kind, sizes, bug=None):
    """Loss and measures, parameter gradients averaged over ranks as DDP does, and bytes on the wire, of one step."""
    whole, images, weights = batch(kind, sum(sizes))
    rows = parts(sizes)[comm.rank]
    model, intervention = heads(case), build(case)
    with restored((conditional_value_at_risk, "worst_parts")):
        scale = (BUGS[bug](comm, intervention) if bug else None) or 1.0
        summary = intervention.summarise(model(images[rows]), whole.rows(rows, tuple(sizes)), weights[rows])
        found = intervention.objective(base.exchange({"it": summary}, comm, sizes)["it"])
        (found[intervention.terms[0]] * scale).backward()
    return {name: value.item() for name, value in found.items()}, averaged(model.named_parameters(), comm), calls(comm)


# Bugs: each takes (comm, intervention), plants itself, and may return a factor for the loss. -------------------------


def local_sort(comm, intervention):
    """Each rank takes the worst part of its own rows; gradients are exact, and averaged."""
    gather = Communicator.replicated_gather

    def own(self, rows, name, sizes):
        whole, start = gather(self, rows, name, sizes), sum(sizes[: self.rank])
        return whole[start : start + len(rows)]

    Communicator.replicated_gather = own


def local_counts(comm, intervention):
    """Losses are global, the numbers of which the worst part is taken are this rank's."""
    gather, parts, seen = Communicator.replicated_gather, conditional_value_at_risk.worst_parts, {}

    def noted(self, rows, name, sizes):
        seen["rows"] = slice(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))
        seen["size"] = sum(sizes)
        return gather(self, rows, name, sizes)

    def wrong(values, members, k):
        if values.shape[1] != seen["size"]:  # the outer one, over groups
            return parts(values, members, k)
        here = members[:, seen["rows"]].sum(1, keepdim=True).clamp_min(1)
        return parts(values, members, k * here / members.sum(1, keepdim=True).clamp_min(1))

    Communicator.replicated_gather = noted
    conditional_value_at_risk.worst_parts = wrong


def local_number(comm, intervention):
    """The margin loss's sum is global, the number of samples that it is divided by is this rank's."""
    reduce = Communicator.replicated_sum
    Communicator.replicated_sum = lambda self, tensor, name: torch.cat([reduce(self, tensor, name)[:1], tensor[1:]])


def last_of_ties(comm, intervention):
    """Equal losses are taken in reverse order."""
    parts = conditional_value_at_risk.worst_parts

    def reversed_parts(values, members, k):
        means, weights = parts(values.flip(1), members.flip(1), k)
        return means, weights.flip(2)

    conditional_value_at_risk.worst_parts = reversed_parts


BUGS = {bug.__name__: bug for bug in (local_sort, local_counts, local_number, last_of_ties)}
BUGS |= {name: worlds.BUGS[name] for name in ("no_factor", "times_world", "detached", "local", "reversed_ranks")}
BUGS["other_order"] = daid_worlds.BUGS["other_order"]
