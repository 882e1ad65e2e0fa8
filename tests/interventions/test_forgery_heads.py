"""L_sha and L_spe against loops over samples: any split, real ranks, planted bugs; fp64, 1e-10."""

import functools

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dist_fair.errors import DistFairError
from dist_fair.interventions.base import registered
from tests.interventions.cases import combine, parts
from tests.interventions.exactness import (
    SIZES,
    SPLITS,
    UNEVEN,
    caught,
    compare_gradients,
    on_ranks,
    value_and_gradient,
    value_and_gradients,
)
from tests.interventions.forgery_worlds import CASES, HEADS, KINDS, SIZE, Forgery, batch, build, index, naive, step


def by_parts(case, whole, images, sizes=(SIZE,)):
    model, loss, ones = Forgery(), build(case), torch.ones(len(images))
    summaries = [loss.summarise(model(images[rows]), whole.rows(rows, sizes), ones[rows]) for rows in parts(sizes)]
    return loss.objective(combine(summaries))[loss.terms[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", HEADS)
def test_any_split_equals_the_loops(case, kind):
    whole, images = batch(kind)
    truth = value_and_gradient(lambda x: naive(case, whole, Forgery()(x))[0], images)
    assert truth[1].abs().max() > 1e-3  # there is something to get wrong
    for sizes in SPLITS:
        found = value_and_gradient(lambda x, s=sizes: by_parts(case, whole, x, s), images)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10, msg=lambda m, s=sizes: f"split {s}: {m}")


def test_without_a_known_manipulation_and_reals_it_is_zero_with_zero_gradients():
    whole, images = batch("unknown")
    fakes = whole.rows(whole.labels == 1, (int(whole.labels.sum()),))
    value, gradient = value_and_gradient(
        lambda x: by_parts("specific", fakes, x, fakes.sizes), images[whole.labels == 1]
    )
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("case", HEADS)
def test_sample_weights_do_not_enter_and_half_precision_is_lifted(case):
    whole, images = batch()
    loss, outputs = build(case), Forgery()(images)
    one, other = (loss.summarise(outputs, whole, w)["losses"].tensor for w in (torch.rand(SIZE), torch.ones(SIZE)))
    assert torch.equal(one, other)
    (name,) = loss.reads
    half = outputs.extras[name].bfloat16()
    found = [build(case).summarise(outputs, whole, None)["losses"].tensor
             for outputs.extras[name] in (half, half.float())]  # fmt: skip
    assert found[0].dtype == torch.float32
    assert torch.equal(*found)


def test_only_unknown_manipulations_couple_samples():
    assert not build("shared").couples
    assert build("specific").couples
    assert not build("specific", index(unknown=False)).couples
    never = np.where(np.arange(20) % 8 == 1, 0, 1 / 17)  # unknown ones are there, and no tape draws them
    assert not build("specific", drawn=never).couples


@pytest.mark.parametrize("case", HEADS)
def test_a_batch_that_does_not_couple_is_the_mean_of_its_equal_parts(case):
    whole, images = batch(size=20)
    whole.manipulations[:] = torch.where(whole.labels == 1, torch.arange(20) % 3, -1)
    halves = [by_parts(case, whole.rows(rows, (10,)), images[rows], (10,)) for rows in parts((10, 10))]
    torch.testing.assert_close(sum(halves) / 2, by_parts(case, whole, images, (20,)), rtol=1e-12, atol=0)


# Ranks ---------------------------------------------------------------------------------------------------------------


@functools.cache
def truth(case, kind):
    whole, images = batch(kind)
    model = Forgery()
    return value_and_gradients(naive(case, whole, model(images))[0], model)


def compare(answers, case, kind):
    value, gradients = truth(case, kind)
    for found, found_gradients, _ in answers:
        assert found[CASES[case][0]] == pytest.approx(value, rel=1e-10, abs=1e-12)
        compare_gradients(found_gradients, gradients)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradients_do_not_depend_on_the_ranks(world):
    for case, answers in on_ranks(step, [(case, kind) for case in HEADS for kind in KINDS], SIZES[world]):
        compare(answers, *case)
        assert [answer[2] for answer in answers] == [{"summaries/sum": (1, 2 * 8)}] * world


@pytest.mark.parametrize("bug", ["no_factor", "times_world", "over_world", "detached", "local", "local_number"])
def test_planted_bugs_are_caught(bug):
    for case, answers in on_ranks(step, [(case, "usual") for case in HEADS], UNEVEN, bug):
        caught(compare, answers, case)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared_forgery", "specific_forgery"])
def test_settings_are_a_structured_config(name):
    kind = registered()[name].Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()
    with pytest.raises(DistFairError, match="weight="):
        kind(weight=-1.0)


def test_it_asks_for_a_head_with_a_class_per_manipulation():
    kinds = registered()
    assert kinds["shared_forgery"].needs(kinds["shared_forgery"].Settings(), index(())) == {"shared_logits": 2}
    specific = kinds["specific_forgery"]
    assert specific.needs(specific.Settings(), index()) == {"specific_logits": 4}
    with pytest.raises(DistFairError, match=r"name no manipulation.* set interventions\.specific_forgery=null"):
        specific.needs(specific.Settings(), index(()))
