"""Synced batch norm asks torch's kernels what they can answer: on one rank, on several, on a GPU; compiled around."""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from dist_fair.collectives import Communicator
from dist_fair.detectors import norm_kernels
from dist_fair.detectors.norm import convert_norms
from tests.detectors.norm_worlds import LAYOUTS, Calls, gpu_kernels, maps, pretended

WAYS = {"native": nullcontext, "gpu": gpu_kernels}
FORWARD, TRACKING, BACKWARD = 13, 7, 7  # launches; the docstring of dist_fair.detectors.norm says so
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def trained(norm, x, dy):
    """y, dx, gradients and buffers after two steps of a norm, all on the CPU in fp64."""
    x = x.detach().requires_grad_()
    for _ in range(2):
        norm.zero_grad()
        x.grad = None
        y = norm(x)
        y.backward(dy)
    found = {"y": y, "dx": x.grad} | {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {name: value.detach().double().cpu().clone() for name, value in (found | dict(norm.named_buffers())).items()}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size = value.abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * max(size, 1), msg=name)


def data(layout, rows=8, channels=6, side=5):
    """x and a dy that has to do with it: a sum of products that cancel says little in single precision."""
    x, other = (maps((side, side), layout, rows, channels, seed) for seed in (4, 5))
    return x, x + other**2 - 4


# One rank -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_on_one_rank_it_is_torchs_own_to_the_bit(layout, dtype, settings):
    x, dy = (one.to(dtype) for one in data(layout))
    stock = nn.BatchNorm2d(6, **settings).to(torch.float64 if dtype == torch.float64 else torch.float32)
    synced, comm = copy.deepcopy(stock), Communicator()
    synced = convert_norms(synced, "synced", comm)
    expected, actual = trained(stock, x, dy), trained(synced, x, dy)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    for norm in (stock, synced):
        norm.eval()
    assert torch.equal(synced(x), stock(x))
    assert not comm.counts
    with Calls() as one, torch.no_grad():
        stock.train()(x)
    with Calls() as other, torch.no_grad():
        synced.train()(x)
    assert one.names() == other.names()


def test_single_precision_and_autocast():
    torch.manual_seed(0)
    x = torch.randn(16, 8, 6, 6)
    for comm in (Communicator(), pretended()):
        stock, synced = nn.BatchNorm2d(8), convert_norms(nn.BatchNorm2d(8), "synced", comm)
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


@pytest.mark.parametrize("comm", [Communicator(), pretended()], ids=["one", "several"])
def test_one_value_in_all_comes_out_as_the_bias(comm):
    norm = convert_norms(nn.BatchNorm1d(3).double(), "synced", comm)
    nn.init.constant_(norm.bias, 0.7)
    x = torch.tensor([[5.0, -2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    torch.testing.assert_close(y, norm.bias.expand(1, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-12)
    assert norm.bias.grad.tolist() == [1.0] * 3
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach()[0])
    torch.testing.assert_close(norm.running_var, torch.full((3,), 0.9, dtype=torch.float64))


# Several ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("left_out", [(), ("bias",), ("weight",), ("weight", "bias")], ids=str)
def test_on_several_ranks_it_is_the_norm_of_the_whole_batch(way, layout, dtype, tolerance, left_out):
    x, dy = (one.to(dtype) for one in data(layout))
    stock = nn.BatchNorm2d(6).double()
    for name, parameter in [*stock.named_parameters()]:
        nn.init.uniform_(parameter, 0.5, 1.5)
        if name in left_out:
            setattr(stock, name, None)
    comm = pretended()
    synced = convert_norms(copy.deepcopy(stock).to(torch.float64 if dtype == torch.float64 else torch.float32),
                           "synced", comm)  # fmt: skip
    with WAYS[way]():
        actual = trained(synced, x, dy)
        y = synced(x)
    assert_close(actual, trained(stock, x.double(), dy.double()), tolerance)
    assert comm.names == ["norm/forward", "norm/backward"] * 2 + ["norm/forward"]
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    assert all(parameter.grad.dtype == parameter.dtype for parameter in synced.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_statistics_in_half_precision(way, layout):
    x, dy = (one.bfloat16() for one in data(layout))
    synced = convert_norms(nn.BatchNorm2d(6).bfloat16(), "synced", pretended())
    with WAYS[way]():
        actual = trained(synced, x, dy)
    assert_close(actual, trained(nn.BatchNorm2d(6).double(), x.double(), dy.double()), 1e-2)
    assert {one.dtype for one in (*synced.parameters(), synced.running_mean, synced.weight.grad)} == {torch.bfloat16}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_values(way, layout):
    """2^31 ranks with 48 values a channel each, the same ones: no counter of 32 bits holds them."""
    x, dy = data(layout)
    stock = nn.BatchNorm2d(6, momentum=1.0).double()
    synced = convert_norms(copy.deepcopy(stock), "synced", pretended(copies=2**31))
    with WAYS[way]():
        actual = trained(synced, x, dy)
    expected = trained(stock, x, dy)
    expected["running_var"] *= 1 - 1 / (x.numel() / 6)  # of so many values there is nothing to correct
    assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["the other", "slice", "expanded", "single pixels", "single channel"])
def test_inputs_and_gradients_of_any_strides(way, layout, other):
    x, dy = data(layout, channels=1) if other == "single channel" else data(layout)
    if other == "the other":
        dy = dy.contiguous(memory_format=torch.contiguous_format if layout == "channels_last" else torch.channels_last)
    elif other == "slice":
        x, dy = x[:, 1::2], dy[:, 1::2]
    elif other == "expanded":
        dy = dy[:1, :, :1, :1].expand_as(x)
    elif other == "single pixels":
        x, dy = x[:, :, :1, :1], dy[:, :, :1, :1]
    stock = nn.BatchNorm2d(x.shape[1]).double()
    synced = convert_norms(copy.deepcopy(stock), "synced", pretended())
    with WAYS[way]():
        actual = trained(synced, x, dy)
    assert_close(actual, trained(stock, x, dy), 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_only_cuda_reads_is_given(layout):
    """native_batch_norm_backward, for channels_last input, on CUDA: save_mean->defined() INTERNAL ASSERT FAILED."""
    x, dy = data(layout)
    norm = convert_norms(nn.BatchNorm2d(6).double(), "synced", pretended())
    with Calls() as calls:
        trained(norm, x, dy)
    made = [arguments for name, arguments in calls.made if name == "native_batch_norm_backward"]
    assert len(made) == 2
    for _, _, weight, running_mean, running_var, save_mean, save_invstd, training, eps, mask in made:
        assert not training
        assert mask == [True, True, True]
        torch.testing.assert_close(weight, norm.weight.detach())
        torch.testing.assert_close(running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(running_var, x.var((0, 2, 3), correction=0))
        torch.testing.assert_close(save_mean, running_mean)
        torch.testing.assert_close(save_invstd, (running_var + eps).rsqrt())


@pytest.mark.parametrize("tracking", [True, False])
def test_launches_on_a_gpu_are_as_many_as_are_told(tracking):
    x, dy = (one.float() for one in data("channels_last"))
    x.requires_grad_()
    norm = convert_norms(nn.BatchNorm2d(6, track_running_stats=tracking), "synced", pretended())
    with gpu_kernels():
        norm(x).backward(dy)  # what is made once is made
        with Calls() as forward:
            y = norm(x)
        with Calls() as backward:
            torch.autograd.grad(y, [x, norm.weight, norm.bias], dy)
    # Inside a kernel that is stood in for, nothing is counted: the wire's copy is the product in `pretended`.
    assert len(forward.made) == FORWARD + TRACKING * tracking, forward.names()
    assert len(backward.made) == BACKWARD, backward.names()


# torch.compile --------------------------------------------------------------------------------------------------------


def unrecorded():
    """Several ranks, whose sum torch.compile can trace."""
    comm = pretended()
    comm.sum = lambda tensor, name: tensor * 1
    return comm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("comm", [Communicator(), unrecorded()], ids=["one", "several"])
def test_compiled_around(layout, comm):
    """On one rank in one graph. On several graphs end before a norm; its activation, say, is in one again."""
    torch.manual_seed(0)
    layers = [BatchNormAct2d(6, act_layer=nn.SiLU), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)]
    stock = nn.Sequential(*layers).double()
    synced, called = convert_norms(copy.deepcopy(stock), "synced", comm), set()
    x = data(layout)[0]
    dy = stock(x).detach() ** 2
    expected = trained(copy.deepcopy(synced), x, dy)

    def compile_graph(graph, inputs):
        called.update(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    whole = torch.compile(synced, backend=compile_graph, fullgraph=comm.world == 1)
    actual = trained(whole, x, dy)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected, 1e-12)
    traced = {name for name in called if "norm" in name or "autograd" in name}
    assert traced == ({"batch_norm"} if comm.world == 1 else set())
    assert "silu" in called
    torch.testing.assert_close(whole.eval()(x), synced.eval()(x))


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ranks", ["one", "several", "several, native"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("side", [9, 56])
def test_equals_torch_in_double_precision_on_a_cpu(ranks, layout, dtype, tolerance, side):
    x, dy = (one.to(dtype) for one in data(layout, 16, 24, side))
    stock = nn.BatchNorm2d(24).double()
    for parameter in stock.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    expected = trained(stock, x.double(), dy.double())
    module = nn.BatchNorm2d(24).to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
    module.load_state_dict(nn.BatchNorm2d(24).state_dict() | dict(stock.named_parameters()))
    synced = convert_norms(module, "synced", Communicator() if ranks == "one" else pretended())
    x, dy = x.cuda(), dy.cuda()
    with mock.patch.object(norm_kernels, "serve", return_value=False) if "native" in ranks else nullcontext():
        actual = trained(synced, x, dy)
        y = synced(x)
    assert_close(actual, expected, tolerance)
    assert (y.dtype, y.stride()) == (dtype, x.stride())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_without_rows_on_a_gpu(layout):
    norm = convert_norms(nn.BatchNorm2d(6).to("cuda", torch.float64), "synced", pretended())
    x = data(layout)[0].cuda()[:0].requires_grad_()
    comm = norm.comm
    comm.sum = lambda tensor, name: tensor + 1  # the others' part
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert norm.weight.grad.tolist() == norm.bias.grad.tolist() == [0.0] * 6
    torch.testing.assert_close(norm.running_mean.cpu(), torch.full((6,), 0.1, dtype=torch.float64))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_on_a_gpu(layout):
    from torch.profiler import ProfilerActivity, profile

    x, dy = (one.float().cuda() for one in data(layout))
    x.requires_grad_()
    norm = convert_norms(nn.BatchNorm2d(6).cuda(), "synced", pretended())
    norm(x).backward(dy)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        y = norm(x)
        torch.autograd.grad(y, [x, norm.weight, norm.bias], dy)
        torch.cuda.synchronize()
    kernels = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= FORWARD + TRACKING + BACKWARD, kernels
