"""The transport solver against POT, closed limits and finite differences, at the paper's epsilon and around it."""

import numpy as np
import ot
import pytest
import torch

from dist_fair.interventions.density import grid, histogram, kernels, silverman
from dist_fair.interventions.distribution_alignment import DistributionAlignment
from dist_fair.interventions.transport import entropic_transport, potentials

PAPER = 5e-4


def predictions(random, kind, size):
    if kind == "spread":
        return random.beta(*random.uniform(0.3, 4, 2), size=size)
    if kind == "saturated":
        return 1 / (1 + np.exp(-random.normal(0, 8, size)))
    if kind == "two ends":
        return np.where(random.random(size) < random.random(), 0.01, 0.99)
    return np.full(size, random.random())  # all alike


KINDS = ("spread", "saturated", "two ends", "alike")


def problems(count, bins, seed, kinds=KINDS):
    """Pairs (group, class) of histograms, (count, bins) fp64 each; every class contains its group, in part or whole."""
    random = np.random.default_rng(seed)
    points = grid(bins, torch.zeros((), dtype=torch.float64))
    groups, classes = [], []
    for _ in range(count):
        chosen = random.choice(kinds, 2)
        one, rest = (torch.tensor(predictions(random, kind, int(random.integers(1, 20)))) for kind in chosen)
        sums = [kernels(p, points, 0.05).sum(0) for p in (one, torch.cat([one, rest[1:]]))]
        groups.append(histogram(sums[0]))
        classes.append(histogram(sums[1]))
    return points, torch.stack(groups), torch.stack(classes)


def plan(points, q, r, epsilon):
    f, g = potentials(points, q, r, epsilon)
    cost = (points[:, None] - points) ** 2
    return torch.exp((f[:, :, None] + g[:, None, :] - cost) / epsilon) * q[:, :, None] * r[:, None, :]


def error(plans, q, r):
    """Marginal error in L1, of the worst problem."""
    return ((plans.sum(2) - q).abs().sum(1) + (plans.sum(1) - r).abs().sum(1)).max().item()


@pytest.mark.parametrize("epsilon", [1e-4, PAPER, 5e-3, 0.05, 1.0])
@pytest.mark.parametrize("bins", [16, 128])
def test_it_converges_on_whatever_predictions_look_like(epsilon, bins):
    points, q, r = problems(60, bins, seed=bins)
    assert error(plan(points, q, r, epsilon), q, r) < 1e-7


def alignment(logits, group, bins=128):
    """Mean cost of six groups against all, from logits (n,) to their gradient; the paper's epsilon."""
    logits = logits.clone().requires_grad_()
    points = grid(bins, logits)
    sums = kernels(logits.sigmoid(), points, 0.05)
    q = histogram(torch.stack([sums[group == one].sum(0) for one in range(6)]))
    costs = entropic_transport(points, q, histogram(sums.sum(0)).expand(6, -1), PAPER)
    costs.mean().backward()
    return costs.detach().double(), logits.grad.double()


@pytest.mark.parametrize("spread", [1.0, 3.0, 8.0])
def test_single_precision_at_the_papers_epsilon(spread):
    random, wrong = torch.Generator().manual_seed(3), []
    for _ in range(10):
        logits = spread * torch.randn(48, generator=random, dtype=torch.float64)
        group = torch.randint(0, 6, (48,), generator=random)
        exact, single = alignment(logits, group), alignment(logits.float(), group)
        torch.testing.assert_close(single[0], exact[0], rtol=1e-5, atol=1e-8)
        wrong.append((single[1] - exact[1]).norm() / exact[1].norm())
    assert torch.stack(wrong).median() < 1e-4
    assert max(wrong) < 1e-3


@pytest.mark.parametrize("epsilon", [PAPER, 5e-3, 0.05])
def test_plan_and_value_are_those_of_pot(epsilon):
    points, q, r = problems(3, 32, seed=8, kinds=["spread"])  # where POT converges too
    cost = (points[:, None] - points) ** 2
    values = entropic_transport(points, q, r, epsilon)
    for b, mine in enumerate(plan(points, q, r, epsilon)):
        # 7,420 iterations at most, a quarter of the time of sinkhorn_log's for the same plan to 1e-14.
        theirs, log = ot.sinkhorn(
            q[b].numpy(), r[b].numpy(), cost.numpy(), epsilon, method="sinkhorn_stabilized", numItermax=20_000,
            stopThr=1e-12, log=True
        )  # fmt: skip
        assert log["err"][-1] < 1e-12
        theirs = torch.from_numpy(theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)
        product = q[b][:, None] * r[b][None, :]
        information = (theirs * (theirs.clamp_min(1e-300) / product).log()).sum()
        torch.testing.assert_close(values[b], (theirs * cost).sum() + epsilon * information, rtol=1e-6, atol=1e-9)


def test_small_epsilon_is_transport_on_a_line():
    points, q, r = problems(20, 64, seed=4)
    values = entropic_transport(points, q, r, 1e-4)
    x = points.numpy()
    limit = torch.tensor([ot.emd2_1d(x, x, a.numpy(), b.numpy()) for a, b in zip(q, r, strict=True)])
    assert (values >= limit - 1e-12).all()
    assert (values <= limit + 1e-4 * np.log(64)).all()  # the mutual information is at most log 64


@pytest.mark.parametrize("epsilon", [PAPER, 0.05])
def test_gradients_against_finite_differences(epsilon):
    random = torch.Generator().manual_seed(6)
    a, b = torch.randn(2, 2, 8, generator=random, dtype=torch.float64).requires_grad_()
    x = torch.rand(8, generator=random, dtype=torch.float64).sort()[0].requires_grad_()

    def cost(a, b, x):
        return entropic_transport(x, a.softmax(1), b.softmax(1), epsilon)

    assert torch.autograd.gradcheck(cost, (a.detach().requires_grad_(), b.detach().requires_grad_(), x), eps=1e-7)


def test_weights_may_be_zero():
    random = torch.Generator().manual_seed(7)
    x = torch.rand(10, generator=random, dtype=torch.float64).sort()[0]
    q, r = torch.zeros(1, 10, dtype=torch.float64), torch.zeros(1, 10, dtype=torch.float64)
    q[0, [1, 4]], r[0, [1, 3, 4, 8]] = 0.5, 0.25
    x.requires_grad_()
    value = entropic_transport(x, q, r, 0.01)
    value.sum().backward()
    compact = x.detach()[[1, 3, 4, 8]].requires_grad_()
    same = entropic_transport(compact, q[:, [1, 3, 4, 8]], r[:, [1, 3, 4, 8]], 0.01)
    same.sum().backward()
    torch.testing.assert_close(value, same, rtol=1e-10, atol=0)
    torch.testing.assert_close(x.grad[[1, 3, 4, 8]], compact.grad, rtol=1e-8, atol=1e-12)
    assert x.grad[[0, 2, 5, 6, 7, 9]].abs().max() == 0


def test_symmetry_of_a_group_that_is_everyone():
    points, q, _ = problems(20, 128, seed=5)
    assert error(plan(points, q, q, PAPER), q, q) < 1e-7
    assert (entropic_transport(points, q, q, PAPER) > 0).all()  # the floor that `debias` takes away


def test_a_problem_does_not_see_the_others():
    points, q, r = problems(12, 128, seed=9)
    together = entropic_transport(points, q, r, PAPER)
    alone = torch.cat([entropic_transport(points, a[None], b[None], PAPER) for a, b in zip(q, r, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_not_a_number_comes_out_as_such():
    points, q, r = problems(2, 16, seed=1)
    q[0, 3] = torch.nan
    assert entropic_transport(points, q, r, PAPER).isnan().tolist() == [True, False]


def test_the_printed_typo_would_be_seen(monkeypatch):
    """r against G: group histograms of the reals compared with the fakes'."""
    from tests.interventions.cases import batch, build
    from tests.interventions.test_splits import by_parts

    whole, features, weights = batch(17)
    right = by_parts(build("grid"), whole, features[:, :2], weights, (17,))
    original = DistributionAlignment._costs
    monkeypatch.setattr(
        DistributionAlignment, "_costs", lambda self, x, q, classes, which: original(self, x, q, classes[[1, 1]], which)
    )
    wrong = by_parts(build("grid"), whole, features[:, :2], weights, (17,))
    assert abs(wrong - right) > 1e-6


def test_densities():
    points = grid(64, torch.zeros((), dtype=torch.float64))
    q = histogram(kernels(torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64), points, 0.05))
    torch.testing.assert_close(q.sum(1), torch.ones(3, dtype=torch.float64))
    # Mirror images keep the mass: as much in the whole interval, wherever the prediction lies.
    mass = kernels(torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64), points, 0.05).sum(1)
    torch.testing.assert_close(mass, mass[1].expand(3), rtol=1e-6, atol=0)
    assert histogram(torch.zeros(2, 8)).equal(torch.full((2, 8), 1 / 8))
    assert silverman(torch.tensor([0.3]), 128) == pytest.approx(1 / 128)
    assert silverman(torch.rand(1000), 128) < 0.2
