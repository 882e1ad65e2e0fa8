"""Synced batch norm on W ranks is torch's on the whole batch: level 2 of the exactness tests, fp64, 1e-10."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors.norm import FrozenBatchNorm, SyncedBatchNorm, convert_norms
from dist_fair.errors import DistFairError
from tests.detectors import planted_norm_bugs
from tests.ranks import run_ranks

SIZES = {1: (6,), 2: (5, 3), 3: (4, 1, 3), 4: (1, 2, 2, 5)}  # rows per rank
EMPTY = {2: (0, 6), 3: (4, 0, 3), 4: (0, 5, 0, 2)}
CHANNELS = 5


def network(kind):
    """Norm, non-linearity, mixing, norm: a gradient through the second norm's statistics reaches the first."""
    torch.manual_seed(3)
    if kind == "rows":
        layers = [nn.BatchNorm1d(CHANNELS), nn.Tanh(), nn.Linear(CHANNELS, 4), nn.BatchNorm1d(4)]
    elif kind == "sequence":
        layers = [nn.BatchNorm1d(CHANNELS), nn.Tanh(), nn.Conv1d(CHANNELS, 4, 3), nn.BatchNorm1d(4, affine=False)]
    elif kind == "timm":
        layers = [BatchNormAct2d(CHANNELS, act_layer=nn.SiLU), nn.Conv2d(CHANNELS, 4, 3), BatchNormAct2d(4)]
    elif kind == "untracked":
        untracked = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
        layers = [untracked, nn.Tanh(), nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4, momentum=0.4)]
    else:
        layers = [nn.BatchNorm2d(CHANNELS), nn.Tanh(), nn.Conv2d(CHANNELS, 4, 3), nn.BatchNorm2d(4, momentum=None)]
    module = nn.Sequential(*layers).double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def images(kind, rows):
    shape = {"rows": (), "sequence": (6,)}.get(kind, (6, 5))
    torch.manual_seed(4)
    x = torch.randn(rows, CHANNELS, *shape, dtype=torch.float64) * torch.rand(CHANNELS, *[1] * len(shape)) + 2
    return x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x


def train(comm, kind, sizes, mode, steps=3):
    """Outputs, gradients and buffers of this rank after some steps of an objective that couples all rows."""
    module = convert_norms(network(kind), mode, comm)
    whole = images(kind, sum(sizes))
    start = sum(sizes[: comm.rank])
    for step in range(steps):
        x = (whole[start : start + sizes[comm.rank]] * (1 + step)).requires_grad_()
        module.zero_grad()
        y = module(x)
        coefficients = torch.linspace(-1, 1, y.shape[1:].numel(), dtype=torch.float64).view(y.shape[1:])
        means = comm.replicated_sum(((y + 0.3) ** 3 * coefficients).flatten(2 if y.ndim > 2 else 1).sum(0), "test")
        (means / len(whole)).square().sum().backward()
    return {
        "outputs": y.detach(),
        "inputs": x.grad / comm.world,  # the one gradient rule
        # DDP's average
        **{name: comm.sum(p.grad, "ddp") / comm.world for name, p in module.named_parameters()},
        **{f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()},
    }


def train_planted(comm, plant, *arguments):
    planted_norm_bugs.PLANTS[plant](comm)
    return train(comm, *arguments)


def differences(ranks, expected):
    """The names of results that differ from the whole batch's by more than 1e-10."""
    found = set()
    for name, value in expected.items():
        if name in ("outputs", "inputs"):
            actual = [torch.cat([rank[name] for rank in ranks])]
        else:
            actual = [rank[name] for rank in ranks]
        for tensor in actual:
            if not torch.allclose(tensor.double(), value.double(), rtol=1e-10, atol=1e-10):
                found.add(name)
    return found


def train_each(comm, kinds, sizes, mode):
    return [train(comm, kind, sizes, mode) for kind in kinds]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_torch_on_the_whole_batch(world):
    kinds, sizes = ["images", "channels_last", "rows", "sequence", "timm", "untracked"], SIZES[world]
    ranks = run_ranks(world, train_each, kinds, sizes, "synced")
    for position, kind in enumerate(kinds):
        expected = train(Communicator(), kind, (sum(sizes),), "local")
        assert differences([rank[position] for rank in ranks], expected) == set(), kind
        assert all(expected[name].abs().max() > 1e-4 for name in ("outputs", "inputs", "0.weight"))  # it says something


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_without_rows_take_part(world):
    """pytorch #36865, PR #74944: empty inputs."""
    expected = train(Communicator(), "images", (sum(EMPTY[world]),), "local")
    assert differences(run_ranks(world, train, "images", EMPTY[world], "synced"), expected) == set()


@pytest.mark.parametrize("plant", sorted(planted_norm_bugs.PLANTS))
def test_planted_bugs_are_found(plant):
    expected = train(Communicator(), "images", (8,), "local")
    assert differences(run_ranks(2, train_planted, plant, "images", (5, 3), "synced"), expected)


def train_channels_last(comm, channels):
    """Whether memory format and values survive, for a number of channels."""
    torch.manual_seed(0)
    whole = torch.randn(8, channels, 4, 4, dtype=torch.float64)
    rows = slice(comm.rank * 8 // comm.world, (comm.rank + 1) * 8 // comm.world)
    x = whole[rows].contiguous(memory_format=torch.channels_last).requires_grad_()
    y = convert_norms(nn.BatchNorm2d(channels).double(), "synced", comm)(x)
    y.backward(y.detach() ** 2)
    return y.detach(), x.grad, y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [3, 8, 20])
def test_channels_last_with_any_number_of_channels(channels):
    """apex and torch: channels_last wrong where C is no power of two."""
    (expected, gradient, _), *_ = [train_channels_last(Communicator(), channels)]
    ranks = run_ranks(2, train_channels_last, channels)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), gradient, rtol=1e-10, atol=1e-10)
    assert all(rank[2] for rank in ranks)


def normalise_far_from_zero(comm, plant):
    if plant:
        planted_norm_bugs.single_precision_moments(comm)
    torch.manual_seed(1)
    x = (torch.randn(6, 3, 8, 8) + 1e4)[comm.rank * 3 : comm.rank * 3 + 3]
    module = convert_norms(nn.BatchNorm2d(3, momentum=1.0), "synced", comm)
    return module(x).detach(), module.running_var.double()


@pytest.mark.parametrize("plant", [False, True])
def test_mean_far_from_zero_in_single_precision(plant):
    torch.manual_seed(1)
    x = (torch.randn(6, 3, 8, 8) + 1e4).double()
    reference = nn.BatchNorm2d(3, momentum=1.0).double()
    expected = reference(x).detach()
    ranks = run_ranks(2, normalise_far_from_zero, plant)
    variance_error = (ranks[0][1] / reference.running_var - 1).abs().max()
    output_error = (torch.cat([rank[0] for rank in ranks]) - expected).abs().max()
    # fp32 has steps of 1e-3 at 1e4: local means are rounded by up to 5e-4, and with them the variance between ranks.
    assert (variance_error < 5e-4 and output_error < 4e-3) != plant


def test_single_precision_and_autocast():
    torch.manual_seed(0)
    x = torch.randn(16, 8, 6, 6)
    stock, synced = nn.BatchNorm2d(8), convert_norms(nn.BatchNorm2d(8), "synced", Communicator())
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        first, second = x.clone().to(dtype).requires_grad_(), x.clone().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            expected, actual = stock(first), synced(second)
        assert actual.dtype == expected.dtype == dtype
        (expected.float() ** 3).sum().backward()
        (actual.float() ** 3).sum().backward()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(second.grad.float(), first.grad.float(), rtol=tolerance, atol=4 * tolerance)
        torch.testing.assert_close(synced.running_var, stock.running_var)
        assert synced.running_var.dtype == synced.weight.grad.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torch_on_a_gpu(dtype):
    torch.manual_seed(0)
    x = (torch.randn(16, 24, 9, 9) + 3).to("cuda", dtype)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    for layout in (torch.contiguous_format, torch.channels_last):
        stock = nn.BatchNorm2d(24).to("cuda", parameters)
        synced = convert_norms(copy.deepcopy(stock), "synced", Communicator())
        first, second = [x.clone(memory_format=layout).requires_grad_() for _ in range(2)]
        expected, actual = stock(first), synced(second)
        (expected.to(parameters) ** 3).sum().backward()
        (actual.to(parameters) ** 3).sum().backward()
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(second.grad, first.grad, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(synced.weight.grad, stock.weight.grad, rtol=tolerance, atol=tolerance * 100)
        torch.testing.assert_close(synced.running_var, stock.running_var)


def train_without_gradient(comm):
    module = convert_norms(nn.BatchNorm1d(2).double(), "synced", comm)
    x = torch.arange(8, dtype=torch.float64).view(4, 2)[comm.rank * 2 : comm.rank * 2 + 2]
    with torch.no_grad():
        y = module(x)
    counts = {name: (count.calls, count.bytes) for name, count in comm.drain().items()}
    module.eval()
    module(x)
    return y, module.running_mean, counts, dict(comm.drain())


def test_without_gradient_and_the_bytes_on_the_wire():
    expected = nn.BatchNorm1d(2).double()
    y = expected(torch.arange(8, dtype=torch.float64).view(4, 2)).detach()
    ranks = run_ranks(2, train_without_gradient)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), y)
    for _, mean, counts, silent in ranks:
        torch.testing.assert_close(mean, expected.running_mean)
        assert counts == {"norm/forward": (1, 5 * 8)}
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
