"""Conditional value at risk against loops over samples: any split, real ranks, planted bugs; fp64, 1e-10."""

import functools

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError
from tests.interventions import reference_pg_fdd
from tests.interventions.cases import combine, parts
from tests.interventions.exactness import (
    SIZES,
    SPLITS,
    UNEVEN,
    Watched,
    caught,
    compare_gradients,
    on_ranks,
    value_and_gradient,
    value_and_gradients,
)
from tests.interventions.pg_fdd_worlds import CASES, CVAR, KINDS, RISKS, SIZE, batch, build, heads, index, step

GROUPED = [case for case in RISKS if CASES[case][1].get("attributes") != []]


def by_parts(case, whole, images, weights, sizes=(SIZE,)):
    model, risk = heads(case), build(case)
    summaries = [
        risk.summarise(model(images[rows]), whole.rows(rows, sizes), weights[rows]) for rows in parts(sizes)
    ]  # fmt: skip
    return risk.objective(combine(summaries))[CVAR]


def naive(case, whole, images, weights):
    return reference_pg_fdd.conditional_value_at_risk(heads(case)(images).logits, whole, weights, **CASES[case][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", RISKS)
def test_any_split_equals_the_loops(case, kind):
    whole, images, weights = batch(kind)
    truth = value_and_gradient(lambda x: naive(case, whole, x, weights), images)
    assert kind == "unknown" or truth[1].abs().max() > 1e-3  # there is something to get wrong
    for sizes in SPLITS:
        found = value_and_gradient(lambda x, s=sizes: by_parts(case, whole, x, weights, s), images)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10, msg=lambda m, s=sizes: f"split {s}: {m}")


@pytest.mark.parametrize("case", GROUPED)
def test_no_known_group_is_zero_with_zero_gradients(case):
    whole, images, weights = batch("unknown")
    value, gradient = value_and_gradient(lambda x: by_parts(case, whole, x, weights), images)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("case", [case for case in RISKS if "guarded" not in case])
def test_finite_differences(case):
    """The envelope theorem: the weights are constants, the gradient is exact all the same."""
    whole, images, weights = batch()
    assert torch.autograd.gradcheck(lambda x: by_parts(case, whole, x, weights, (5, 12)), images.requires_grad_())


@pytest.mark.parametrize("case", RISKS)
def test_single_precision_is_close_and_half_precision_is_lifted(case):
    whole, images, weights = batch()
    logits, risk = heads(case)(images).logits.detach(), build(case)

    def of(logits):
        outputs = heads(case)(images)
        outputs.logits = logits
        return risk.objective(combine([risk.summarise(outputs, whole, weights.float())]))[CVAR]

    truth, single = value_and_gradient(of, logits), value_and_gradient(of, logits.float())
    torch.testing.assert_close(single[0].double(), truth[0], rtol=1e-6, atol=0)
    sharpness = 250 if CASES[case][1].get("outer", "hinge") != "hinge" else 1  # dv / dl of the smoothed is up to 250
    torch.testing.assert_close(single[1].double(), truth[1], rtol=1e-5, atol=1e-6 * sharpness)
    with torch.autocast("cpu", torch.bfloat16):
        half = of(logits.bfloat16())
    assert torch.equal(half, of(logits.bfloat16().float()))


def test_with_everything_in_the_worst_part_it_is_the_mean_of_cross_entropy():
    whole, images, weights = batch()
    losses = torch.nn.functional.cross_entropy(heads("dag")(images).logits, whole.labels, reduction="none")
    assert by_parts("dag, all", whole, images, weights).item() == pytest.approx((weights * losses).mean().item())


def test_numbers_that_are_not_finite_are_seen():
    whole, images, weights = batch()
    images[3, 0] = torch.nan
    assert by_parts("dag", whole, images, weights).isnan()
    assert by_parts("daw", whole, images, weights).isnan()
    assert by_parts("smoothed", whole, images, weights).isnan()


# What a constant prediction would get ---------------------------------------------------------------------------------


def constant(p, whole, case, weights):
    losses = [-weights[i] * torch.log(p if whole.labels[i] else 1 - p) for i in range(len(whole))]
    arguments = {**CASES[case][1], "outer": "hinge"}
    return reference_pg_fdd.bi_level(losses, whole, **arguments).item()


@pytest.mark.parametrize("kind", ["usual", "one class", "singles", "by group"])
@pytest.mark.parametrize("case", [case for case in RISKS if CASES[case][1].get("outer", "hinge") == "hinge"])
def test_chance_is_the_best_constant(case, kind):
    whole, images, weights = batch(kind)
    risk, measure = build(case), f"{CVAR}_at_chance"

    def of(weights):
        return risk.objective(combine([risk.summarise(heads(case)(images), whole, weights)]))[measure].item()

    ones = torch.ones(SIZE, dtype=torch.float64)
    grid = torch.linspace(0, 1, 301, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    tried = [constant(p, whole, case, ones) for p in grid]
    assert min(tried) - 1e-3 <= of(ones) <= min(tried) + 1e-9
    assert of(weights) == pytest.approx(constant(grid[np.argmin(tried)], whole, case, weights), rel=0.02, abs=1e-6)
    assert of(ones) <= np.log(2) + 1e-12


def test_chance_is_zero_where_no_group_is_known():
    whole, images, weights = batch("unknown")
    for case in GROUPED:
        risk = build(case)
        found = risk.objective(combine([risk.summarise(heads(case)(images), whole, weights)]))
        assert found[f"{CVAR}_at_chance"] == 0


# Ranks ---------------------------------------------------------------------------------------------------------------

FEW = ["dag", "daw", "smoothed", "guarded"]
TIED = ["dag, a third", "dag, less than a sample", "daw", "daw, a third", "smoothed"]  # where the worst part ends


@functools.cache
def truth(case, kind):
    whole, images, weights = batch(kind)
    model = heads(case)
    settings = CASES[case][1]
    value = reference_pg_fdd.conditional_value_at_risk(model(images).logits, whole, weights, **settings)
    return *value_and_gradients(value, model), step(Communicator(), case, kind, (SIZE,))[0]


def compare(answers, case, kind):
    value, gradients, alone = truth(case, kind)
    for found, found_gradients, _ in answers:
        assert found[CVAR] == pytest.approx(value, rel=1e-10, abs=1e-12)
        assert found == pytest.approx(alone, rel=1e-10, abs=1e-12)
        compare_gradients(found_gradients, gradients)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradients_do_not_depend_on_the_ranks(world):
    cases = [(case, "usual") for case in RISKS] + [(case, kind) for case in FEW for kind in KINDS[1:]]
    for case, answers in on_ranks(step, [*cases, *((case, "ties") for case in TIED)], SIZES[world]):
        compare(answers, *case)


@pytest.mark.parametrize(
    ("bug", "cases", "kind"),
    [
        ("no_factor", FEW, "usual"),
        ("times_world", FEW, "usual"),
        ("detached", FEW, "usual"),
        ("local", FEW, "usual"),
        ("local_sort", FEW, "usual"),
        ("local_sort", FEW, "by group"),
        ("local_counts", ["dag", "daw", "daw, a third"], "usual"),
        ("reversed_ranks", FEW, "usual"),
        ("reversed_ranks", FEW, "ties"),
        ("other_order", TIED, "ties"),
        ("last_of_ties", TIED, "ties"),
    ],
)
def test_planted_bugs_are_caught(bug, cases, kind):
    for case, answers in on_ranks(step, [(case, kind) for case in cases], UNEVEN, bug):
        caught(compare, answers, case)


def test_three_numbers_a_sample_are_on_the_wire():
    """In fp64 here; one call, whether groups are known or not."""
    ((_, answers), (_, unknown)) = on_ranks(step, [("daw", "usual"), ("smoothed", "unknown")], (9, 8))
    for found in (answers, unknown):
        assert [answer[2] for answer in found] == [{"summaries/gather": (1, rows * 3 * 8)} for rows in (9, 8)]
    whole, images, weights = batch()
    outputs = heads("daw")(images)
    outputs.logits = outputs.logits.half()
    assert build("daw").summarise(outputs, whole, weights)["samples"].rows.dtype == torch.float32


@pytest.mark.parametrize("case", RISKS)
def test_the_host_never_waits(case):
    whole, images, weights = batch()
    outputs, risk = heads(case)(images), build(case)
    with Watched() as watched:
        found = risk.objective(combine([risk.summarise(outputs, whole, weights)]))[CVAR]
        found.backward()
    assert watched.seen & {"sort", "sigmoid_"}
    assert not watched.waits


# Settings ------------------------------------------------------------------------------------------------------------


def test_settings_are_a_structured_config():
    kind = type(build("daw")).Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight="),
        ({"alpha": 0.0}, "alpha=0.0: a part"),
        ({"alpha": 1.1}, "alpha=1.1: a part"),
        ({"alpha": float("nan")}, "alpha=nan: a part"),
        ({"inner_alpha": 0.0}, "inner_alpha=0.0: the part of each group"),
        ({"inner_alpha": None}, "inner_alpha=None: the part of each group"),
        ({"attributes": []}, r"inner_alpha=0.9 has no effect with attributes=\[\]: set inner_alpha=null"),
        ({"outer": "soft"}, "outer=soft: one of hinge, smoothed, guarded"),
        ({"attributes": ["age"]}, "attribute 'age' is not in the data"),
        ({"attributes": ["race", "race"]}, "each once"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(DistFairError, match=message):
        build((CVAR, settings))


def test_data_of_one_group():
    one = index({"gender": ("female",)})
    with pytest.raises(DistFairError, match=r"the data has 1 value of gender, so there is no worst group"):
        build((CVAR, {"attributes": ["gender"]}), one)
    build((CVAR, {"attributes": [], "inner_alpha": None}), one)
