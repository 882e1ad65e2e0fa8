"""Inverse propensity weights against counting by hand; exact for any plan, the same for every batch and rank."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_fair.data.index import Column
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, registered

VALUES = {"gender": ("female", "male"), "race": ("Asian", "Black", "White"), "age": ("young", "old")}
PG_COUNTS = (2475, 25443, 1468, 4163, 8013, 31281, 1111, 2185)  # FaceForensics++ by gender x race, METHODS 1.4


def build(columns, frequencies=None, **settings):
    """The intervention on made-up attribute codes; every sample as frequent as the others unless said."""
    count = len(next(iter(columns.values())))
    frequencies = np.full(count, 1 / count) if frequencies is None else frequencies
    attributes = {
        name: Column(VALUES.get(name, tuple("abcd")), np.asarray(codes, np.int32)) for name, codes in columns.items()
    }
    index = SimpleNamespace(attributes=attributes)
    kind = registered()["inverse_propensity"]
    chosen = kind.Settings(**{"attributes": [*columns], **settings})
    return kind(chosen, Facts(index, frequencies, seed=0, steps=10, channels=0), 4)


def weights(intervention, columns):
    batch = SimpleNamespace(attributes={name: torch.as_tensor(codes) for name, codes in columns.items()})
    return intervention.weigh(batch).numpy()


def draw(count=400, seed=0, unknown=0.0):
    random = np.random.default_rng(seed)
    columns = {"gender": random.integers(0, 2, count) | random.integers(0, 2, count)}
    columns["race"] = np.minimum(random.integers(0, 5, count), 2)
    for codes in columns.values():
        codes[random.random(count) < unknown] = -1
    return columns


def naive(columns, frequencies, propensity):
    """Weight of each sample, by loops over samples, from eq. 5; all attributes known."""
    samples = [*zip(*columns.values(), strict=True)]
    total = sum(frequencies)
    found = []
    for sample in samples:
        joint = sum(f for other, f in zip(samples, frequencies, strict=True) if other == sample) / total
        product = 1.0
        for k, value in enumerate(sample):
            product *= sum(f for other, f in zip(samples, frequencies, strict=True) if other[k] == value) / total
        found.append(
            {"product_marginals": 1 / product, "inverse_joint": 1 / joint, "one_minus_joint": 1 - joint}[propensity]
        )
    mean = sum(w * f for w, f in zip(found, frequencies, strict=True)) / total
    return np.array(found) / mean


@pytest.mark.parametrize("propensity", ["product_marginals", "inverse_joint", "one_minus_joint"])
@pytest.mark.parametrize("uneven", [False, True])
def test_weights_are_those_of_the_equation(propensity, uneven):
    columns = draw()
    frequencies = np.random.default_rng(1).random(400) if uneven else np.ones(400)
    frequencies /= frequencies.sum()
    found = weights(build(columns, frequencies, propensity=propensity), columns)
    np.testing.assert_allclose(found, naive(columns, frequencies, propensity), rtol=1e-12)
    assert (found * frequencies).sum() == pytest.approx(1, rel=1e-12)


def test_the_counts_of_faceforensics():
    gender, race = np.repeat([*itertools.product(range(2), range(4))], PG_COUNTS, axis=0).T
    columns = {"gender": gender, "tone": race}
    by_group = {p: weights(build(columns, propensity=p), columns) for p in ("product_marginals", "inverse_joint")}
    mass = np.bincount(gender * 4 + race, by_group["product_marginals"]) / len(gender)
    np.testing.assert_allclose(mass, [0.066, 0.126, 0.160, 0.184, 0.169, 0.122, 0.095, 0.076], atol=1e-3)
    np.testing.assert_allclose(np.bincount(gender * 4 + race, by_group["inverse_joint"]) / len(gender), 1 / 8)
    assert by_group["product_marginals"].min() == pytest.approx(0.30, abs=0.01)
    assert by_group["product_marginals"].max() == pytest.approx(8.3, abs=0.1)


def test_samples_that_the_plan_leaves_out_do_not_count():
    columns = draw()
    frequencies = np.where(np.arange(400) < 250, 1 / 250, 0)
    part = {name: codes[:250] for name, codes in columns.items()}
    np.testing.assert_allclose(weights(build(columns, frequencies), part), weights(build(part), part), rtol=1e-12)


def test_unknown_values_weigh_one_and_change_no_other_weight():
    columns = draw(unknown=0.2)
    known = (columns["gender"] >= 0) & (columns["race"] >= 0)
    found = weights(build(columns, propensity="inverse_joint"), columns)
    assert (found[~known] == 1).all()
    only = {name: codes[known] for name, codes in columns.items()}
    np.testing.assert_allclose(found[known], weights(build(only, propensity="inverse_joint"), only), rtol=1e-12)
    # A marginal counts whoever has the value, whether or not the other one is known.
    marginal = np.mean(columns["race"][columns["race"] >= 0] == 0)
    one = weights(build(columns, attributes=["race"]), columns)
    assert one[columns["race"] == 0][0] * marginal == pytest.approx(1 / 3, rel=1e-12)


@pytest.mark.parametrize("propensity", ["product_marginals", "inverse_joint", "one_minus_joint"])
def test_unknown_values_can_follow_the_marginals(propensity):
    columns = draw(unknown=0.2)
    intervention = build(columns, propensity=propensity, unknown="marginals")
    found = weights(intervention, columns)
    assert found.mean() == pytest.approx(1, rel=1e-12)
    share = [np.bincount(codes[codes >= 0]) / (codes >= 0).sum() for codes in columns.values()]

    def weight(gender, race):
        return weights(intervention, {"gender": [gender], "race": [race]})[0]

    assert weight(-1, 2) == pytest.approx(sum(share[0][g] * weight(g, 2) for g in range(2)), rel=1e-12)
    assert weight(1, -1) == pytest.approx(sum(share[1][r] * weight(1, r) for r in range(3)), rel=1e-12)
    both = sum(share[0][g] * share[1][r] * weight(g, r) for g in range(2) for r in range(3))
    assert weight(-1, -1) == pytest.approx(both, rel=1e-12)


def test_a_clipped_weight_leaves_the_mean_at_one():
    columns = draw()
    raw, clipped = (weights(build(columns, propensity="inverse_joint", clip=clip), columns) for clip in (None, 1.5))
    assert raw.max() > 2
    assert clipped.mean() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(clipped, np.minimum(raw, 1.5) / np.minimum(raw, 1.5).mean(), rtol=1e-12)


def test_groups_without_samples_are_no_trouble():
    columns = {"gender": np.array([0, 0, 1, -1]), "race": np.array([0, 1, 0, 1])}
    for propensity in ("product_marginals", "inverse_joint"):
        table = build(columns, propensity=propensity, unknown="marginals").table
        assert table.isfinite().all()


def test_three_attributes_and_one():
    columns = draw() | {"age": np.arange(400) % 2}
    np.testing.assert_allclose(weights(build(columns), columns), naive(columns, np.ones(400), "product_marginals"))
    one = {"race": columns["race"]}
    np.testing.assert_allclose(weights(build(one), one), naive(one, np.ones(400), "inverse_joint"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"propensity": "joint"}, "propensity=joint"),
        ({"unknown": "zero"}, "unknown=zero"),
        ({"clip": 1.0}, "clip=1.0"),
        ({"attributes": ["hair"]}, "attribute 'hair'"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(DistFairError, match=named):
        build(draw(), **settings)


def test_data_that_give_no_weights_are_an_error():
    with pytest.raises(DistFairError, match="known value"):
        build({"gender": np.array([0, -1]), "race": np.array([-1, 1])})
    with pytest.raises(DistFairError, match="every weight is 0"):
        build({"gender": np.array([1, 1])}, propensity="one_minus_joint")
