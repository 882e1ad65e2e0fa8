"""Means of the worst part against their definition as minima, by scipy, and against a search as the released code's."""

import numpy as np
import pytest
import torch
from scipy import optimize

from dist_fair.interventions.order_statistics import smoothed_worst_part, worst_parts
from tests.interventions import reference_pg_fdd


def drawn(count, seed):
    return np.random.default_rng(seed).exponential(size=count)


def weighted(losses, alpha):
    values = torch.from_numpy(np.asarray(losses, float))
    k = torch.tensor([[alpha * len(values)]], dtype=torch.float64)
    means, weights = worst_parts(values[None], torch.ones_like(values)[None], k)
    assert means.item() == pytest.approx((weights[0, 0] @ values).item(), rel=1e-12)
    return weights[0, 0].numpy()


def smoothed(losses, alpha, guarded):
    """The value and its derivatives by the losses."""
    values = torch.from_numpy(np.asarray(losses, float))[None]
    found, weights = smoothed_worst_part(values, torch.ones_like(values), alpha, guarded)
    return found.item(), weights[0].numpy()


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5, 0.77, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_closed_form_is_the_minimum_over_lambda(count, alpha):
    """A linear program: lambda and u_i >= 0 with u_i >= l_i - lambda, least lambda + sum u / (alpha n)."""
    losses = drawn(count, count)
    costs, limits = [1, *[1 / (alpha * count)] * count], np.hstack([-np.ones((count, 1)), -np.eye(count)])
    bounds = [(None, None), *[(0, None)] * count]
    by_definition = optimize.linprog(costs, A_ub=limits, b_ub=-losses, bounds=bounds).fun
    weights = weighted(losses, alpha)
    assert weights @ losses == pytest.approx(by_definition, rel=1e-9)
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    assert weights.max() <= max(1 / (alpha * count), 1) + 1e-12


def test_weights_by_hand():
    assert weighted([1, 5, 3, 2, 4], 0.5).tolist() == pytest.approx([0, 0.4, 0.2, 0, 0.4])
    assert weighted([1, 5, 3, 2, 4], 0.1).tolist() == [0, 1, 0, 0, 0]
    assert weighted([2, 2, 2, 2], 0.5).tolist() == [0.5, 0.5, 0, 0]
    codes = torch.tensor([1, -1, 0, 1, 1, 0, -1])
    values = torch.tensor([[3.0, 9, 1, 3, 4, 2, 8], [1, 7, 6, 0, 0, 6, 7]], dtype=torch.float64)
    members = (codes == torch.arange(3)[:, None]).double()  # the third group has none
    means, found = worst_parts(values, members, 0.5 * members.sum(1, keepdim=True))
    assert found.sum(1)[0].tolist() == pytest.approx([1 / 3, 0, 0, 0, 2 / 3, 1, 0])
    assert found.sum(1)[1].tolist() == pytest.approx([2 / 3, 0, 1, 1 / 3, 0, 0, 0])
    assert means.tolist() == [pytest.approx([2, 11 / 3, 0]), pytest.approx([6, 2 / 3, 0])]


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.03, 1.0])
@pytest.mark.parametrize(("count", "alpha"), [(1, 0.5), (2, 0.5), (5, 0.5), (8, 0.5), (8, 0.13), (6, 1.0)])
def test_smoothed_is_the_minimum_over_lambda(count, alpha, spread):
    losses = 0.4 + spread * drawn(count, count)
    by_definition = optimize.minimize_scalar(
        reference_pg_fdd.smoothed_objective,
        args=(losses, alpha),
        bounds=(-1, max(losses) + 1),
        method="bounded",
        options={"xatol": 1e-10},
    ).fun
    found, weights = smoothed(losses, alpha, guarded=False)
    assert found == pytest.approx(by_definition, abs=1e-10)
    assert found == pytest.approx(weighted(losses, alpha) @ losses, abs=0.01)  # close to what it smooths
    assert weights.sum() == pytest.approx(1, abs=5e-3)


def released_search(losses, alpha):
    """Loss and weights as in the released code: fp32, overflow taken for the largest number, Brent's search."""
    losses, tau = np.asarray(losses, np.float32), np.float32(reference_pg_fdd.TAU_1)

    def objective(lam):
        with np.errstate(over="ignore"):
            grown = np.exp((losses - np.float32(lam)) / tau)
        if np.isinf(grown).any():
            return float(np.finfo(np.float32).max)
        soft = np.log(np.float32(1) + grown).mean() * tau / np.float32(alpha)
        return float(np.float32(lam) + np.float32(reference_pg_fdd.TAU_2 / (2 * alpha)) * np.float32(lam) ** 2 + soft)

    lam = optimize.fminbound(objective, losses.min() - 1000, losses.max())
    grown = np.exp((losses - np.float32(lam)) / tau).astype(float)
    return objective(lam), grown / (1 + grown) / (alpha * len(losses))


@pytest.mark.parametrize(
    "losses",
    [
        [0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0],
        [0.7, 0.6, 0.9, 0.3],
        [0.6, 0.6, 0.8],
        [0.5, 0.51, 0.58, 0.55],
        [0.5, 0.503, 0.5, 0.502, 0.501],
        [0.4],
    ],
)
def test_guarded_is_where_the_released_search_ends(losses):
    value, weights = released_search(losses, 0.5)
    found, found_weights = smoothed(losses, 0.5, guarded=True)
    assert found == pytest.approx(value, abs=2e-5)  # the search stops within 1e-5
    np.testing.assert_allclose(found_weights, weights, atol=0.02)  # and sigmoid((l - lambda) / 1e-3) is steep
    true, _ = smoothed(losses, 0.5, guarded=False)
    if max(losses) - min(losses) < 0.0887:
        assert found == pytest.approx(true, rel=1e-12)
    else:  # the worst alone, with a gradient that shrinks with the number of losses
        worst = np.eye(len(losses))[np.argmax(losses)] / (0.5 * len(losses))
        np.testing.assert_allclose(found_weights, worst, atol=1e-8)
        assert found > true + 0.01
