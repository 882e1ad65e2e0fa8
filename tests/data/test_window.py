"""A micro-batches joined are the batch that a plan with A times the batch gives, row by row and on every rank."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fair.data.index import Column
from dist_fair.data.loading import training_loader
from dist_fair.data.plan import TapeSpec, TrainingPlan, divisors
from dist_fair.data.window import Window, canonical_order, paired
from tests.data.making import bare_index


def made_index(sizes, labels=None):
    manipulations = Column(("a", "b", "c"), (np.arange(sum(sizes)) % 4 - 1).astype(np.int32))
    return replace(bare_index(sizes, labels), manipulations=manipulations)


@st.composite
def plans(draw):
    """The same tapes, shares, lanes and window twice: A and a plan of micro-batches, and one of A times the batch."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    count = sum(sizes)
    labels = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    tapes = [TapeSpec("all")]
    if {*labels} == {0, 1} and draw(st.booleans()):
        tapes = [TapeSpec("real", 0, draw(st.integers(1, 3))), TapeSpec("fake", 1, draw(st.integers(1, 3)))]
    smallest = min(labels.count(0), labels.count(1)) if len(tapes) == 2 else count
    lanes = draw(st.integers(1, min(8, smallest)))
    parts = draw(st.integers(2, 5))
    batch = lanes * sum(tape.share for tape in tapes) * draw(st.integers(1, 3))
    index = made_index(sizes, labels)
    rest = {"lanes": lanes, "window": draw(st.integers(1, 20)), "seed": draw(st.integers(0, 9))}
    return parts, TrainingPlan(index, tapes, batch, **rest), TrainingPlan(index, tapes, batch * parts, **rest)


def loaded(plan, rank, world, first, last):
    """Batches as training loads them; an image is (row, epoch, row * epoch)."""

    def read(samples, epochs):
        images = np.stack([samples, epochs, samples * epochs], axis=1).reshape(-1, 3, 1, 1)
        return SimpleNamespace(images=images, samples=samples, bad=[])

    return [*training_loader(plan, SimpleNamespace(index=plan.index, read=read), rank, world, first, last)]


def joined(parts, plan, rank, world, step, order=canonical_order):
    batches = loaded(plan, rank, world, step * parts, (step + 1) * parts)
    return Window(batches, order(plan, parts, world)).merged()


def same(one, other):
    """Whether two batches agree in every field, to the bit and in type."""
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            left, right = {"": left}, {"": right}
        if not isinstance(left, dict):
            if left != right:
                return False
        elif left.keys() != right.keys() or not all(
            torch.equal(value, right[name]) and value.dtype == right[name].dtype for name, value in left.items()
        ):
            return False
    return True


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 20))
def test_joined_micro_batches_are_the_larger_batch_on_every_rank(made, step):
    parts, small, large = made
    for world in divisors(small.lanes):
        for rank in range(world):
            (whole,) = loaded(large, rank, world, step, step + 1)
            assert same(joined(parts, small, rank, world, step), whole)
            assert paired(small) == paired(large)


def as_read(plan, count, world):
    """Micro-batch after micro-batch."""
    return torch.arange(count * plan.batch_size // world)


def without_tapes(plan, count, world):
    """Lane after lane, but inside a lane by micro-batch and not by tape."""
    rows = torch.arange(count * plan.batch_size // world)
    return rows.view(count, plan.lanes // world, -1).swapaxes(0, 1).reshape(-1)


def inverted(plan, count, world):
    """Where each row goes, in place of which row comes where."""
    return canonical_order(plan, count, world).argsort()


@pytest.mark.parametrize("order", [as_read, without_tapes, inverted])
def test_another_order_is_noticed(order):
    tapes, index = [TapeSpec("real", 0), TapeSpec("fake", 1, 2)], made_index([40, 40])
    small, large = (TrainingPlan(index, tapes, size, lanes=2) for size in (12, 36))
    (whole,) = loaded(large, 0, 1, 1, 2)
    assert same(joined(3, small, 0, 1, 1), whole)
    found = joined(3, small, 0, 1, 1, order)
    assert not same(found, whole)
    assert {*found.samples.tolist()} == {*whole.samples.tolist()}


def test_one_micro_batch_is_itself():
    plan = TrainingPlan(bare_index([20]), [TapeSpec("all")], 8, lanes=2)
    (batch,) = loaded(plan, 0, 1, 3, 4)
    assert Window([batch]).merged() is batch
    assert same(Window([batch], canonical_order(plan, 1, 1)).merged(), batch)


def test_another_number_of_lanes_gives_other_samples():
    """Why data.lanes belongs to the recipe: left to the plan, it depends on the size of a micro-batch."""
    index = bare_index([40, 40])
    small, large = TrainingPlan(index, [TapeSpec("all")], 8), TrainingPlan(index, [TapeSpec("all")], 16)
    assert (small.lanes, large.lanes) == (8, 16)
    (whole,) = loaded(large, 0, 1, 0, 1)
    assert {*joined(2, small, 0, 1, 0).samples.tolist()} != {*whole.samples.tolist()}
