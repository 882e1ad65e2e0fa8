"""The transport solver against POT, closed limits and finite differences, at the paper's epsilon and around it.

As the CPU runs it, where the rounds end when all problems have converged; and as a GPU without the kernel does.
"""

import numpy as np
import ot
import pytest
import torch

from dist_fair.interventions import transport
from dist_fair.interventions.density import FLOOR, grid, kernels, mirrored, silverman
from dist_fair.interventions.distribution_alignment import DistributionAlignment
from dist_fair.interventions.transport import entropic_transport
from tests.interventions import reference
from tests.interventions.launches import Launches

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
        sums = [kernels(p, mirrored(points), 0.05).sum(0) for p in (one, torch.cat([one, rest[1:]]))]
        groups.append(histogram(sums[0]))
        classes.append(histogram(sums[1]))
    return points, torch.stack(groups), torch.stack(classes)


def histogram(numerators):
    """Kernel sums (..., m) as the distribution that entropic_transport makes of them; uniform where there are none."""
    total = numerators.sum(-1, keepdim=True)
    q = numerators / torch.where(total > 0, total, 1) + FLOOR
    return q / q.sum(-1, keepdim=True)


def plan(points, q, r, epsilon):
    """The optimal plans (b, n, n), from the values and their gradients: those are the potentials."""
    q, r = q.clone().requires_grad_(), r.clone().requires_grad_()
    costs = entropic_transport(points, q, r, epsilon)
    f, g = torch.autograd.grad(costs.sum(), (q, r))
    with torch.no_grad():
        f = f + costs[:, None]  # gradients come with means of 0
        exponents = (f[:, :, None] + g[:, None, :] - (points[:, None] - points) ** 2) / epsilon
        return torch.exp(exponents) * q[:, :, None] * r[:, None, :]


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
    sums = kernels(logits.sigmoid(), mirrored(points), 0.05)
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


def solved(points, q, r, epsilon=PAPER):
    return transport.solve(points, q, r, torch.ones(len(q)), epsilon, FLOOR, True)


@pytest.fixture
def on_device(monkeypatch):
    """As on a device that the host must not wait for; a function that undoes it."""
    monkeypatch.setattr(transport, "_may_look", lambda tensor: False)
    return monkeypatch.undo


def test_rounds_that_others_need_leave_the_bits_of_who_has_converged(on_device):
    points, q, r = problems(12, 128, seed=9)
    fixed = solved(points, q, r)
    on_device()
    assert all(map(torch.equal, fixed, solved(points, q, r)))  # the same if the rounds end early
    easy = torch.cat([q[:2], r[2:]]), torch.cat([r[:2], r[2:]])  # ten of the problems between a row and itself
    assert all(torch.equal(one[:2], other[:2]) for one, other in zip(fixed, solved(points, *easy), strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_host_never_waits(on_device, kind):
    points, q, r = (tensor.to(kind) for tensor in problems(3, 16, seed=2))
    with Launches() as launches:
        solved(points, q, r)
    assert launches.kernels["entropic_transport"] == 0  # inside of it
    assert launches.kernels["_linalg_solve_ex"] == transport.ROUNDS
    assert not launches.waits
    assert not launches.unordered
    on_device()
    with Launches() as launches:
        solved(points, q, r)
    assert launches.waits  # on the CPU the rounds end early, elsewhere not
    assert transport._may_look(points)
    assert not transport._may_look(points.to("meta"))


def test_there_are_rounds_to_spare(monkeypatch):
    found = {}
    for rounds in (transport.ROUNDS - 8, transport.ROUNDS):
        monkeypatch.setattr(transport, "ROUNDS", rounds)
        cases = [(bins, epsilon) for bins in (16, 64) for epsilon in (1e-4, PAPER)]
        found[rounds] = [solved(*problems(60, bins, seed=bins), epsilon) for bins, epsilon in cases]
    for less, more in zip(*found.values(), strict=True):
        assert all(map(torch.equal, less, more))


def test_rows_stand_for_the_distributions_they_are_proportional_to():
    points, q, r = problems(4, 16, seed=3, kinds=["spread"])
    scales = torch.tensor([[3.0], [0.1], [1.0], [20.0]], dtype=torch.float64)
    expected = entropic_transport(points, q, r, 5e-3)
    torch.testing.assert_close(entropic_transport(points, scales * q, r / scales, 5e-3), expected, rtol=1e-12, atol=0)
    floored = entropic_transport(points, scales * q, r, 5e-3, floor=0.01)
    expected = entropic_transport(points, (q + 0.01) / 1.16, (r + 0.01) / 1.16, 5e-3)
    torch.testing.assert_close(floored, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_gradients_of_rows_of_any_sum_and_of_rows_that_go_round(floor):
    random = torch.Generator().manual_seed(6)
    q = (0.1 + torch.rand(2, 3, 6, generator=random, dtype=torch.float64)).requires_grad_()
    r = (0.1 + torch.rand(1, 3, 6, generator=random, dtype=torch.float64)).requires_grad_()
    x = torch.rand(6, generator=random, dtype=torch.float64).sort()[0].requires_grad_()
    weights = torch.tensor([[1.0, -0.5, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)

    def costs(q, r, x):
        return entropic_transport(x, q, r, 0.01, weights, floor)

    assert torch.autograd.gradcheck(costs, (q, r, x), eps=1e-7)
    own = entropic_transport(x, q, r.expand(2, 3, 6), 0.01, None, floor)
    torch.testing.assert_close(costs(q, r, x), weights * own, rtol=1e-13, atol=0)


def test_a_row_of_zeros_is_uniform_and_has_no_gradient():
    points, q, r = problems(2, 16, seed=3)
    uniform = torch.full_like(q[:1], 1 / 16)
    empty = torch.zeros_like(uniform).requires_grad_()
    value = entropic_transport(points, empty, r[:1], PAPER, floor=FLOOR)
    value.sum().backward()
    torch.testing.assert_close(value, entropic_transport(points, uniform, r[:1], PAPER), rtol=1e-10, atol=0)
    assert empty.grad.eq(0).all()


def test_weight_zero_leaves_a_problem_out_whatever_it_holds():
    points, q, r = problems(3, 32, seed=1)
    weights = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    plain, strange = q.clone().requires_grad_(), q.clone()
    strange[1, 3:] = torch.nan
    strange.requires_grad_(), points.requires_grad_()
    found = entropic_transport(points, strange, r, PAPER, weights)
    found.sum().backward()
    along = points.grad.clone()
    points.grad = None
    expected = entropic_transport(points, plain, r, PAPER, weights)
    expected.sum().backward()
    assert found[1] == 0
    assert strange.grad[1].eq(0).all()
    assert all(map(torch.equal, (found, strange.grad, along), (expected, plain.grad, points.grad)))


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
    original = DistributionAlignment._from_sums

    def misprinted(self, *summary):
        points, q, classes, counts = original(self, *summary)
        return points, q, classes[:, [1, 1]], counts

    monkeypatch.setattr(DistributionAlignment, "_from_sums", misprinted)
    wrong = by_parts(build("grid"), whole, features[:, :2], weights, (17,))
    assert abs(wrong - right) > 1e-6


def test_densities():
    points = grid(64, torch.zeros((), dtype=torch.float64))
    # Mirror images keep the mass: as much in the whole interval, wherever the prediction lies.
    mass = kernels(torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64), mirrored(points), 0.05).sum(1)
    torch.testing.assert_close(mass, mass[1].expand(3), rtol=1e-6, atol=0)


def test_gradients_of_densities_against_finite_differences():
    points = mirrored(grid(12, torch.zeros((), dtype=torch.float64)))
    p = torch.tensor([0.0, 0.2, 0.5, 0.97], dtype=torch.float64, requires_grad=True)
    own = torch.tensor([0.03, 0.1, 0.2, 0.3], dtype=torch.float64)[:, None, None]
    assert torch.autograd.gradcheck(lambda p: kernels(p, points, 0.1), (p,))
    assert torch.autograd.gradcheck(lambda p: kernels(p, points, own), (p,))
    rows = [kernels(p[i : i + 1], points, own[i].item())[0] for i in range(4)]
    torch.testing.assert_close(kernels(p, points, own), torch.stack(rows), rtol=1e-13, atol=0)


def test_bandwidths_of_sets():
    """Of none, of one, of two, of tied ones, of all, of some: those of the reference, which sorts lists."""
    random = torch.Generator().manual_seed(5)
    p = torch.rand(40, generator=random, dtype=torch.float64).sort()[0]
    p[10:14] = p[10]
    members = torch.rand(9, 40, generator=random) < 0.4
    members[0], members[1], members[2], members[3], members[4] = False, False, False, False, True
    members[1, 7], members[2, [3, 39]], members[3, 10:14] = True, True, True
    found = silverman(p, members, 128)
    assert found[[0, 1, 3]].eq(1 / 128).all()
    expected = torch.tensor([reference.silverman(p[one], 128) for one in members[1:]], dtype=torch.float64)
    torch.testing.assert_close(found[1:], expected, rtol=1e-12, atol=0)
    assert found[2] == 0.2
    assert (found[4:] < 0.2).all()
