"""Exactness, level 1: any split of a batch into parts, in one process, against the naive reference; fp64, 1e-10."""

import pytest
import torch

from tests.interventions.cases import CASES, batch, build, combine, expected, outputs, parts
from tests.interventions.exactness import SPLITS, value_and_gradient

SIZE = 17


def by_parts(intervention, whole, logits, weights, sizes):
    summaries = [
        intervention.summarise(outputs(logits[rows]), whole.rows(rows, sizes), weights[rows]) for rows in parts(sizes)
    ]
    (term,) = intervention.terms
    return intervention.objective(combine(summaries))[term]


@pytest.mark.parametrize("kind", ["usual", "one class", "unknown"])
@pytest.mark.parametrize("case", CASES)
def test_any_split_equals_the_reference(case, kind):
    whole, features, weights = batch(SIZE, kind=kind)
    logits = 1.5 * features[:, :2]
    truth = value_and_gradient(lambda z: expected(case, z, whole, weights), logits)
    assert kind == "unknown" or truth[1].abs().max() > 1e-4  # there is something to get wrong
    for sizes in SPLITS:
        found = value_and_gradient(lambda z, s=sizes: by_parts(build(case), whole, z, weights, s), logits)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10, msg=lambda m, s=sizes: f"split {s}: {m}")


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == "distribution_alignment"])
def test_no_group_present_is_zero_with_zero_gradients(case):
    whole, features, weights = batch(SIZE, kind="unknown")
    value, gradient = value_and_gradient(lambda z: by_parts(build(case), whole, z, weights, (SIZE,)), features[:, :2])
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("case", CASES)
def test_single_precision_is_close_and_half_precision_is_lifted(case):
    whole, features, weights = batch(SIZE)
    logits = features[:, :2]
    truth = value_and_gradient(lambda z: by_parts(build(case), whole, z, weights, (SIZE,)), logits)
    single = value_and_gradient(lambda z: by_parts(build(case), whole, z, weights, (SIZE,)), logits.float())
    torch.testing.assert_close(single[0].double(), truth[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(single[1].double(), truth[1], rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = by_parts(build(case), whole, logits.bfloat16(), weights, (SIZE,))
        again = by_parts(build(case), whole, logits.bfloat16().float(), weights, (SIZE,))
    assert half.dtype in (torch.float32, torch.float64)
    assert torch.equal(half, again)
