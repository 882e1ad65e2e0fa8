"""Low-rank projection against loops over entries; which form of the loss, which initialisation, which errors; fp64."""

import pytest
import torch
from omegaconf import OmegaConf

from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError
from tests.interventions import reference_daid
from tests.interventions.daid_worlds import batch
from tests.interventions.daid_worlds import build as build_any

D, RANK = 7, 3


def build(rank=RANK, features=D, **settings):
    return build_any({"rank": rank, **settings}, "low_rank_projection", features=features)


def moved(**settings):
    """A projection away from its start, in fp64."""
    torch.manual_seed(3)
    projection = build(**settings).double()
    with torch.no_grad():
        projection.basis.add_(0.3 * torch.randn(D, RANK))
    return projection


def orthogonality(projection):
    assert projection.summarise(None, None, None) == {}
    return projection.objective({})["orthogonality"]


def gradient(value, parameter):
    return torch.autograd.grad(value, parameter)[0]


@pytest.mark.parametrize("reduction", ["frobenius", "mean"])
def test_the_loss_is_the_sum_or_mean_over_entries(reduction):
    projection = moved(reduction=reduction)
    naive = reference_daid.orthogonality(projection.basis) / (1 if reduction == "frobenius" else RANK**2)
    found = orthogonality(projection)
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(found, projection.basis), gradient(naive, projection.basis))


def test_the_printed_form_is_larger_by_a_constant():
    projection = moved()
    printed, found = reference_daid.orthogonality(projection.basis, printed=True), orthogonality(projection)
    assert printed.item() == pytest.approx(found.item() + D - RANK, rel=1e-12)
    expected = gradient(printed, projection.basis)
    torch.testing.assert_close(gradient(found, projection.basis), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_features_are_projected_sample_by_sample(hard, normalise):
    projection = moved(normalise=normalise, **({"hard": True, "weight": 0.0} if hard else {}))
    whole, _ = batch()
    features = torch.randn(len(whole), D, dtype=torch.float64)
    features[4] = 0
    features.requires_grad_()
    found = projection.transform(features, whole, Communicator())
    naive = reference_daid.project(features, projection.directions(), normalise)
    naive = torch.stack([torch.stack(row) for row in naive])
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=1e-12)
    up, wanted = torch.randn_like(found), (features, projection.basis)
    gradients = torch.autograd.grad((found * up).sum(), wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad((naive * up).sum(), wanted), rtol=1e-10, atol=1e-10)
    assert projection.width == found.shape[1] == RANK


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("hard", [False, True])
def test_the_start_is_orthonormal_and_comes_from_the_global_generator(rank, hard):
    settings = {"hard": True, "weight": 0.0} if hard else {}
    torch.manual_seed(5)
    one = build(rank, **settings)
    torch.manual_seed(5)
    other = build(rank, **settings)
    assert torch.equal(one.basis, other.basis)
    assert not torch.equal(one.basis, build(rank, **settings).basis)
    assert list(one.state_dict()) == ["basis"]
    assert orthogonality(one).item() < 1e-11
    torch.testing.assert_close(one.directions(), one.basis, rtol=0, atol=1e-6)


def test_hard_directions_stay_orthonormal_under_training_and_weight_decay():
    projection = build(hard=True, weight=0.0).double()
    optimizer = torch.optim.AdamW(projection.parameters(), lr=0.05, weight_decay=0.1)
    target = torch.randn(D, RANK, dtype=torch.float64)
    before = projection.directions().detach()
    for _ in range(50):
        optimizer.zero_grad()
        last = projection.directions()
        (last * target).sum().backward()
        optimizer.step()
        after = projection.directions()
        assert orthogonality(projection).item() < 1e-25
        assert (after * last).sum(0).min() > 0.9  # no direction flips from one step to the next
    assert (after - before).abs().max() > 0.3


def test_the_hard_gradient_by_finite_differences():
    projection = moved(hard=True, weight=0.0)
    projection.forward = projection.directions
    start = projection.basis.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda basis: torch.func.functional_call(projection, {"basis": basis}), start)


def test_settings_are_a_structured_config():
    kind = type(build()).Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()
    assert (kind().weight, kind().reduction) == (0.2, "frobenius")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8}, "rank=8 is more than the 7 features"),
        ({"rank": 0}, "rank=0: at least 1"),
        ({"reduction": "sum"}, "reduction=sum: one of frobenius, mean"),
        ({"hard": True}, "hard=true, weight=0.2: .* set weight=0"),
        ({"weight": -0.1}, "weight=-0.1"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(DistFairError, match=message):
        build(**settings)
