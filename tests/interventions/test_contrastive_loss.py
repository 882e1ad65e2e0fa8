"""The contrastive loss against loops over samples: any split, real ranks, planted bugs; fp64, 1e-10. And its draws."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dist_fair.errors import DistFairError
from dist_fair.interventions.base import registered
from dist_fair.interventions.contrastive_loss import ContrastiveLoss
from dist_fair.interventions.triplets import triplets
from dist_fair.keyed_rows import mixed, uniform
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
from tests.interventions.forgery_worlds import (
    CONTRASTIVE,
    GLOBAL,
    KINDS,
    LOCAL,
    SIZE,
    TRIPLETS,
    Forgery,
    batch,
    build,
    index,
    naive,
    step,
)

TERM = "contrastive"


def by_parts(case, whole, images, sizes=(SIZE,), model=None):
    model, loss, ones = model or Forgery(), build(case), torch.ones(len(images))
    summaries = [loss.summarise(model(images[rows]), whole.rows(rows, sizes), ones[rows]) for rows in parts(sizes)]
    return loss.objective(combine(summaries))[TERM]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TRIPLETS)
def test_any_split_equals_the_loops(case, kind):
    whole, images = batch(kind)
    for sizes in SPLITS:
        truth = value_and_gradient(lambda x, s=sizes: naive(case, whole, Forgery()(x), s)[0], images)
        found = value_and_gradient(lambda x, s=sizes: by_parts(case, whole, x, s), images)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10, msg=lambda m, s=sizes: f"split {s}: {m}")
        empty = kind in ("no fakes", "no reals") or case in LOCAL
        assert empty or truth[1].abs().max() > 1e-3  # there is something to get wrong


@pytest.mark.parametrize("kind", ["no fakes", "no reals"])
@pytest.mark.parametrize("case", TRIPLETS)
def test_without_the_other_half_it_is_zero_with_zero_gradients(case, kind):
    whole, images = batch(kind)
    value, gradient = value_and_gradient(lambda x: by_parts(case, whole, x), images)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("case", GLOBAL)
def test_the_order_of_the_samples_changes_nothing(case):
    whole, images = batch()
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    found = by_parts(case, whole.rows(order, (SIZE,)), images[order])
    torch.testing.assert_close(found, by_parts(case, whole, images), rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", ["contrastive", "self pairs"])
def test_finite_differences(case):
    whole, images = batch()
    assert torch.autograd.gradcheck(lambda x: by_parts(case, whole, x, (5, 12)), images.requires_grad_())


def test_single_precision_is_close_and_has_the_same_triplets():
    whole, images = batch()

    class Single(Forgery):
        def forward(self, images):
            outputs = super().forward(images.double())
            outputs.extras = {name: extra.float() for name, extra in outputs.extras.items()}
            return outputs

    truth = value_and_gradient(lambda x: by_parts("contrastive", whole, x), images)
    single = value_and_gradient(lambda x: by_parts("contrastive", whole, x, model=Single()), images)
    torch.testing.assert_close(single, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TRIPLETS)
def test_the_host_never_waits(case):
    whole, images = batch()
    outputs, loss = Forgery()(images), build(case)
    with Watched() as watched:
        loss.objective(combine([loss.summarise(outputs, whole, torch.ones(SIZE))]))[TERM].backward()
    assert "sort" in str(watched.seen)
    assert not watched.waits


# Triplets ------------------------------------------------------------------------------------------------------------


@st.composite
def halves(draw):
    """Labels, classes (of fakes 1, 2, 3 or -1), draws with ties, and whether samples may be their own positives."""
    rows = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 3).filter(bool), *[st.integers(0, 4)] * 2)))
    labels, kinds, *numbers = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return labels, torch.where(labels == 1, kinds, 0), torch.stack(numbers, dim=1) / 4, draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(halves())
def test_positives_are_others_of_the_class_and_negatives_of_the_other_half(made):
    labels, codes, draws, self_pairs = made
    positives, negatives, there = triplets(labels, codes, draws, 4, self_pairs)
    anchors = there.nonzero()[:, 0]
    assert (labels[negatives[there]] != labels[there]).all()
    assert (codes[positives[there]] == codes[there]).all()
    assert self_pairs or (positives[there] != anchors).all()
    for code in range(4):
        members = (codes == code).nonzero()[:, 0]
        others = labels != (code > 0)
        expected = len(members) >= (1 if self_pairs else 2) and others.any()
        assert there[members].eq(bool(expected)).all()
        if expected:
            assert sorted(positives[members].tolist()) == members.tolist()  # each is a positive once
            assert self_pairs or _circle(members[0].item(), positives) == len(members)
    assert not there[codes < 0].any()


def _circle(start, positives):
    """How many steps it takes to come back."""
    row, steps = positives[start].item(), 1
    while row != start:
        row, steps = positives[row].item(), steps + 1
    return steps


@settings(max_examples=100, deadline=None)
@given(halves())
def test_negatives_are_used_evenly(made):
    labels, _, draws, _ = made
    _, negatives, there = triplets(labels, labels, draws, 2, self_pairs=True)
    for label in (0, 1):
        used = torch.bincount(negatives[there & (labels == label)], minlength=len(labels))[labels != label]
        assert not len(used) or used.max() - used.min() <= 1


@pytest.mark.parametrize("self_pairs", [False, True])
def test_every_choice_is_as_likely(self_pairs):
    """Of 4 reals and 5 fakes, over 1,000 epochs; four standard deviations are 60 at most."""
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 1])
    near, far = torch.zeros(9, 9), torch.zeros(9, 9)
    for epoch in range(1000):
        draws = uniform(mixed(torch.arange(9), epoch), 2)
        positives, negatives, _ = triplets(labels, labels, draws, 2, self_pairs)
        near[torch.arange(9), positives] += 1
        far[torch.arange(9), negatives] += 1
    own, sizes = labels[:, None] == labels, torch.tensor([4, 5])[labels][:, None]
    chosen = own if self_pairs else own & ~torch.eye(9, dtype=torch.bool)
    assert (near - 1000 * chosen / (sizes if self_pairs else sizes - 1)).abs().max() < 60
    assert (far - 1000 * ~own / (9 - sizes)).abs().max() < 60


def test_triplets_change_with_the_keys_and_differ_between_spaces():
    whole, images = batch()
    rows = {space: part.rows for space, part in build("contrastive").summarise(Forgery()(images), whole, None).items()}
    assert not torch.equal(rows["shared"][:, 2:4], rows["specific"][:, 2:4])
    assert torch.equal(rows["shared"][:, 2:4].float().double(), rows["shared"][:, 2:4])  # exact in fp32
    value = by_parts("contrastive", whole, images)
    whole.keys.copy_(mixed(whole.keys, 1))
    assert abs(by_parts("contrastive", whole, images) - value) > 1e-3


# Ranks ---------------------------------------------------------------------------------------------------------------


@functools.cache
def truth(case, kind, sizes):
    whole, images = batch(kind)
    model = Forgery()
    return value_and_gradients(naive(case, whole, model(images), sizes)[0], model)


def comparison(sizes):
    def compare(answers, case, kind):
        value, gradients = truth(case, kind, sizes)
        for found, found_gradients, _ in answers:
            assert found[TERM] == pytest.approx(value, rel=1e-10, abs=1e-12)
            compare_gradients(found_gradients, gradients)

    return compare


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradients_do_not_depend_on_the_ranks(world):
    """With scope=local they do: the reference knows the sizes."""
    for case, answers in on_ranks(step, [(case, kind) for case in TRIPLETS for kind in KINDS], SIZES[world]):
        comparison(SIZES[world] if case[0] in LOCAL else (SIZE,))(answers, *case)


FEW = ["contrastive", "without specific", "self pairs"]


@pytest.mark.parametrize(
    ("bug", "cases", "kind"),
    [
        ("no_factor", [*FEW, *LOCAL], "usual"),
        ("times_world", [*FEW, *LOCAL], "usual"),
        ("over_world", [*FEW, *LOCAL], "usual"),
        ("detached", [*FEW, *LOCAL], "usual"),
        ("local", [*FEW, *LOCAL], "usual"),
        ("local_number", LOCAL, "usual"),
        ("local_triplets", FEW, "usual"),
        ("rank_draws", [*FEW, *LOCAL], "usual"),
        ("place_draws", FEW, "usual"),
        ("one_end", [*FEW, *LOCAL], "usual"),
        ("reversed_ranks", FEW, "usual"),
        ("reversed_ranks", FEW, "repeated"),
        ("other_order", FEW, "repeated"),
        ("with_self", ["contrastive", "without specific", "local"], "usual"),
        ("unknown_is_a_class", ["contrastive", "self pairs", "local"], "usual"),
    ],
)
def test_planted_bugs_are_caught(bug, cases, kind):
    for case, answers in on_ranks(step, [(case, kind) for case in cases], UNEVEN, bug):
        caught(comparison(UNEVEN if case[0] in LOCAL else (SIZE,)), answers, case)


def test_numbers_on_the_wire():
    """In fp64 here: features of 5 and 3 numbers, and 4 for each space. Of a local scope four or two pairs of sums."""
    cases = [(case, "unknown") for case in ("contrastive", "without specific", "local")]
    (_, both), (_, one), (_, local) = on_ranks(step, cases, (9, 8))
    assert [answer[2] for answer in both] == [{"summaries/gather": (1, rows * 16 * 8)} for rows in (9, 8)]
    assert [answer[2] for answer in one] == [{"summaries/gather": (1, rows * 9 * 8)} for rows in (9, 8)]
    assert [answer[2] for answer in local] == [{"summaries/sum": (1, 8 * 8)}] * 2


# Settings ------------------------------------------------------------------------------------------------------------


def test_settings_are_a_structured_config():
    kind = registered()[CONTRASTIVE].Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"weight": -1.0}, "weight="),
        ({"margin": 0.0}, "margin=0.0: above 0"),
        ({"margin": float("nan")}, "margin=nan: above 0"),
        ({"scope": "rank"}, "scope=rank: one of global, local"),
    ],
)
def test_wrong_values_are_named(chosen, message):
    with pytest.raises(DistFairError, match=message):
        build((CONTRASTIVE, chosen))


def test_it_asks_for_what_it_reads():
    kind = ContrastiveLoss.Settings
    assert ContrastiveLoss.needs(kind(), index()) == {"shared": 0, "specific": 0}
    assert ContrastiveLoss.needs(kind(specific=False), index(())) == {"shared": 0}
    with pytest.raises(DistFairError, match=r"name no manipulation.*set interventions\.contrastive_loss\.specific=f"):
        ContrastiveLoss.needs(kind(), index(()))
    assert build("without specific", index(())).reads == ("shared",)
