"""Checkpoints of a small trained module."""

import json

import torch
from torch import nn

from dist_fair.engine import checkpoint, checkpoint_writing
from dist_fair.engine.checkpoint_writing import write, write_file
from dist_fair.engine.saving import SHARD, Saver

RECIPE = {"recipe": "erm", "seed": 0}


def trained(optimizer_kind=torch.optim.AdamW, steps=3):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer = optimizer_kind(module.parameters(), lr=0.1)
    for _ in range(steps):
        module(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def parts_of(module, optimizer):
    return {"model": module.state_dict(), "optimizer": checkpoint.optimizer_tensors(module, optimizer)}


def save(root, step=3, **values):
    module, optimizer = trained()
    return write(root, step, RECIPE, parts_of(module, optimizer), values=values), module, optimizer


def save_dealt(root, step=3, count=3):
    """The same in several files a part."""
    module, optimizer = trained()
    checkpoint_writing.begin(root, step)
    files = {}
    for part, tensors in parts_of(module, optimizer).items():
        for number in range(count):
            own = {name: tensors[name] for name in sorted(tensors)[number::count]}
            name = checkpoint.file_name(part, number, count)
            files[name] = write_file(checkpoint_writing.aside(root / checkpoint.name_of(step)) / name, own)
    return checkpoint_writing.commit(root, {"step": step, "recipe": RECIPE}, files), module, optimizer


def edit(folder, change):
    """Applies `change` to state.json."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(change(state) or state))


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Whole:
    """The module and its optimizer, whole on every rank, as far as a Saver looks at a backend."""

    name = "whole"

    def __init__(self, steps=3):
        self.module, self.optimizer = trained(steps=steps)

    def state(self, owned):
        return {part: {name: tensor.clone() for name, tensor in tensors.items() if owned(name.rpartition("/")[2])}
                for part, tensors in parts_of(self.module, self.optimizer).items()}  # fmt: skip


def saver(folder, comm, keep=2, best=None, shard=SHARD):
    return Saver(folder, RECIPE, comm, keep, best, shard=shard)
