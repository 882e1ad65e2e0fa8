"""Batches on their device: packed, pinned, moved by two copies, in time, and normalised to the same bits everywhere."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory

from dist_fair.data import prefetching
from dist_fair.data.batch import Batch, Packed, normalised
from dist_fair.data.loading import Scoring, evaluation_loader
from dist_fair.data.prefetching import prefetched
from dist_fair.data.reading import Reader
from dist_fair.demographics import Groups
from tests.data.making import encoded, made_index, picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GARBAGE = 77  # what lies where a copy has not arrived yet


def packed(position=0, rows=6, side=5):
    """A batch that differs with its position."""
    random = np.random.default_rng([position, rows])
    images = torch.from_numpy(random.integers(0, 256, (rows, side, side, 3), dtype=np.uint8))
    columns = torch.from_numpy(random.integers(-1, 2, (7, rows)))
    columns[3] = columns[3] >= 0
    return Packed(images, columns, ("gender", "race"), (rows,), position)


def assert_same(one: Batch, other: Batch):
    """Bits, types and strides."""
    assert (one.sizes, one.position, [*one.attributes]) == (other.sizes, other.position, [*other.attributes])
    for left, right in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(left.cpu(), right.cpu())
        assert (left.dtype, left.stride()) == (right.dtype, right.stride())


def tensors(batch):
    columns = [getattr(batch, name) for name in ("images", "labels", "manipulations", "samples", "valid", "keys")]
    return [*columns, *batch.attributes.values()]


def plain(packages):
    """What the batches are on the CPU, without any of this."""
    return [package.batch().normalised(MEAN, STD) for package in packages]


class Dispatched(TorchDispatchMode):
    """The operations that reach a device, by name, with their keyword arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((str(function), kwargs or {}))
        return function(*args, **kwargs or {})

    def names(self):
        return [name for name, _ in self.calls]


# What a batch is made of --------------------------------------------------------------------------------------------


def test_columns_are_views_of_one_tensor():
    package = packed()
    batch = package.batch()
    rows = [batch.labels, batch.manipulations, batch.samples, batch.valid, batch.keys, *batch.attributes.values()]
    assert torch.equal(torch.stack([row.long() for row in rows]), package.columns)
    assert batch.valid.dtype == torch.bool
    where = {row.untyped_storage().data_ptr() for row in rows if row.dtype == torch.int64}
    assert where == {package.columns.untyped_storage().data_ptr()}


@pytest.mark.parametrize(("rows", "side"), [(6, 5), (1, 4), (3, 1), (0, 4)])
def test_normalised_to_the_bits_of_the_formula_where_the_bytes_lie(rows, side):
    images = packed(rows=rows, side=side).images
    shift, scale = (torch.tensor(row, dtype=torch.float32).view(1, 3, 1, 1) for row in (MEAN, STD))
    expected = (images.permute(0, 3, 1, 2).float().div_(255) - shift) / scale
    found = normalised(images, list(MEAN), STD)
    assert torch.equal(found, expected)
    assert (found.dtype, found.stride()) == (torch.float32, expected.stride())
    assert rows == 0 or found.is_contiguous(memory_format=torch.channels_last)


def test_every_byte_is_normalised_by_its_channel_in_single_precision():
    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 3)
    found = normalised(images, MEAN, STD).view(256, 3).numpy()
    shift, scale = np.float32(MEAN), np.float32(STD)
    assert np.array_equal(found, (np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - shift) / scale)


def test_two_copies_and_three_kernels_make_a_batch():
    """The constants are made once: from the host, they would be copies to wait for. The comparison is of `valid`."""
    packages = [packed()]
    list(prefetched(packages, "meta", MEAN, STD))
    with Dispatched() as seen:
        list(prefetched(packages, "meta", MEAN, STD))
    copies = [kwargs["non_blocking"] for name, kwargs in seen.calls if "copy" in name]
    assert copies == [True, True]
    views = {"aten.permute.default", "aten.unbind.int", "aten._to_copy.default"}
    kernels = ["aten.ne.Scalar", "aten.div.Tensor", "aten.sub_.Tensor", "aten.div_.Tensor"]
    assert [name for name in seen.names() if name not in views] == kernels


def test_the_groups_of_a_batch_are_made_once_and_never_those_of_another():
    batch, groups = packed().batch(), Groups(("gender", "race"), (("a", "b"), ("c", "d")))
    expected = groups.codes(batch.attributes)
    with Dispatched() as seen:
        codes = batch.codes(groups)
        once = len(seen.calls)
        assert batch.codes(Groups(groups.attributes, groups.values)) is codes
    assert len(seen.calls) == once > 0
    assert torch.equal(codes, expected)
    assert torch.equal(batch.codes(Groups(("gender",), (("a", "b"),))), batch.attributes["gender"])
    some = torch.tensor([4, 1])
    for other in (batch.rows(some, (2,)), batch.rows(slice(1, 4), (3,)), batch.to("cpu"), batch.normalised(MEAN, STD)):
        assert torch.equal(other.codes(groups), groups.codes(other.attributes))
    assert batch.to("meta").codes(groups).is_meta


# Pinned --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return made_index(tmp_path_factory.mktemp("faces"), [encoded(picture(i)) for i in range(20)])


@pytest.fixture
def pins(monkeypatch):
    """Where what was pinned lies: pinned tensors are copies, as real ones."""
    found = set()

    def pin(tensor):
        made = tensor.clone()
        found.add(made.data_ptr())
        return made

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return found


def test_torch_pins_all_that_travels(index, pins):
    """Anything else would be copied from pageable memory, for which the host waits."""
    loader = evaluation_loader(Reader(index, 8), 16, 0, 1)
    items = [pin_memory(loader._loader.dataset[position]) for position in range(len(loader))]
    assert len(pins) == 2 * len(items) == 4
    for item in items:
        assert {item.batch.images.data_ptr(), item.batch.columns.data_ptr()} <= pins
    for item, expected in zip(items, loader, strict=True):
        assert_same(item.batch.batch(), expected)


def test_scoring_data_for_a_gpu_are_pinned(index, pins, monkeypatch):
    sent = []
    monkeypatch.setattr("dist_fair.data.loading.prefetched", lambda batches, *_: sent.extend(batches) or iter(()))
    for device, count in (("cpu", 0), ("cuda", 6)):
        Scoring(Reader(index, 8), 0, 1, torch.device(device), MEAN, STD).batches(5, 3, "a")
        assert len(pins) == count
    assert {tensor.data_ptr() for one in sent[3:] for tensor in (one.images, one.columns)} <= pins


# In time: on a made-up GPU ------------------------------------------------------------------------------------------


class Stream:
    """Does what it is given when somebody waits for it; the main stream at once."""

    def __init__(self, main=False):
        self.main, self.waiting, self.given, self.done = main, [], 0, 0

    def give(self, work):
        self.waiting.append(work)
        self.given += 1
        if self.main:
            self.run(self.given)

    def run(self, count):
        while self.done < count:
            self.waiting.pop(0)()
            self.done += 1

    def record_event(self):
        return SimpleNamespace(stream=self, count=self.given)

    def wait_event(self, event):
        event.stream.run(event.count)

    def wait_stream(self, stream):
        stream.run(stream.given)


class MadeUpGpu(TorchFunctionMode):
    """A "cuda" in the host's memory whose copies happen as late as the real ones may.

    streams: all but `main`. kept: by address, what was told to be in use on the main stream.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.main, self.streams, self.kept, self.copies = Stream(main=True), [], {}, 0
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "Stream", self._made)
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.keep(tensor, stream))

    def _made(self, device):
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def _entered(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and torch.device(args[1]).type == "cuda":
            return self._copy(args[0])
        return function(*args, **kwargs or {})

    def keep(self, tensor, stream):
        assert stream is self.main
        self.kept[tensor.data_ptr()] = tensor

    def _copy(self, source):
        there = torch.full_like(source, GARBAGE)
        self.copies += 1
        self.current.give(lambda: there.copy_(source))
        return there


@pytest.fixture
def made_up(monkeypatch):
    prefetching._side_stream.cache_clear()
    with MadeUpGpu(monkeypatch) as device:
        yield device
    prefetching._side_stream.cache_clear()


def assert_in_time(gpu):
    """The copies of the next batch are begun before it is asked for, and nobody waits for them; those of the batch at
    hand are done, and their memory is kept for it."""
    packages = [packed(position) for position in range(5)]
    stream, expected = prefetched(packages, "cuda", MEAN, STD), plain(packages)
    for number in range(5):
        batch = next(stream)
        (side,) = gpu.streams
        assert_same(batch, expected[number])
        assert side.done == 2 * (number + 1)
        assert side.given == gpu.copies == 2 * min(number + 2, 5)
        assert len(gpu.kept) == 2 * (number + 1)
    assert next(stream, None) is None


def test_the_next_batch_is_copied_while_one_is_in_use(made_up):
    assert_in_time(made_up)


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (Stream, "wait_event", lambda self, event: None),
        (Stream, "wait_event", lambda self, event: self.wait_stream(event.stream)),
        (Stream, "record_event", lambda self: SimpleNamespace(stream=self, count=max(0, self.given - 2))),
        (MadeUpGpu, "keep", lambda self, tensor, stream: None),
        (torch.cuda, "stream", lambda stream: nullcontext()),
        ("dist_fair.data.prefetching", "AHEAD", 0),
    ],
    ids=["no_wait", "waits_for_all", "event_before_the_copies", "memory_not_kept", "on_the_main_stream", "not_ahead"],
)
def test_planted_bugs_of_streams_are_seen(made_up, monkeypatch, owner, name, bug):
    monkeypatch.setattr(*([f"{owner}.{name}", bug] if isinstance(owner, str) else [owner, name, bug]))
    with pytest.raises(AssertionError):
        assert_in_time(made_up)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_later_batch_raises_does_not_hide_those_before_it(made_up, device):
    def failing():
        yield from map(packed, range(3))
        raise ValueError("the fourth")

    found = []
    with pytest.raises(ValueError, match="the fourth"):
        found.extend(prefetched(failing(), device, MEAN, STD))
    for batch, expected in zip(found, plain(map(packed, range(3))), strict=True):
        assert_same(batch, expected)


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_slow_device_gets_every_batch_whole_and_the_host_never_waits():
    """Each batch is dropped as soon as its use is launched, behind 2 ms of other work: copies that came into its
    memory, or after its use, would change the sums."""
    packages = [packed(position, rows=32, side=64) for position in range(50)]
    pinned = [package.pin_memory() for package in packages]
    list(prefetched(pinned[:3], "cuda", MEAN, STD))  # constants, and the memory that the others use again
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in prefetched(iter(pinned), "cuda", MEAN, STD):
            torch.cuda._sleep(4_000_000)
            sums.append(torch.stack([tensor.double().sum() for tensor in tensors(batch)]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [torch.stack([tensor.double().sum() for tensor in tensors(batch)]) for batch in plain(packages)]
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected), rtol=1e-12, atol=1e-7)


@pytest.mark.gpu
def test_a_gpu_normalises_to_the_bits_of_the_cpu():
    packages = [packed(position, rows=8, side=64) for position in range(3)]
    for batch, expected in zip(prefetched(packages, "cuda", MEAN, STD), plain(packages), strict=True):
        assert batch.images.is_cuda
        assert_same(batch, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_pins_what_goes_to_a_gpu(index, workers):
    loader = evaluation_loader(Reader(index, 8), 16, 0, 1, workers, "cuda")
    for package in loader.packed():
        assert package.images.is_pinned()
        assert package.columns.is_pinned()
    for batch, expected in zip(prefetched(loader.packed(), "cuda", MEAN, STD), loader, strict=True):
        assert_same(batch, expected.normalised(MEAN, STD))
