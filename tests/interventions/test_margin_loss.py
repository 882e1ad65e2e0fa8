"""The margin loss against loops and published margins: any split, real ranks, planted bugs; fp64, 1e-10."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dist_fair.data.index import Column
from dist_fair.errors import DistFairError
from dist_fair.interventions.margin_loss import MarginLoss, margins
from tests.interventions import reference_pg_fdd
from tests.interventions.cases import VOCABULARY, combine, parts
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
from tests.interventions.pg_fdd_worlds import (
    CASES,
    MARGIN,
    MARGINS,
    SIZE,
    batch,
    build,
    frequencies,
    heads,
    index,
    step,
)
from tests.interventions.reference import groups

KINDS = ("usual", "unknown", "by group", "singles")


def counts(case):
    """How often the plan draws each group, by counting."""
    attributes = CASES[case][1].get("attributes", ["gender", "race"])
    codes = {name: column.codes for name, column in index().attributes.items()}
    return {values: frequencies()[members].sum() for values, members in groups(codes, attributes, VOCABULARY).items()}


def by_parts(case, whole, images, sizes=(SIZE,)):
    model, loss, ones = heads(case), build(case), torch.ones(len(images))
    summaries = [loss.summarise(model(images[rows]), whole.rows(rows, sizes), ones[rows]) for rows in parts(sizes)]
    return loss.objective(combine(summaries))[MARGIN]


def naive(case, whole, images, model=None):
    logits = (model or heads(case))(images).extras["demographic_logits"]
    return reference_pg_fdd.margin_loss(logits, whole, counts(case), **CASES[case][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MARGINS)
def test_any_split_equals_the_loops(case, kind):
    whole, images, _ = batch(kind)
    truth = value_and_gradient(lambda x: naive(case, whole, x), images)
    assert kind == "unknown" or truth[1].abs().max() > 1e-3  # there is something to get wrong
    for sizes in SPLITS:
        found = value_and_gradient(lambda x, s=sizes: by_parts(case, whole, x, s), images)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10, msg=lambda m, s=sizes: f"split {s}: {m}")


def test_no_known_group_is_zero_with_zero_gradients():
    whole, images, _ = batch("unknown")
    value, gradient = value_and_gradient(lambda x: by_parts("margin", whole, x), images)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_without_margin_and_scale_it_is_cross_entropy():
    whole, images, _ = batch()
    codes = build("no margin").groups.codes(whole.attributes)
    logits = heads("no margin")(images).extras["demographic_logits"]
    plain = torch.nn.functional.cross_entropy(logits[codes >= 0], codes[codes >= 0])
    assert by_parts("no margin", whole, images).item() == pytest.approx(plain.item(), rel=1e-12)


def test_sample_weights_do_not_enter():
    whole, images, weights = batch()
    loss, outputs = build("margin"), heads("margin")(images)
    one, other = (loss.summarise(outputs, whole, w)["losses"].tensor for w in (weights, torch.ones(SIZE)))
    assert torch.equal(one, other)


def test_half_precision_is_lifted():
    whole, images, weights = batch()
    outputs = heads("margin")(images)
    half = outputs.extras["demographic_logits"].bfloat16()
    outputs.extras["demographic_logits"] = half
    found = build("margin").summarise(outputs, whole, weights)["losses"].tensor
    outputs.extras["demographic_logits"] = half.float()
    assert found.dtype == torch.float32
    assert torch.equal(found, build("margin").summarise(outputs, whole, weights)["losses"].tensor)


# Margins -------------------------------------------------------------------------------------------------------------

FACE_FORENSICS = [2475, 25443, 1468, 4163, 8013, 31281, 1111, 2185]  # M-A, M-W, M-B, M-O, F-A, F-W, F-B, F-O


def test_margins_of_face_forensics():
    """Group counts that the paper's code has in it, and the margins they give."""
    expected = [0.409, 0.229, 0.466, 0.359, 0.305, 0.217, 0.500, 0.422]
    np.testing.assert_allclose(margins(np.array(FACE_FORENSICS, float), 0.5), expected, atol=5e-4)


def test_margins_come_from_what_the_plan_draws():
    """Frequencies, not samples; a group that is never drawn sets no margin."""
    loss, drawn = build("margin"), np.array(list(counts("margin").values()))
    expected = [0.5 * (drawn[drawn > 0].min() / one) ** 0.25 if one > 0 else 0 for one in drawn]
    np.testing.assert_allclose(loss.margins.numpy(), expected, rtol=1e-12)
    assert loss.margins[4] == 0
    assert loss.margins.max() == 0.5
    even = build("margin", drawn=np.full(60, 1 / 60)).margins
    assert not torch.allclose(loss.margins, even)
    assert not loss.state_dict()


# Ranks ---------------------------------------------------------------------------------------------------------------


@functools.cache
def truth(case, kind):
    whole, images, _ = batch(kind)
    model = heads(case)
    return value_and_gradients(naive(case, whole, images, model), model)


def compare(answers, case, kind):
    value, gradients = truth(case, kind)
    for found, found_gradients, _ in answers:
        assert found[MARGIN] == pytest.approx(value, rel=1e-10, abs=1e-12)
        compare_gradients(found_gradients, gradients)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradients_do_not_depend_on_the_ranks(world):
    for case, answers in on_ranks(step, [(case, kind) for case in MARGINS for kind in KINDS], SIZES[world]):
        compare(answers, *case)
        assert [answer[2] for answer in answers] == [{"summaries/sum": (1, 2 * 8)}] * world


@pytest.mark.parametrize("bug", ["no_factor", "times_world", "detached", "local", "local_number"])
def test_planted_bugs_are_caught(bug):
    for case, answers in on_ranks(step, [(case, "usual") for case in MARGINS], UNEVEN, bug):
        caught(compare, answers, case)


# Settings and detectors that do not fit ------------------------------------------------------------------------------


def test_settings_are_a_structured_config():
    kind = type(build("margin")).Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight="),
        ({"scale": 0.0}, "scale=0.0: above 0"),
        ({"max_margin": -0.5}, "max_margin=-0.5: must not be negative"),
        ({"attributes": []}, "at least one attribute"),
        ({"attributes": ["age"]}, "attribute 'age' is not in the data"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(DistFairError, match=message):
        build((MARGIN, settings))


def test_data_without_groups_to_tell_apart():
    one = SimpleNamespace(attributes={"gender": Column(("female", "male"), np.array([0, -1, 1, 0]))})
    with pytest.raises(DistFairError, match="draws samples of 1 group"):
        build((MARGIN, {"attributes": ["gender"]}), one, np.array([0.5, 0.5, 0, 0]))


def test_it_asks_for_a_head_with_a_class_per_group():
    settings = MarginLoss.Settings()
    assert MarginLoss.needs(settings, index()) == {"demographic_logits": 6}
    assert build("margin").reads == ("demographic_logits",)
