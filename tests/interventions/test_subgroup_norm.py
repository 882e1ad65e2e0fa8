"""Subgroup norm: naive loops over samples as the reference, real ranks, planted bugs; fp64, 1e-10 unless said."""

import functools
import math

import pytest
import torch
from omegaconf import OmegaConf

from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError
from dist_fair.interventions.subgroup_norm import SubgroupNorm
from tests.interventions.cases import batch
from tests.interventions.subgroup_norm_reference import naive_evaluation, naive_track, naive_train, naive_transform
from tests.interventions.subgroup_norm_worlds import (
    BUFFERS,
    BUGS,
    SIZE,
    STEPS,
    build,
    index,
    step_batch,
    train,
    train_each,
    train_with_each,
)
from tests.ranks import run_ranks

SETTINGS = [
    {},
    {"minimum": 1, "epsilon": 0.1},
    {"minimum": 3, "attributes": ["race"], "momentum": 0.4, "inference": "group"},
    {"attributes": ["gender"], "detach": True, "inference": "none"},
]
SIZES = {1: (23,), 2: (20, 3), 3: (12, 0, 11), 4: (1, 9, 0, 13)}


@functools.cache
def truth(number):
    return naive_train(SETTINGS[number])


def differences(ranks, expected):
    """The names of results that differ from the whole batch's by more than 1e-10."""
    found = set()
    for name, value in expected.items():
        rows = name.startswith(("outputs", "inputs"))
        actual = [torch.cat([rank[name] for rank in ranks])] if rows else [rank[name] for rank in ranks]
        if not all(torch.allclose(one, value.detach(), rtol=1e-10, atol=1e-10) for one in actual):
            found.add(name)
    return found


# Levels 1 and 2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_equals_the_loops(number):
    expected = truth(number)
    assert differences([train(Communicator(), SETTINGS[number], (SIZE,))], expected) == set()
    assert all(
        expected[f"{name} 0"].abs().max() > 1e-3 for name in ("outputs", "inputs", "before")
    )  # it says something


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_does_not_depend_on_the_ranks(world):
    ranks = run_ranks(world, train_each, SETTINGS, SIZES[world])
    for number in range(len(SETTINGS)):
        answers = [rank[number] for rank in ranks]
        assert differences(answers, truth(number)) == set(), SETTINGS[number]
        for name in (f"{buffer} {step}" for buffer in BUFFERS for step in range(len(STEPS))):
            assert all(torch.equal(answer[name], answers[0][name]) for answer in answers)  # to the bit


CAUGHT = {
    "local_moments": "outputs",
    "local_counts": "outputs",
    "no_gradient": "before",
    "local_gradient": "before",
    "replicated": "before",
    "times_world": "before",
    "over_world": "before",
    "own_running_moments": "running_variance",
    "double_update": "running_count",
}


def test_planted_bugs_are_found():
    assert CAUGHT.keys() == BUGS.keys() - {"nothing"}
    bugs = [*CAUGHT, "nothing"]
    ranks = run_ranks(3, train_with_each, bugs, {}, SIZES[3])
    for number, bug in enumerate(bugs):
        found = {name.split()[0] for name in differences([rank[number] for rank in ranks], truth(0))}
        assert CAUGHT[bug] in found if bug in CAUGHT else not found, bug
        if CAUGHT.get(bug) == "before":
            assert found == {"before", "inputs"}  # nothing else would tell


@pytest.mark.parametrize("minimum", [1, 8])
def test_gradients_by_finite_differences(minimum):
    whole, features, _ = batch(9)
    norm = build({"minimum": minimum, "epsilon": 0.01}, width=4)
    assert torch.autograd.gradcheck(lambda h: norm.transform(h, whole, Communicator()), features.requires_grad_())


# Small groups, small batches ------------------------------------------------------------------------------------------


def gradient_norms(settings):
    """Of the lone member of female/Asian, and the mean over all others."""
    whole, features, _ = batch(64)
    h, norm = features.requires_grad_(), build(settings, width=4)
    random = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (norm.transform(h, whole, Communicator()) * random).sum().backward()
    return h.grad[0].norm().item(), h.grad[1:].norm(dim=1).mean().item()


@pytest.mark.parametrize("detach", [False, True])
def test_a_lone_member_has_a_gradient_like_the_others(detach):
    alone, others = gradient_norms({"detach": detach})
    assert 0.5 < alone / others < 2
    # Raw moments: 1 / sqrt(eps), or nothing but what comes through the samples of unknown group.
    alone, others = gradient_norms({"detach": detach, "minimum": 1})
    assert alone / others > 100 if detach else alone / others < 0.1


def test_a_lone_member_far_out_stays_within_the_bound():
    whole, features, _ = batch(64)
    features[0] *= 1e6
    found = build({}, width=4).transform(features, whole, Communicator())[0].abs()
    assert (found < math.sqrt(7)).all()
    assert (found > 2.4).all()


@pytest.mark.parametrize(("size", "factor"), [(1, 1.0), (9, 0.0)])
@pytest.mark.parametrize("settings", [{}, {"minimum": 0}, {"detach": True}])
def test_batches_without_variance(size, factor, settings):
    whole, features, _ = batch(size)
    h, norm = (factor * features).requires_grad_(), build(settings, width=4)
    for _ in range(2):
        found = norm.transform(h, whole, Communicator())
        found.sum().backward()
    assert torch.equal(found, torch.zeros_like(found))
    assert h.grad.isfinite().all()
    assert norm.eval().transform(h, whole, Communicator()).isfinite().all()


def test_no_row_anywhere():
    whole, features, _ = batch(3)
    norm = build({}, width=4)
    h = features[:0].requires_grad_()
    norm.transform(h, whole.rows(slice(0, 0), (0,)), Communicator()).sum().backward()
    assert h.grad.shape == (0, 4)
    assert not norm.running_count.any()
    assert norm.running_mean.isfinite().all()


# Precision ------------------------------------------------------------------------------------------------------------


def far_from_zero(wire=torch.float64):
    """Largest errors of outputs and gradients in steps 1 and 2; features fp32 with mean 1e4, standard deviation 1."""
    whole, _, _ = batch(64)
    random = torch.Generator().manual_seed(2)
    h = torch.randn(64, 16, generator=random) + 1e4
    upstream = torch.randn(64, 16, generator=random)
    comm, exact = Communicator(), h.double().requires_grad_()
    expected = naive_transform(exact, whole.attributes, SubgroupNorm.Settings())
    expected.backward(upstream.double())
    reduce, errors = comm._reduce, []
    comm._reduce = lambda tensor, *rest: reduce(tensor.to(wire), *rest).to(tensor.dtype)
    norm = build({}, width=16)
    for _ in range(2):
        single = h.clone().requires_grad_()
        found = norm.transform(single, whole, comm)
        found.backward(upstream)
        assert found.dtype == single.grad.dtype == torch.float32
        errors.append([(found - expected).abs().max().item(), (single.grad - exact.grad).abs().max().item()])
    return torch.tensor(errors)


def test_mean_far_from_zero_in_single_precision():
    assert (far_from_zero() < 1e-6).all()
    assert (far_from_zero(torch.float32)[0] > 0.01).all()  # what fp32 sums would give


def test_never_less_than_single_precision():
    whole, features, _ = batch(SIZE)
    half = features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = build({}, width=4).transform(half, whole, Communicator())
    assert found.dtype == torch.float32
    assert torch.equal(found, build({}, width=4).transform(half.float(), whole, Communicator()))


# State, evaluation, wire, settings ------------------------------------------------------------------------------------


def test_a_checkpoint_holds_all_there_is():
    first, second = build({}, width=4), build({}, width=4)
    for step in range(2):
        whole, features, _ = step_batch(step)
        first.transform(features, whole, Communicator())
    second.frequencies.zero_()
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    whole, features, _ = step_batch(3)
    for _ in range(2):
        answers = [norm.transform(features, whole, Communicator()) for norm in (first, second)]
        assert torch.equal(*answers)
        assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())
        first.eval(), second.eval()


@pytest.mark.parametrize("inference", ["mixture", "group", "none"])
def test_evaluation(inference):
    norm, settings = build({"inference": inference}, width=4), SubgroupNorm.Settings(inference=inference)
    whole, features, _ = step_batch(3)
    untrained = norm.eval().transform(features, whole, Communicator())
    identity = features if inference == "none" else features / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(untrained, identity, rtol=1e-12, atol=1e-12)
    populations = [[] for _ in norm.groups.names]
    for step in range(3):
        trained, h, _ = step_batch(step)
        norm.train().transform(h, trained, Communicator())
        naive_track(populations, h, trained.attributes, settings)
    assert [len(population) > 0 for population in populations].count(False) == 1
    # A member of the group that was never seen, male/Black; others of unknown group.
    whole.attributes["gender"][1], whole.attributes["race"][1] = 1, 1
    state, comm = {name: tensor.clone() for name, tensor in norm.state_dict().items()}, Communicator()
    found = norm.eval().transform(features, whole, comm)
    expected = naive_evaluation(populations, features, whole.attributes, settings)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not comm.counts
    assert all(torch.equal(tensor, state[name]) for name, tensor in norm.state_dict().items())


@pytest.mark.parametrize("inference", ["mixture", "none"])
def test_evaluation_reads_no_attribute(inference):
    whole, features, _ = batch(SIZE)
    norm = build({"inference": inference}, width=4)
    norm.transform(features, whole, Communicator())
    norm.eval()
    whole.attributes.clear()
    assert norm.transform(features, whole, Communicator()).shape == features.shape


@pytest.mark.parametrize("detach", [False, True])
def test_bytes_depend_on_groups_and_width_alone(detach):
    for size in (5, 40):
        whole, features, _ = batch(size)
        comm = Communicator()
        build({"detach": detach}, width=4).transform(features.requires_grad_(), whole, comm).sum().backward()
        counts = {name: (count.calls, count.bytes) for name, count in comm.drain().items()}
        once = (1, 8 * (6 + 1) * (2 * 4 + 1))
        assert counts == {"subgroup_norm": once} | ({} if detach else {"subgroup_norm/backward": once})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"minimum": -1}, "minimum=-1"),
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"momentum": 1.1}, "momentum=1.1"),
        ({"inference": "mixed"}, "inference=mixed"),
        ({"inference": "none", "momentum": 0.2}, "momentum=0.2: without effect"),
        ({"attributes": ["age"]}, "attribute 'age'"),
        ({"attributes": []}, "attributes="),
    ],
)
def test_wrong_settings_are_named(settings, text):
    with pytest.raises(DistFairError, match=text):
        build(settings)


def test_settings_are_a_structured_config():
    kind = SubgroupNorm.Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()


def test_a_plan_without_any_known_group_is_refused(monkeypatch):
    codes, frequencies = index()
    codes["race"][:] = -1
    monkeypatch.setattr("tests.interventions.subgroup_norm_worlds.index", lambda: (codes, frequencies))
    with pytest.raises(DistFairError, match="no training sample has a known value"):
        build({})
