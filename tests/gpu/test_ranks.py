"""Two ranks that share the one GPU against one: gloo takes tensors of a GPU, where NCCL refuses two ranks on a device.

What is not here is what only NCCL does: its own kernels and its stream.
"""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.data.window import Window
from dist_fair.detectors.norm import convert_norms
from dist_fair.recipe.schema import Train
from tests.engine import accumulation_worlds as worlds
from tests.engine import backends_worlds
from tests.gpu.runs import DEVICE
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu
STEPS, RATE, PROGRESS = 3, 0.05, 0.6
CASES = {name: {**backends_worlds.CASES, "daw_fdd": worlds.CASES["daw"]}[name]
         for name in ("erm", "daid", "sfd_gda", "daw_fdd", "pg_fdd")}  # fmt: skip
CHANNELS, SHAPES = 6, {"images": (5, 4), "rows": ()}
NORMS = [(kind, sizes) for kind in SHAPES for sizes in ((5, 3), (0, 6), (7, 0))]


def trained(comm, case):
    """Loss, averaged gradients and buffers of each step, as this rank has them."""
    plan, side = worlds.plan("pg_fdd" if case == "pg_fdd" else "plain"), 32 if case == "pg_fdd" else 16
    with mock.patch.dict(backends_worlds.CASES, CASES):
        module = backends_worlds.made(case, plan, comm, Train(precision="fp64"))
    module, found = module.train().to(DEVICE, memory_format=torch.channels_last), []
    for batch in worlds.batches(plan, comm.rank, comm.world, 0, STEPS, side):
        images = batch.images.to(DEVICE, memory_format=torch.channels_last)
        losses = module(Window([replace(batch.to(DEVICE), images=images)]), PROGRESS)
        losses.loss.backward()
        gradients = {name: comm.sum(one.grad, "ddp") / comm.world for name, one in module.named_parameters()}
        found.append({"loss": losses.loss.item(), "gradients": arrays(gradients),
                      "buffers": arrays(dict(module.named_buffers()))})  # fmt: skip
        with torch.no_grad():
            for name, one in module.named_parameters():
                one -= RATE * gradients[name]
                one.grad = None
    return found


def arrays(tensors):
    return {name: tensor.detach().cpu().double().numpy().copy() for name, tensor in tensors.items()}


def normalised(comm, kind, sizes, mode):
    """This rank's outputs, input gradients, averaged gradients and buffers of two norms with a mixture between them, so
    that a gradient through the statistics of the second reaches the first. Images are channels_last."""
    torch.manual_seed(3)
    whole = torch.randn(sum(sizes), CHANNELS, *SHAPES[kind], dtype=torch.float64) + 2
    weights = torch.linspace(-1, 1, whole[0].numel(), dtype=torch.float64).view(1, -1).to(DEVICE)
    module = convert_norms(network(kind), mode, comm).to(DEVICE)
    found, start = [], sum(sizes[: comm.rank])
    for step in range(STEPS):
        rows = whole[start : start + sizes[comm.rank]].to(DEVICE) * (1 + step)
        rows = (rows.contiguous(memory_format=torch.channels_last) if kind == "images" else rows).requires_grad_()
        module.zero_grad()
        y = module(rows)
        means = comm.replicated_sum(((y + 0.3) ** 3).flatten(1).mul(weights).sum(0), "test") / len(whole)
        means.square().sum().backward()
        gradients = {name: comm.sum(one.grad, "ddp") / comm.world for name, one in module.named_parameters()}
        found.append(arrays({"y": y, "x": rows.grad / comm.world} | gradients | dict(module.named_buffers())))
    return found


def network(kind):
    norm, mixture = (nn.BatchNorm2d, nn.Conv2d(CHANNELS, CHANNELS, 1)) if kind == "images" else (
        nn.BatchNorm1d, nn.Linear(CHANNELS, CHANNELS))  # fmt: skip
    return nn.Sequential(norm(CHANNELS), nn.Tanh(), mixture, norm(CHANNELS, momentum=None)).double()


@pytest.fixture(scope="module")
def two():
    """What each of two ranks has: of each case, of each norm."""
    return run_ranks(2, both, timeout=120)


def both(comm):
    return {case: trained(comm, case) for case in CASES}, {norm: normalised(comm, *norm, "synced") for norm in NORMS}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_rank(case, two):
    alone = trained(Communicator(), case)
    assert len(alone) == STEPS
    for cases, _ in two:
        for one, other in zip(alone, cases[case], strict=True):
            assert np.isfinite(one["loss"])
            assert worlds.difference(one, other) < 1e-10


@pytest.mark.parametrize(("kind", "sizes"), NORMS)
def test_a_norm_of_uneven_and_empty_ranks_is_torchs(kind, sizes, two):
    expected = normalised(Communicator(), kind, (sum(sizes),), "local")
    ranks = [norms[kind, sizes] for _, norms in two]
    for step, one in enumerate(expected):
        for name, value in one.items():
            found = [rank[step][name] for rank in ranks]
            for actual in [np.concatenate(found)] if name in "xy" else found:
                np.testing.assert_allclose(actual, value, rtol=1e-10, atol=1e-10, err_msg=f"step {step}, {name}")
