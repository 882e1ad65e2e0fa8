"""The reconstruction loss against one image at a time: paired splits, real ranks, planted bugs; fp64, 1e-10."""

import functools

import pytest
import torch
from omegaconf import OmegaConf

from dist_fair.engine.assembly import pixel_range
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import registered
from dist_fair.interventions.reconstruction_loss import MEASURES, ReconstructionLoss, partners
from dist_fair.recipe.schema import Data
from tests.interventions.cases import combine, parts
from tests.interventions.exactness import (
    Watched,
    caught,
    compare_gradients,
    on_ranks,
    value_and_gradient,
    value_and_gradients,
)
from tests.interventions.forgery_worlds import LANE, RECONSTRUCTION, Forgery, batch, build, index, naive, step

SIZE, CASE, NAMES = 5 * LANE, "reconstruction", ("reconstruction", *MEASURES)
SPLITS = [(20,), (12, 8), (0, 20), (4, 4, 12), (4, 0, 8, 8), (0, 4, 0, 12, 4)]
SIZES = {1: (20,), 2: (12, 8), 3: (16, 0, 4), 4: (4, 8, 4, 4)}


def by_parts(whole, images, sizes=(SIZE,)):
    model, loss, ones = Forgery(), build(CASE), torch.ones(len(images))
    summaries = [loss.summarise(model(images[rows]), whole.rows(rows, sizes), ones[rows]) for rows in parts(sizes)]
    return loss.objective(combine(summaries))


def test_any_paired_split_equals_the_loops():
    whole, images = batch("paired", SIZE)
    model = Forgery()
    for place, name in enumerate(NAMES):
        truth = value_and_gradient(lambda x, p=place: naive(CASE, whole, model(x))[p], images)
        assert truth[1].abs().max() > 1e-3  # there is something to get wrong
        for sizes in SPLITS:
            found = value_and_gradient(lambda x, n=name, s=sizes: by_parts(whole, x, s)[n], images)
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10, msg=lambda m, s=sizes: f"split {s}: {m}")


def test_a_batch_is_the_mean_of_its_equal_parts():
    whole, images = batch("paired", 5 * LANE)
    lanes = [by_parts(whole.rows(rows, (LANE,)), images[rows], (LANE,)) for rows in parts([LANE] * 5)]
    for name, value in by_parts(whole, images).items():
        torch.testing.assert_close(sum(lane[name] for lane in lanes) / 5, value, rtol=1e-12, atol=0)
    assert not build(CASE).couples


def test_partners_are_each_others_whatever_the_order_in_a_lane():
    labels = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0])
    assert partners(labels).tolist() == [1, 0, 3, 2, 6, 7, 4, 5]
    assert partners(labels[:0]).tolist() == []


def test_the_four_are_what_their_names_say():
    """A decoder that gives the code's constant: content decides the target, the code's giver the prediction."""
    whole, images = batch("paired", LANE)  # real, real, fake, fake
    whole.images[:] = torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=torch.float64).view(4, 1, 1, 1)
    outputs = Forgery()(images)
    outputs.extras["code"] = whole.images[:, :2, :3, :3].clone()
    outputs.decode = lambda code, condition, keys: code[:, :1, :1, :1].expand(-1, 3, 6, 6)
    loss = build(CASE)
    found = loss.objective(combine([loss.summarise(outputs, whole, None)]))
    assert [round(found[name].item(), 12) for name in NAMES] == [0.9, 0, 0.45, 0, 0.45]
    assert NAMES[1:] == tuple(f"reconstruction_{one}" for one in ("self_real", "cross_real", "self_fake", "cross_fake"))


def test_finite_differences():
    whole, images = batch("paired", 2 * LANE)
    check = torch.autograd.gradcheck
    assert check(lambda x: by_parts(whole, x, (LANE, LANE))["reconstruction"], images.requires_grad_())


def test_half_precision_is_lifted_and_sample_weights_do_not_enter():
    whole, images = batch("paired", SIZE)
    outputs, loss = Forgery()(images), build(CASE)
    whole.images.copy_(whole.images.bfloat16())
    decode = outputs.decode
    found = []
    for weights in (torch.rand(SIZE), torch.ones(SIZE)):
        outputs.decode = lambda *columns: decode(*columns).bfloat16()
        found.append(loss.summarise(outputs, whole, weights)["errors"].tensor)
        outputs.decode = lambda *columns: decode(*columns).bfloat16().float()
        found.append(loss.summarise(outputs, whole, weights)["errors"].tensor)
    assert all(torch.equal(one, found[0]) for one in found)


def test_the_host_never_waits():
    whole, images = batch("paired", SIZE)
    outputs, loss = Forgery()(images), build(CASE)
    with Watched() as watched:
        loss.objective(combine([loss.summarise(outputs, whole, torch.ones(SIZE))]))["reconstruction"].backward()
    assert "sort" in str(watched.seen)
    assert not watched.waits


# Ranks ---------------------------------------------------------------------------------------------------------------


@functools.cache
def truth():
    whole, images = batch("paired", SIZE)
    model = Forgery()
    numbers = naive(CASE, whole, model(images))
    return [number.item() for number in numbers], value_and_gradients(numbers[0], model)[1]


def compare(answers, case, kind):
    values, gradients = truth()
    for found, found_gradients, _ in answers:
        assert [found[name] for name in NAMES] == pytest.approx(values, rel=1e-10, abs=1e-12)
        compare_gradients(found_gradients, gradients)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradients_do_not_depend_on_the_ranks(world):
    ((case, answers),) = on_ranks(step, [(CASE, "paired")], SIZES[world])
    compare(answers, *case)
    assert [answer[2] for answer in answers] == [{"summaries/sum": (1, 6 * 8)}] * world


@pytest.mark.parametrize(
    "bug",
    ["no_factor", "times_world", "over_world", "detached", "local", "local_number", "forgery_decides", "next_partner",
     "rows_that_mirror", "same_dropout"],
)  # fmt: skip
def test_planted_bugs_are_caught(bug):
    ((case, answers),) = on_ranks(step, [(CASE, "paired")], (4, 12, 4), bug)
    caught(compare, answers, case)


# Settings ------------------------------------------------------------------------------------------------------------


def test_settings_are_a_structured_config():
    kind = registered()[RECONSTRUCTION].Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()
    with pytest.raises(DistFairError, match="weight="):
        kind(weight=-1.0)


def test_it_wants_pairs_and_a_decoder():
    assert ReconstructionLoss.needs(ReconstructionLoss.Settings(), index()) == {"reconstruction": 0}
    with pytest.raises(DistFairError, match=r"data\.tapes do not give every rank .*data\.tapes=\{real: \{label: 0"):
        build(CASE, paired=False)


def test_images_that_no_decoder_of_ours_reaches_are_refused():
    """ImageNet's mean and standard deviation make black -2.12 and white 2.64."""
    recipe = Data(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    with pytest.raises(DistFairError, match=r"images from -2\.12 to 2\.64, .*set data\.mean=\[0\.5,0\.5,0\.5\]"):
        build(CASE, pixels=pixel_range(recipe))
    build(CASE, pixels=pixel_range(Data()))
