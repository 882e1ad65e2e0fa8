"""The training plan: the same global batches on any number of ranks, each sample once an epoch, resume for free.

`naive_part` is what a per-rank sampler does (shuffle, then stride over ranks, drop the tail). The checks are functions
of "a part", so that the last tests can show each of them failing on it.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fair import keyed
from dist_fair.data.plan import Selection, TapeSpec, TrainingPlan, default_lanes, divisors
from tests.data.making import bare_index

REAL_FAKE = [TapeSpec("real", label=0), TapeSpec("fake", label=1)]


@st.composite
def plans(draw):
    """Any plan: 1 to 6 shards (some without samples of a tape), 1 or 2 tapes with shares, any lanes, any window."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    labels = draw(st.lists(st.integers(0, 1), min_size=sum(sizes), max_size=sum(sizes)))
    labels[0] = 0
    paired = draw(st.booleans()) and 1 in labels
    tapes = [TapeSpec("all")]
    if paired:
        tapes = [TapeSpec("real", 0, draw(st.integers(1, 3))), TapeSpec("fake", 1, draw(st.integers(1, 3)))]
    smallest = min(labels.count(0), labels.count(1)) if paired else len(labels)
    lanes = draw(st.integers(1, min(8, smallest)))
    batch = lanes * sum(tape.share for tape in tapes) * draw(st.integers(1, 5))
    return TrainingPlan(
        bare_index(sizes, labels), tapes, batch, lanes, window=draw(st.integers(1, 30)), seed=draw(st.integers(0, 9))
    )


def assert_same_global_batches(plan, part, steps, worlds):
    for step in steps:
        whole = part(plan, step, 0, 1)
        for world in worlds:
            parts = [part(plan, step, rank, world) for rank in range(world)]
            assert {len(one) for one in parts} == {plan.batch_size // world}
            np.testing.assert_array_equal(np.concatenate([one.samples for one in parts]), whole.samples)
            np.testing.assert_array_equal(np.concatenate([one.epochs for one in parts]), whole.epochs)


def assert_each_sample_once(plan, part, steps, world):
    """In the first `steps` steps every pair (sample, epoch) comes at most once, and finished epochs are complete."""
    seen = Counter()
    for step in range(steps):
        for rank in range(world):
            chosen = part(plan, step, rank, world)
            seen.update(zip(chosen.samples.tolist(), chosen.epochs.tolist(), strict=True))
    assert max(seen.values()) == 1
    return seen


def plan_part(plan, step, rank, world):
    return plan.part(step, rank, world)


def naive_part(plan, step, rank, world):
    """A shuffled sampler per rank: strided, tail dropped, reshuffled only if somebody calls set_epoch (nobody does)."""
    own = keyed.permutation(len(plan.index), plan.seed)[rank::world]
    local = plan.batch_size // world
    start = step % max(1, len(own) // local) * local
    samples = own[start : start + local]
    return Selection(samples, np.full(len(samples), step // max(1, len(own) // local)))


@settings(max_examples=100, deadline=None)
@given(plans(), st.lists(st.integers(0, 400), min_size=1, max_size=4))
def test_parts_of_the_ranks_make_the_global_batch_for_every_world(plan, steps):
    assert_same_global_batches(plan, plan_part, steps, divisors(plan.lanes))


@settings(max_examples=100, deadline=None)
@given(plans())
def test_every_lane_epoch_holds_each_sample_once(plan):
    """Multiset over whole lane epochs: after enough steps for two epochs of the longest lane, both are complete."""
    longest = max(-(-len(tape) // plan.lanes) for tape in plan._tapes)
    shortest = min(tape.per_lane for tape in plan._tapes)
    seen = assert_each_sample_once(plan, plan_part, -(-2 * longest // shortest), 1)
    expected = set(plan.samples.tolist())
    for epoch in (0, 1):
        assert {sample for sample, at in seen if at == epoch} == expected


@settings(max_examples=60, deadline=None)
@given(plans())
def test_steps_per_epoch_is_enough_to_read_every_sample(plan):
    read = np.concatenate([plan[step].samples for step in range(plan.steps_per_epoch)])
    assert set(read.tolist()) == set(plan.samples.tolist())


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 60), st.integers(1, 40))
def test_resume_equals_no_interruption(plan, start, skipped):
    fresh = TrainingPlan(plan.index, plan.specs, plan.batch_size, plan.lanes, plan.window, plan.seed)
    worlds = divisors(plan.lanes)
    for step in range(start):  # the first plan has gone all the way, on one rank
        plan.part(step, 0, 1)
    for step in range(start, start + 3 * skipped, skipped):  # the fresh one starts here, on the most ranks, and jumps
        parts = [fresh.part(step, rank, worlds[-1]).samples for rank in range(worlds[-1])]
        np.testing.assert_array_equal(np.concatenate(parts), plan[step].samples)


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(0, 50))
def test_rows_have_their_tape_s_label_lane_after_lane(plan, step):
    labels = plan.index.labels[plan[step].samples].reshape(plan.lanes, -1)
    if len(plan.specs) == 2:
        real, fake = (part // plan.lanes for part in plan.parts)
        assert (labels == [0] * real + [1] * fake).all()


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_if_the_batch_divides_the_data_an_epoch_of_steps_holds_each_sample_once(lanes, per_lane, steps, shards):
    count = lanes * per_lane * steps
    plan = TrainingPlan(bare_index(_cut(count, shards)), [TapeSpec("all")],
                        lanes * per_lane, lanes, window=7)  # fmt: skip
    assert plan.steps_per_epoch == steps
    for epoch in range(2):
        read = np.concatenate([plan[epoch * steps + step].samples for step in range(steps)])
        assert sorted(read.tolist()) == list(range(count))


def _cut(count, shards):
    return [len(part) for part in np.array_split(np.arange(count), shards)]


def test_the_definition_word_for_word():
    """The plan against its definition written with loops over samples."""
    index, lanes, window, seed, batch = bare_index([7, 1, 20, 9]), 3, 4, 5, 6
    plan = TrainingPlan(index, [TapeSpec("all")], batch, lanes, window, seed)

    def segment(lane, epoch):
        tape = [int(row) for shard in keyed.permutation(4, seed, "all", "shards", epoch)
                for row in np.flatnonzero(index.shard == shard)]  # fmt: skip
        positions = tape[lane * 37 // lanes : (lane + 1) * 37 // lanes]
        result = []
        for number, start in enumerate(range(0, len(positions), window)):
            piece = positions[start : start + window]
            result += [piece[i] for i in keyed.permutation(len(piece), seed, "all", "window", epoch, lane, number)]
        return result

    streams = [[(row, epoch) for epoch in range(4) for row in segment(lane, epoch)] for lane in range(lanes)]
    for step in range(20):
        expected = [pair for stream in streams for pair in stream[step * 2 : step * 2 + 2]]
        assert list(zip(plan[step].samples.tolist(), plan[step].epochs.tolist(), strict=True)) == expected


def test_a_plan_written_down():
    """Fails when any release of anything changes the order of the data: then resumed runs would differ."""
    plan = TrainingPlan(bare_index([8, 8]), REAL_FAKE, 8, lanes=2, window=4, seed=1)
    assert plan[0].samples.tolist() == [6, 4, 13, 9, 12, 14, 1, 3]
    assert plan[5].samples.tolist() == [12, 8, 5, 3, 4, 0, 9, 13]


def test_seeds_and_epochs_differ():
    index = bare_index([50] * 4)
    one, other = (TrainingPlan(index, [TapeSpec("all")], 40, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one[0].samples, other[0].samples)
    assert not np.array_equal(one[0].samples, one[5].samples)  # 5 steps an epoch: the same place, an epoch later


def test_shares_and_filters():
    index = bare_index([60, 60])
    plan = TrainingPlan(index, [TapeSpec("women", 1, 3, {"gender": "female"}), TapeSpec("real", 0, 1)], 32)
    assert plan.parts == (24, 8)
    assert plan.lanes == 8
    chosen = plan[3].samples.reshape(8, 4)
    assert (index.labels[chosen] == [1, 1, 1, 0]).all()
    assert (index.attributes["gender"].codes[chosen[:, :3]] == 0).all()
    assert "tape women: 30 samples, 24 a micro-batch" in plan.describe()


def test_frequencies_are_how_often_samples_are_drawn():
    index = bare_index([10, 14], labels=[0] * 16 + [1] * 8)
    tapes = [TapeSpec("real", 0, share=1), TapeSpec("fake", 1, share=3)]
    plan = TrainingPlan(index, tapes, 16, lanes=4, window=3, seed=1)
    drawn = np.bincount(np.concatenate([plan[t].samples for t in range(40)]), minlength=24)
    np.testing.assert_array_equal(drawn, 40 * 16 * plan.frequencies)  # 10 epochs of the reals, 60 of the fakes
    reals = TrainingPlan(index, tapes[:1], 4).frequencies
    np.testing.assert_array_equal(reals, np.where(np.arange(24) < 16, 1 / 16, 0))


def test_default_lanes():
    assert default_lanes([64], [1000]) == 64
    assert default_lanes([256], [1000]) == 64
    assert default_lanes([96], [1000]) == 48
    assert default_lanes([16, 24], [1000, 1000]) == 8
    assert default_lanes([64], [5]) == 4
    assert default_lanes([7], [1]) == 1


# Regression tests: what is known to go wrong elsewhere -------------------------------------------------------------


def test_fewer_shards_than_ranks():
    """webdataset #65, #225, #364: a rank without a shard starves, and the others hang."""
    plan = TrainingPlan(bare_index([64]), [TapeSpec("all")], 16, lanes=16)
    assert_same_global_batches(plan, plan_part, range(8), [1, 2, 4, 8, 16])


def test_no_set_epoch_needed():
    """ms-swift PR #9902: without set_epoch a distributed sampler repeats the first epoch's order."""
    plan = TrainingPlan(bare_index([16] * 4), [TapeSpec("all")], 16, lanes=4)
    epochs = [np.concatenate([plan[4 * epoch + step].samples for step in range(4)]).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert {tuple(sorted(order)) for order in epochs} == {tuple(range(64))}


def test_the_tail_is_not_dropped():
    """drop_last leaves samples out of an epoch: 37 samples, batches of 6."""
    plan = TrainingPlan(bare_index([20, 17]), [TapeSpec("all")], 6, lanes=3)
    seen = assert_each_sample_once(plan, plan_part, 37, 3)
    counts = Counter(epoch for _, epoch in seen)
    assert counts.total() == 37 * 6  # lanes of 12, 12 and 13 samples: the long one is still in epoch 5
    assert [counts[epoch] for epoch in range(7)] == [37, 37, 37, 37, 37, 33, 4]


def test_nothing_is_duplicated_by_padding():
    """DistributedSampler and even_batches repeat the first samples to fill the last batch."""
    plan = TrainingPlan(bare_index([13]), [TapeSpec("all")], 8, lanes=4)
    assert_each_sample_once(plan, plan_part, 13, 4)


def test_resume_with_another_world_reads_the_same_data():
    """torchtitan's and energon's loaders refuse a resume with another number of ranks."""
    index = bare_index([100, 31])
    before = TrainingPlan(index, REAL_FAKE, 16, lanes=4)
    after = TrainingPlan(index, REAL_FAKE, 16, lanes=4)
    reference = TrainingPlan(index, REAL_FAKE, 16, lanes=4)
    for step in range(40):
        plan, world = (before, 4) if step < 17 else (after, 2)
        rows = np.concatenate([plan.part(step, rank, world).samples for rank in range(world)])
        np.testing.assert_array_equal(rows, reference[step].samples)


def test_the_plan_travels_to_spawned_workers():
    import pickle

    plan = TrainingPlan(bare_index([30]), REAL_FAKE, 8)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(plan))[3].samples, plan[3].samples)


# The checks above can fail -------------------------------------------------------------------------------------------


def test_planted_per_rank_sampler_gives_other_global_batches():
    plan = TrainingPlan(bare_index([32, 32]), [TapeSpec("all")], 8, lanes=4)
    with pytest.raises(AssertionError):
        assert_same_global_batches(plan, naive_part, range(4), [2])


def test_planted_dropped_tail_and_missing_set_epoch_are_seen():
    plan = TrainingPlan(bare_index([37]), [TapeSpec("all")], 6, lanes=3)
    seen = assert_each_sample_once(plan, naive_part, 12, 1)
    with pytest.raises(AssertionError):
        assert Counter(epoch for _, epoch in seen)[0] == 37
    first, second = (naive_part(plan, step, 0, 1).samples.tolist() for step in (0, 6))
    assert first == second  # what test_no_set_epoch_needed forbids


def test_planted_rank_in_the_key_is_seen():
    """A window permuted by a generator of the rank instead of the lane."""

    def per_rank(plan, step, rank, world):
        part = plan.part(step, rank, world)
        order = keyed.permutation(len(part), plan.seed, step, rank)
        return Selection(part.samples[order], part.epochs[order])

    plan = TrainingPlan(bare_index([32, 32]), [TapeSpec("all")], 8, lanes=4)
    with pytest.raises(AssertionError):
        assert_same_global_batches(plan, per_rank, range(4), [2])
