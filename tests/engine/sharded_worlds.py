"""Sharpness-aware minimisation of a network whose parameters are sharded over ranks (FSDP2), and not."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_fair.engine import sharpness
from dist_fair.engine.module import Losses

STEPS = 6


def descend(comm, sam, sharded):
    """Norms and whole parameters after some clipped steps. Rows of tensors do not divide by the ranks; one has one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    if sharded:
        mesh = init_device_mesh("cpu", (comm.world,))
        for layer in (network[0], network[2], network):
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(network.parameters(), 0.3, momentum=0.9, weight_decay=0.01)
    rows = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = rows.chunk(comm.world)[comm.rank]

    def backward():
        loss = (network(rows) - rows.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return [Losses(loss, {}, rows, rows)]

    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (losses,) = sharpness.climbed(network, sam, backward)
        norms.append(losses.numbers["sam/ascent_norm"])
        norms.append(full(nn.utils.clip_grad_norm_(network.parameters(), 0.5)))
        optimizer.step()
    held = [parameter.to_local() if sharded else parameter for parameter in network.parameters()]
    return {
        "held": sum(part.numel() for part in held),
        "norms": torch.stack(norms),
        "weights": torch.cat([full(parameter).detach().flatten() for parameter in network.parameters()]),
    }


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def descend_sharded(comm, sams, norm_of_own_shard=False):
    if norm_of_own_shard:
        whole = sharpness.get_total_norm
        sharpness.get_total_norm = lambda slopes: whole([slope.to_local() for slope in slopes])
    return [descend(comm, sam, sharded=True) for sam in sams]
