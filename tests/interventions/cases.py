"""Small global batches with everything awkward in them, and the interventions to try on them."""

from types import SimpleNamespace

import numpy as np
import torch

import dist_fair.interventions  # noqa: F401  (registers)
from dist_fair.data.batch import Batch
from dist_fair.data.index import Column
from dist_fair.interventions.base import Facts, Gather, Sum, registered
from tests.interventions import reference

VOCABULARY = {"gender": ("female", "male"), "race": ("Asian", "Black", "White")}
# Far above the paper's epsilon: the reference's plain Sinkhorn must get there. test_transport.py has the paper's.
ALIGNMENT = {"attributes": ["gender", "race"], "epsilon": 0.3, "grid": 16, "bandwidth": 0.1}
SAMPLES = {**ALIGNMENT, "support": "samples"}

CASES = {
    "mean": ("cross_entropy", {}),
    "balanced": ("cross_entropy", {"reduction": "class_balanced"}),
    "grid": ("distribution_alignment", ALIGNMENT),
    "one attribute": ("distribution_alignment", {**ALIGNMENT, "attributes": ["race"]}),
    "averaged over groups": ("distribution_alignment", {**ALIGNMENT, "average": "groups"}),
    "debiased": ("distribution_alignment", {**ALIGNMENT, "debias": True}),
    "silverman": ("distribution_alignment", {**ALIGNMENT, "bandwidth": "silverman"}),
    "samples": ("distribution_alignment", SAMPLES),
    "debiased samples": ("distribution_alignment", {**SAMPLES, "debias": True}),
}


def build(case, channels=0, steps=100):
    name, settings = CASES[case] if isinstance(case, str) else case
    kind = registered()[name]
    columns = {key: Column(values, np.zeros(0, np.int32)) for key, values in VOCABULARY.items()}
    facts = Facts(SimpleNamespace(attributes=columns), np.zeros(0), seed=5, steps=steps, channels=channels)
    return kind(kind.Settings(**settings), facts, 4)


def expected(case, logits, batch, weights):
    """The value that the naive reference gives on the whole batch."""
    name, settings = CASES[case]
    if name == "cross_entropy":
        return reference.cross_entropy(logits, batch.labels, weights, settings.get("reduction", "mean"))
    arguments = {key: value for key, value in settings.items() if key != "attributes"}
    return reference.distribution_alignment(
        logits, batch.labels, batch.attributes, settings["attributes"], VOCABULARY, **arguments
    )


def batch(size, seed=0, kind="usual"):
    """A global batch and features (size, 4) fp64.

    male/Black is absent, female/Asian has one member, every fifth sample has an unknown gender or race.
    kind: usual, one class (no fakes), unknown (no sample belongs to a group).
    """
    random = np.random.default_rng([seed, size])
    gender, race = random.integers(0, 2, size), random.integers(0, 3, size)
    race[(gender == 1) & (race == 1)] = 2
    gender[(gender == 0) & (race == 0)] = 1
    gender[:1], race[:1] = 0, 0
    gender[4::10], race[9::10] = -1, -1
    if kind == "unknown":
        gender[:], race[:] = -1, -1
    labels = np.zeros(size, int) if kind == "one class" else random.integers(0, 2, size)
    made = Batch(
        images=torch.from_numpy(random.normal(size=(size, 3, 6, 6))),
        labels=torch.from_numpy(labels),
        attributes={"gender": torch.from_numpy(gender), "race": torch.from_numpy(race)},
        manipulations=torch.full((size,), -1),
        samples=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
        keys=torch.arange(size),
        sizes=(size,),
        position=0,
    )
    weights = torch.from_numpy(random.uniform(0.5, 2, size))
    return made, torch.from_numpy(random.normal(size=(size, 4))), weights


def parts(sizes):
    """Slices of the canonical order, one per part or rank."""
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def outputs(logits):
    return SimpleNamespace(logits=logits)


def combine(summaries):
    """What the wire does: Sums are added, Gathers concatenated."""
    combined = {}
    for key, first in summaries[0].items():
        if isinstance(first, Sum):
            combined[key] = sum(summary[key].tensor for summary in summaries)
        else:
            assert isinstance(first, Gather)
            combined[key] = torch.cat([summary[key].rows for summary in summaries])
    return combined
