"""Checkpoints: whole or not there, never executed, refused when damaged or of another shape."""

import json
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from dist_fair.engine import checkpoint
from dist_fair.engine.run_folder import RunFolder
from dist_fair.errors import DistFairError

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


def save(root, step=3):
    module, optimizer = trained()
    parts = {"model": module.state_dict(), "optimizer": checkpoint.optimizer_tensors(module, optimizer)}
    return checkpoint.write(root, step, RECIPE, parts), module, optimizer


def test_what_is_read_is_what_was_written(tmp_path):
    folder, module, optimizer = save(tmp_path)
    found = checkpoint.read(folder)
    assert (found.step, found.recipe) == (3, RECIPE)
    other, other_optimizer = trained(steps=0)
    checkpoint.load_model(other, found.tensors("model"), folder)
    checkpoint.load_optimizer(other, other_optimizer, found.tensors("optimizer"))
    torch.manual_seed(7)
    images = torch.randn(8, 4)
    for net, chosen in ((module, optimizer), (other, other_optimizer)):
        net(images).square().sum().backward()
        chosen.step()
    for left, right in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_a_crash_before_the_rename_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, step=1)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step=2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).name == checkpoint.name_of(1)
    checkpoint.prune(tmp_path, keep=3)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name_of(1)]


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 200):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.name_of(10), checkpoint.name_of(200)]


def test_a_flipped_byte_is_found_and_the_file_named(tmp_path):
    folder, *_ = save(tmp_path)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DistFairError, match=r"model\.safetensors is missing or damaged"):
        checkpoint.read(folder)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_in_place_of_a_tensor_file_is_not_executed(tmp_path):
    folder, *_ = save(tmp_path)
    bomb, target = Bomb(), tmp_path / "exploded"
    bomb.path = str(target)
    (folder / "model.safetensors").write_bytes(pickle.dumps(bomb))
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["model.safetensors"] = checkpoint._sha256(folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        checkpoint.read(folder).tensors("model")
    with pytest.raises(DistFairError, match="no safetensors file"):
        checkpoint.open_part(folder / "model.safetensors")
    assert not target.exists()


def test_other_names_and_shapes_are_refused_before_anything_is_loaded(tmp_path):
    folder, module, optimizer = save(tmp_path)
    tensors = checkpoint.read(folder).tensors("model")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(DistFairError, match=r"'2\.weight' is \(3, 5\), the recipe has \(2, 5\)"):
        checkpoint.load_model(module, tensors | {"0.bias": torch.ones(5), "2.weight": torch.ones(3, 5)}, folder)
    with pytest.raises(DistFairError, match=r"missing \['0\.bias'\], unexpected \['0\.bais'\].*'0\.bias'"):
        checkpoint.load_model(module, {("0.bais" if k == "0.bias" else k): v for k, v in tensors.items()}, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    with pytest.raises(DistFairError, match="does not fit"):
        checkpoint.load_optimizer(module, optimizer, {"exp_avg/0.weight": torch.ones(1, 1)})


def test_no_checkpoint_says_so(tmp_path):
    with pytest.raises(DistFairError, match="neither a checkpoint nor a run folder"):
        checkpoint.find(tmp_path)
    with pytest.raises(DistFairError, match="is no checkpoint"):
        checkpoint.read(tmp_path)


def test_a_run_folder_or_a_checkpoint_may_be_named(tmp_path):
    folder, *_ = save(tmp_path / "checkpoints")
    assert checkpoint.find(tmp_path) == folder == checkpoint.find(folder)
    shutil.rmtree(folder)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_a_resumed_run_rewrites_its_metrics_from_the_step_it_resumes_at(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin("recipe: erm\n")
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)]
    folder.metrics.write_text("".join(lines) + '{"step": 5, "lo')
    folder.rewind(3)
    assert folder.metrics.read_text() == "".join(lines[:3])
    folder.metrics.write_text("".join(lines) + '{"step": 5, "lo')
    folder.rewind(9)
    assert folder.metrics.read_text() == "".join(lines)
