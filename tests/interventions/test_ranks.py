"""Exactness, level 2: real gloo ranks against the naive reference in one process; fp64, 1e-10. And planted bugs.

Every bug of `worlds.BUGS` must make the comparison that guards against it fail; README.md has the list.
"""

import functools

import numpy as np
import pytest

from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError
from tests.interventions import reference
from tests.interventions.cases import CASES, VOCABULARY, batch, expected
from tests.interventions.exactness import SIZES, UNEVEN, caught, compare_gradients, on_ranks, value_and_gradients
from tests.interventions.worlds import SIZE, Linear, Scoring, Small, decouple, step
from tests.ranks import run_ranks

SHORT = ["balanced", "grid", "samples"]


@functools.cache
def truth(case):
    whole, features, weights = batch(SIZE)
    model = Linear()
    return value_and_gradients(expected(case, model(features), whole, weights), model)


def compare(answers, case):
    """Every rank's loss and the averaged gradients against the reference."""
    value, gradients = truth(case)
    for found, found_gradients in answers:
        assert found == pytest.approx(value, rel=1e-10, abs=1e-12)
        compare_gradients(found_gradients, gradients)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_parameter_gradients_do_not_depend_on_the_ranks(world):
    for case, answers in on_ranks(step, [(case,) for case in CASES], SIZES[world]):
        compare(answers, *case)


@pytest.mark.parametrize(
    ("bug", "cases"),
    [
        ("no_factor", SHORT),
        ("times_world", SHORT),
        ("detached", SHORT),
        ("local", SHORT),
        ("local_counts", ["balanced", "grid"]),
        ("reversed_ranks", ["samples"]),
    ],
)
def test_planted_bugs_of_the_loss_are_caught(bug, cases):
    for case, answers in on_ranks(step, [(case,) for case in cases], UNEVEN, bug):
        caught(compare, answers, case)


SETTINGS = [
    {},
    {"distance": "cosine", "temperature": 0.5},
    {"distance": "raw", "attributes": ["race"], "keep": "last"},
]
SCORING = {1: (30,), 2: (15, 15), 3: (8, 0, 22), 4: (1, 7, 12, 10)}


def naive_scores(settings, iteration=0):
    """F_k of the naive reference, over both scoring batches."""
    detector, found = Small().eval(), []
    for whole in Scoring((30,), 0).batches(30, 2, iteration):
        names = settings.get("attributes", ["gender", "race"])
        codes = np.full(30, -1)
        for number, rows in enumerate(reference.groups(whole.attributes, names, VOCABULARY).values()):
            codes[rows] = number
        maps = detector.extract(whole.images).feature_map.detach().flatten(2)
        arguments = settings.get("temperature", 1.0), settings.get("distance", "normalised")
        found.append(reference.soft_nearest_neighbour_loss(maps, codes, *arguments))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_channel_scores_and_masks_do_not_depend_on_the_ranks(settings):
    alone = decouple(Communicator(), settings, SCORING[1])
    scores, masks, records = alone
    naive = naive_scores(settings)
    np.testing.assert_allclose(scores, naive, rtol=1e-10)
    assert np.isinf(scores[3])
    assert sorted(np.argsort(naive)[:2]) == records[0][1]["masked"]
    assert [step for step, _ in records] == [10, 20, 30]
    together = settings.get("keep", "all") == "all"
    assert [mask.count(0.0) for mask in masks] == ([2, 4, 6] if together else [2, 2, 2])
    for world in (2, 3, 4):
        for others, other_masks, other_records in run_ranks(world, decouple, settings, SCORING[world]):
            np.testing.assert_allclose(others, scores, rtol=1e-10)
            assert other_masks == masks
            assert [record["hash"] for _, record in other_records] == [record["hash"] for _, record in records]


def test_a_mask_per_rank_stops_the_run():
    with pytest.raises(DistFairError, match="disagree"):
        run_ranks(2, decouple, {}, SCORING[2], "own_rows")


@pytest.mark.parametrize("bug", ["own_rows_unnoticed", "reversed_ranks", "with_self"])
def test_planted_bugs_of_the_scores_are_caught(bug):
    answers = run_ranks(2, decouple, {}, (12, 18), bug)
    naive = naive_scores({})
    assert not any(np.allclose(scores, naive, rtol=1e-10, atol=0) for scores, _, _ in answers)
