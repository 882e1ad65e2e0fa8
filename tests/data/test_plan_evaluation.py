"""The evaluation plan: every sample exactly once, in canonical order, proven by a hash that knows no order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fair.data.hashing import consumed_hash, expected_hash, uniforms
from dist_fair.data.plan import EvaluationPlan
from dist_fair.errors import DistFairError


def wrapped_sum(hashes):
    """What an all-reduce of int64 does."""
    with np.errstate(over="ignore"):
        return int(np.array(hashes, dtype=np.int64).sum())


def read_everything(count, batch_size, world):
    """Rows in the order in which gathers in rank order give them, padding dropped, and each rank's hash."""
    plans = [EvaluationPlan(count, batch_size, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    rows = [plan[step].samples for step in range(len(plans[0])) for plan in plans]
    assert {len(part) for part in rows} == {plans[0].sizes[0]}
    hashes = [wrapped_sum([consumed_hash(plan[step].samples) for step in range(len(plan))]) for plan in plans]
    rows = np.concatenate(rows)
    return rows[rows >= 0], hashes


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 9))
def test_every_sample_once_in_canonical_order(count, batch_size, world):
    rows, hashes = read_everything(count, batch_size, world)
    np.testing.assert_array_equal(rows, np.arange(count))
    assert wrapped_sum(hashes) == expected_hash(count)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9))
def test_duplicated_by_padding(count, world):
    """accelerate #575, #952, DistributedSampler: the last batch is filled with samples that were read before."""
    rows, _ = read_everything(count, 16, world)
    padded = np.resize(rows, -(-count // world) * world)
    assert (consumed_hash(padded) == expected_hash(count)) == (len(padded) == count)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 500), st.data())
def test_the_hash_sees_one_sample_lost_doubled_or_exchanged(count, data):
    rows = np.arange(count)
    lost, other = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))
    assert consumed_hash(np.delete(rows, lost)) != expected_hash(count)
    assert consumed_hash(np.append(rows, lost)) != expected_hash(count)
    exchanged = np.where(rows == lost, other, rows)
    assert (consumed_hash(exchanged) == expected_hash(count)) == (lost == other)


def test_hash_ignores_order_and_padding():
    rows = np.array([5, -1, 0, 3, -1])
    assert consumed_hash(rows) == consumed_hash(np.array([0, 3, 5]))
    assert -(2**63) <= expected_hash(1000) < 2**63


def test_more_ranks_than_samples():
    rows, hashes = read_everything(3, 8, 8)
    assert rows.tolist() == [0, 1, 2]
    assert hashes[7] == 0


def test_the_end_is_the_end():
    plan = EvaluationPlan(10, 4)
    assert len(plan) == 3
    with pytest.raises(IndexError):
        plan[3]
    with pytest.raises(DistFairError, match=r"evaluation.batch_size=0"):
        EvaluationPlan(10, 0)


def test_uniform_numbers_depend_on_key_epoch_and_sample_alone():
    samples, epochs = np.arange(2000), np.arange(2000) % 3
    table = uniforms(samples, epochs, 11, 7, "augment")
    np.testing.assert_array_equal(uniforms(samples[99:100], epochs[99:100], 11, 7, "augment"), table[99:100])
    np.testing.assert_array_equal(uniforms(samples[::-1], epochs[::-1], 11, 7, "augment"), table[::-1])
    for other in (uniforms(samples, epochs + 1, 11, 7, "augment"), uniforms(samples, epochs, 11, 8, "augment")):
        assert (other != table).all()
    assert table.min() >= 0
    assert table.max() < 1
    assert len(np.unique(table)) == table.size
    np.testing.assert_allclose(table.mean(axis=0), 0.5, atol=0.03)  # 4.6 standard errors
    correlation = np.corrcoef(np.hstack([table[:-1], table[1:]]).T) - np.eye(22)
    assert abs(correlation).max() < 0.11  # 4.9 standard errors, columns and neighbouring samples
