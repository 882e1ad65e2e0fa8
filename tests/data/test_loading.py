"""Batches from end to end: the same on any number of ranks, workers and restarts; and errors that keep their text."""

import os
import signal
import socket
from multiprocessing import resource_sharer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_fair.data.hashing import consumed_hash, expected_hash
from dist_fair.data.loading import Loader, Scoring, evaluation_loader, training_loader
from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.data.reading import Reader
from dist_fair.errors import DistFairError
from tests.data.making import encoded, made_index, picture

TAPES = [TapeSpec("real", 0), TapeSpec("fake", 1)]
AUGMENTATION = SimpleNamespace(
    flip=0.5, shift=0.1, brightness=0.2, contrast=0.2, noise=0.05, blur=0.5, jpeg=0.5, jpeg_quality=[50, 95]
)
COUNT = 45


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return made_index(tmp_path_factory.mktemp("faces"), [encoded(picture(i)) for i in range(COUNT)], shards=3)


def loader(index, rank, world, start=0, stop=8, workers=0, policy="fail"):
    plan = TrainingPlan(index, TAPES, 16, lanes=8, window=4, seed=2)
    reader = Reader(index, 16, policy, seed=2)
    return training_loader(plan, reader, rank, world, start, stop, workers, AUGMENTATION)


def assert_equal(one, other):
    assert one.position == other.position
    for name in ("images", "labels", "samples", "valid", "manipulations", "keys"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.attributes.keys() == other.attributes.keys()
    assert all(torch.equal(one.attributes[name], other.attributes[name]) for name in one.attributes)


def joined(batches):
    """The global batch from the ranks' batches."""
    first = batches[0]
    fields = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("images", "labels", "samples", "valid", "manipulations", "keys")
    }
    attributes = {name: torch.cat([batch.attributes[name] for batch in batches]) for name in first.attributes}
    return SimpleNamespace(**fields, attributes=attributes, position=first.position)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_global_batch_knows_no_ranks(index, world):
    whole = list(loader(index, 0, 1))
    parts = [list(loader(index, rank, world)) for rank in range(world)]
    for expected, batches in zip(whole, zip(*parts, strict=True), strict=True):
        assert all(batch.sizes == (16 // world,) * world for batch in batches)
        assert_equal(joined(batches), expected)


def test_planted_augmentation_from_a_generator_per_rank_is_seen(index, monkeypatch):
    """Draws from a stream of the process instead of from the key: each process then has its own faces."""
    streams = {rank: np.random.default_rng(rank) for rank in range(2)}

    def batches(rank, world):
        monkeypatch.setattr(
            "dist_fair.data.loading.draws", lambda seed, epochs, samples: streams[rank].random((len(samples), 11))
        )
        return list(loader(index, rank, world, stop=2))

    whole, parts = batches(0, 1), [batches(rank, 2) for rank in range(2)]
    with pytest.raises(AssertionError, match="images"):
        assert_equal(joined([part[1] for part in parts]), whole[1])


def test_workers_and_restarts_change_nothing(index):
    expected = list(loader(index, 1, 2))
    for workers, start in ((2, 0), (1, 3), (0, 5)):
        again = loader(index, 1, 2, start=start, workers=workers)
        assert len(again) == 8 - start
        for one, other in zip(again, expected[start:], strict=True):
            assert_equal(one, other)


def test_workers_leave_the_global_random_numbers_alone(index):
    """DataLoader draws its seed from torch's global generator: a resumed run would drop out other units."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader(index, 0, 1, stop=2, workers=1))
    assert torch.equal(torch.rand(1), expected)


def test_a_sample_looks_different_in_every_epoch(index):
    plan = TrainingPlan(index, TAPES, 16, lanes=8, window=4, seed=2)
    seen = [
        (sample, epoch, image.numpy().tobytes())
        for batch in loader(index, 0, 1)
        for sample, epoch, image in zip(*vars(plan[batch.position]).values(), batch.images, strict=True)
    ]
    assert len({image for *_, image in seen}) == len({(sample, epoch) for sample, epoch, _ in seen}) == 8 * 16


def test_a_batch_says_what_the_index_says(index):
    for batch in loader(index, 0, 1, stop=4):
        rows = batch.samples.numpy()
        assert batch.images.shape == (16, 16, 16, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == index.labels[rows].tolist() == [0, 1] * 8
        assert batch.attributes["gender"].tolist() == index.attributes["gender"].codes[rows].tolist()
        assert batch.manipulations.tolist() == [-1] * 16
        assert batch.valid.all()
        assert {batch.labels.dtype, batch.attributes["gender"].dtype, batch.samples.dtype} == {torch.int64}


@pytest.mark.parametrize("world", [1, 2, 3, 8, 50])
def test_evaluation_reads_every_sample_once_on_any_world(index, world):
    loaders = [evaluation_loader(Reader(index, 24), 16, rank, world) for rank in range(world)]
    batches = [batch for together in zip(*loaders, strict=True) for batch in together]
    valid = torch.cat([batch.samples[batch.valid] for batch in batches])
    assert valid.tolist() == list(range(COUNT))
    hashes = np.array([consumed_hash(batch.samples.numpy()) for batch in batches])
    assert int(hashes.sum()) == expected_hash(COUNT)
    images = torch.cat([batch.images[batch.valid] for batch in batches])
    assert torch.equal(images, torch.from_numpy(Reader(index, 24).read(valid.numpy(), valid.numpy()).images))
    padding = torch.cat([batch.attributes["gender"][~batch.valid] for batch in batches])
    assert (padding == -1).all()


# Bad samples and errors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Sample 5, a fake woman, is broken."""
    images = [b"broken" if i == 5 else encoded(picture(i)) for i in range(COUNT)]
    return made_index(tmp_path_factory.mktemp("damaged"), images)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_keeps_its_text_and_its_step(damaged, workers):
    plan = TrainingPlan(damaged, TAPES, 16, lanes=8, window=4, seed=2)
    first = next(step for step in range(8) if 5 in plan[step].samples)
    passed = []
    with pytest.raises(DistFairError, match=r"^bad sample 0005 in ") as error:
        passed.extend(batch.position for batch in loader(damaged, 0, 1, workers=workers))
    assert passed == list(range(first))
    assert "Traceback" not in str(error.value)
    assert "DataLoader" not in str(error.value)


@pytest.mark.parametrize("world", [1, 4])
def test_substitutes_are_the_same_on_any_world_and_reported(damaged, world):
    """Also what a batch says of a row is what its image shows, not what was planned."""
    loaders = [loader(damaged, rank, world, workers=rank % 2, policy="substitute") for rank in range(world)]
    batches = [batch for one in loaders for batch in one]
    bad = sorted(one for each in loaders for one in each.bad)
    assert [(one.sample, one.epoch) for one in bad] == [(5, 0), (5, 1), (5, 2)]
    assert not any(5 in batch.samples for batch in batches)
    reader = Reader(damaged, 16, "substitute", seed=2)
    assert [one.replacement for one in bad] == [
        reader.read(np.array([5]), np.array([epoch])).samples[0] for epoch in range(3)
    ]
    for one in bad:
        assert damaged.attributes["gender"].codes[one.replacement] == 0
        assert damaged.labels[one.replacement] == 1


def test_evaluation_never_scores_another_image_under_a_bad_sample_s_name(damaged):
    one = evaluation_loader(Reader(damaged, 16, "substitute"), 16, 0, 1)
    batches = list(one)
    assert sum(consumed_hash(batch.samples.numpy()) for batch in batches) % 2**64 == expected_hash(COUNT) % 2**64
    assert [batch.samples[~batch.valid].tolist() for batch in batches] == [[5], [], [-1, -1, -1]]
    assert [(bad.sample, bad.replacement) for bad in one.bad] == [(5, -1)]


def test_ranks_that_do_not_divide_the_lanes_are_refused_before_anything_is_read(index):
    with pytest.raises(DistFairError, match="3 ranks do not divide"):
        loader(index, 0, 3)


class _Dying(torch.utils.data.Dataset):
    sizes = (1,)

    def __init__(self, reader):
        self.reader = reader

    def __getitem__(self, position):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_named_with_a_remedy(index):
    with pytest.raises(DistFairError, match=r"a loading process died(.|\n)*data\.workers=1"):
        list(Loader(_Dying(Reader(index, 16)), range(2), 1, "cpu"))


class _Signalled(_Dying):
    def __getitem__(self, position):
        for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), name)
        raise DistFairError("survived")


def test_workers_leave_signals_to_the_training_process(index):
    """EgoVerse PR #621: workers inherit the handlers of the training process, and a preempted run saves twice."""
    calls, before = [], signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    try:
        with pytest.raises(DistFairError, match="survived"):
            list(Loader(_Signalled(Reader(index, 16)), range(1), 1, "cpu"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls == []


class _Left(_Dying):
    def __getitem__(self, position):
        """Somebody who comes for a tensor and goes without it, and then somebody who takes it."""
        tensor = resource_sharer.DupFd(0)
        with socket.socket(socket.AF_UNIX) as gone:
            gone.connect(tensor._id[0])
        os.close(tensor.detach())
        raise DistFairError("served")


def test_workers_say_nothing_of_a_training_process_that_is_interrupted_as_it_takes_a_batch(index, capfd):
    with pytest.raises(DistFairError, match="served"):
        list(Loader(_Left(Reader(index, 16)), range(1), 1, "cpu"))
    assert capfd.readouterr().err == ""


# Scoring data --------------------------------------------------------------------------------------------------------


def scored(index, world, *key, size=13):
    data = [Scoring(Reader(index, 16, seed=2), rank, world, "cpu", (0.5,) * 3, (0.5,) * 3) for rank in range(world)]
    return [list(together) for together in zip(*(one.batches(size, 3, *key) for one in data), strict=True)]


@pytest.mark.parametrize("world", [2, 3, 4, 16])
def test_scoring_batches_are_the_same_on_any_world(index, world):
    for (expected,), batches in zip(scored(index, 1, "a", 3), scored(index, world, "a", 3), strict=True):
        assert batches[0].sizes == tuple(len(batch) for batch in batches)
        assert max(batches[0].sizes) - min(batches[0].sizes) <= 1
        assert_equal(joined(batches), expected)
        assert len(set(expected.samples.tolist())) == 13


def test_scoring_batches_depend_on_the_key_and_are_not_augmented(index):
    one, other = scored(index, 1, "a", 3), scored(index, 1, "a", 4)
    assert one[0][0].samples.tolist() != other[0][0].samples.tolist()
    assert one[0][0].samples.tolist() != one[1][0].samples.tolist()
    batch = one[0][0]
    rows = batch.samples.numpy()
    images = torch.from_numpy(Reader(index, 16).read(rows, rows).images)
    torch.testing.assert_close(batch.images, images.permute(0, 3, 1, 2) / 127.5 - 1)


def test_scoring_stays_within_its_rows_and_refuses_more(index):
    rows = np.array([3, 8, 21])
    data = Scoring(Reader(index, 16), 0, 1, "cpu", (0.5,) * 3, (0.5,) * 3, rows)
    (batch,) = data.batches(3, 1)
    assert sorted(batch.samples.tolist()) == rows.tolist()
    with pytest.raises(DistFairError, match="a scoring batch of 4 samples: the training data has 3"):
        next(data.batches(4, 1))
