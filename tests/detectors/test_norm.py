"""Synced batch norm on W ranks is torch's on the whole batch: level 2 of the exactness tests, fp64, 1e-10."""

from contextlib import nullcontext

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors.norm import FrozenBatchNorm, SyncedBatchNorm, convert_norms
from dist_fair.errors import DistFairError
from tests.detectors import planted_norm_bugs
from tests.detectors.norm_worlds import IMAGES, LAYOUTS, differences, expected, gpu_kernels, maps, train
from tests.ranks import run_ranks

SIZES = {1: (6,), 2: (5, 3), 3: (4, 1, 3), 4: (1, 2, 2, 5)}  # rows per rank
EMPTY = {2: (0, 6), 3: (4, 0, 3), 4: (0, 5, 0, 2)}
KINDS = [("rows", "contiguous"), ("sequence", "contiguous")]
KINDS += [(kind, layout) for kind in ("images", "timm", "untracked", "volume") for layout in LAYOUTS]
WAYS = {"native": nullcontext, "gpu": gpu_kernels}


def train_each(comm, cases, sizes):
    """By either set of kernels."""
    found = {}
    for way, kernels in WAYS.items():
        with kernels():
            found[way] = [train(comm, *case, sizes, "synced") for case in cases]
    return found


def train_planted(comm, plant, cases, sizes):
    planted_norm_bugs.PLANTS[plant](comm)
    return train_each(comm, cases, sizes)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_torch_on_the_whole_batch(world):
    sizes = SIZES[world]
    ranks = run_ranks(world, train_each, KINDS, sizes)
    for position, case in enumerate(KINDS):
        whole = expected(*case, sum(sizes))
        for way in WAYS:
            assert differences([rank[way][position] for rank in ranks], whole) == set(), (way, *case)
        assert all(whole[name].abs().max() > 1e-4 for name in ("outputs", "inputs", "2.weight"))  # it says something


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_without_rows_take_part(world):
    """pytorch #36865, PR #74944: empty inputs."""
    cases = [("images", layout) for layout in LAYOUTS]
    ranks = run_ranks(world, train_each, cases, EMPTY[world])
    for position, case in enumerate(cases):
        for way in WAYS:
            found = [rank[way][position] for rank in ranks]
            assert differences(found, expected(*case, sum(EMPTY[world]))) == set(), (way, *case)


@pytest.mark.parametrize("plant", sorted(planted_norm_bugs.PLANTS))
def test_planted_bugs_are_found(plant):
    cases = [("images", layout) for layout in LAYOUTS]
    ranks = run_ranks(2, train_planted, plant, cases, (5, 3))
    for position, case in enumerate(cases):
        for way in WAYS:
            assert differences([rank[way][position] for rank in ranks], expected(*case, 8)), (way, *case)


def train_maps(comm, layout, channels):
    """Whether memory format and values survive, for a number of channels."""
    whole = maps(IMAGES, layout, 8, channels, seed=0)
    x = whole[comm.rank * 8 // comm.world : (comm.rank + 1) * 8 // comm.world].requires_grad_()
    y = convert_norms(nn.BatchNorm2d(channels).double(), "synced", comm)(x)
    y.backward(y.detach() ** 2)
    return y.detach(), x.grad, y.stride() == x.stride() == x.grad.stride()


def train_maps_each(comm, layout, channels):
    found = []
    for kernels in WAYS.values():
        with kernels():
            found.append(train_maps(comm, layout, channels))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 8, 20])
def test_memory_formats_with_any_number_of_channels(layout, channels):
    """apex and torch: channels_last wrong where C is no power of two."""
    norm, whole = nn.BatchNorm2d(channels).double(), maps(IMAGES, layout, 8, channels, seed=0).requires_grad_()
    y = norm(whole)
    y.backward(y.detach() ** 2)
    for found in zip(*run_ranks(2, train_maps_each, layout, channels), strict=True):
        torch.testing.assert_close(torch.cat([rank[0] for rank in found]), y.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.cat([rank[1] for rank in found]), whole.grad, rtol=1e-10, atol=1e-10)
        assert all(rank[2] for rank in found)


def far_from_zero(layout):
    torch.manual_seed(1)
    x = torch.randn(6, 3, 8, 8) + 1e4
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def normalise_far_from_zero(comm, layout, plant):
    if plant:
        planted_norm_bugs.single_precision_moments(comm)
    found = []
    for kernels in WAYS.values():
        module = convert_norms(nn.BatchNorm2d(3, momentum=1.0), "synced", comm)
        with kernels():
            y = module(far_from_zero(layout)[comm.rank * 3 : comm.rank * 3 + 3]).detach()
        found.append((y, module.running_var.double()))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plant", [False, True])
def test_mean_far_from_zero_in_single_precision(layout, plant):
    reference = nn.BatchNorm2d(3, momentum=1.0).double()
    expected = reference(far_from_zero(layout).double()).detach()
    for found in zip(*run_ranks(2, normalise_far_from_zero, layout, plant), strict=True):
        variance_error = (found[0][1] / reference.running_var - 1).abs().max()
        output_error = (torch.cat([rank[0] for rank in found]) - expected).abs().max()
        # fp32 has steps of 1e-3 at 1e4: local means are rounded by up to 5e-4, and so the variance between ranks.
        assert (variance_error < 5e-4 and output_error < 4e-3) != plant


def train_without_gradient(comm):
    module = convert_norms(nn.BatchNorm1d(2).double(), "synced", comm)
    x = torch.arange(8, dtype=torch.float64).view(4, 2)
    x = x[comm.rank * 4 // comm.world : (comm.rank + 1) * 4 // comm.world]
    with torch.no_grad():
        y = module(x)
    counts = {name: (count.calls, count.bytes) for name, count in comm.drain().items()}
    module(x.requires_grad_()).sum().backward()
    both = {name: count.calls for name, count in comm.drain().items()}
    module.eval()
    module(x)
    return y, module.running_mean, counts, both, dict(comm.drain())


@pytest.mark.parametrize("world", [1, 2])
def test_without_gradient_and_the_bytes_on_the_wire(world):
    """One rank has the global batch: it asks nobody."""
    expected, x = nn.BatchNorm1d(2).double(), torch.arange(8, dtype=torch.float64).view(4, 2)
    y = expected(x).detach()
    expected(x)
    ranks = run_ranks(world, train_without_gradient)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), y)
    for _, mean, counts, both, silent in ranks:
        torch.testing.assert_close(mean, expected.running_mean)
        assert counts == ({"norm/forward": (1, 5 * 8)} if world > 1 else {})
        assert both == ({"norm/forward": 1, "norm/backward": 1} if world > 1 else {})
        assert silent == {}


@pytest.mark.parametrize("mode", ["synced", "frozen"])
def test_conversion_keeps_names_values_and_what_follows_the_norm(mode):
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.ModuleDict({"inner": nn.BatchNorm2d(4)}))
    parameters = dict(plain.named_parameters())
    names = list(plain.state_dict())
    converted = convert_norms(plain, mode, Communicator())
    kind = SyncedBatchNorm if mode == "synced" else FrozenBatchNorm
    assert type(converted[1]) is type(converted[2]["inner"]) is kind
    assert list(converted.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in converted.named_parameters())
    assert (converted[1](torch.randn(2, 4, 3, 3)) >= 0).all()


def test_frozen_norms_keep_their_statistics_and_train_their_weights():
    module = convert_norms(nn.Sequential(nn.BatchNorm2d(3)), "frozen", Communicator())
    module[0].running_mean.fill_(2.0)
    module.train()
    x = torch.randn(4, 3, 5, 5)
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), (x - 2) / (1 + 1e-5) ** 0.5)
    assert module[0].running_mean.tolist() == [2.0] * 3
    assert module[0].weight.grad is not None


def test_local_changes_nothing_and_norms_without_batch_statistics_stay():
    norms = nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4))
    kinds = [type(layer) for layer in norms]
    assert [type(layer) for layer in convert_norms(norms, "synced", Communicator())] == kinds
    batch_norm = nn.BatchNorm2d(4)
    assert convert_norms(batch_norm, "local", Communicator()) is batch_norm


def test_a_norm_used_twice_stays_one_norm():
    norm = nn.BatchNorm2d(4)
    converted = convert_norms(nn.Sequential(norm, nn.ReLU(), norm), "synced", Communicator())
    assert converted[0] is converted[2]


def test_what_cannot_be_converted_is_an_error():
    with pytest.raises(DistFairError, match=r"layer '0' .*SyncBatchNorm"):
        convert_norms(nn.Sequential(nn.SyncBatchNorm(3)), "synced", Communicator())
    with pytest.raises(DistFairError, match="did you mean 'synced'"):
        convert_norms(nn.Sequential(), "sync", Communicator())
