"""Weights from files: found under any prefix, checked before they are loaded, never executed."""

import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_fair.detectors import load_state, load_weights
from dist_fair.errors import DistFairError


def network(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))


def equal(first, second):
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.detector.backbone."])
def test_any_file_and_any_prefix(tmp_path, suffix, prefix):
    saved, loaded, path = network(1), network(2), tmp_path / f"weights{suffix}"
    state = prefixed(saved.state_dict(), prefix)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert load_weights(loaded, path) == []
    assert equal(saved, loaded)


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict"])
def test_nested_checkpoints(tmp_path, nest):
    saved, loaded = network(1), network(2)
    torch.save({"epoch": 3, nest: saved.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "checkpoint.pth")
    load_weights(loaded, tmp_path / "checkpoint.pth")
    assert equal(saved, loaded)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, writer):
    module, trap, path = network(), tmp_path / "executed", tmp_path / "weights.pt"
    writer({**network(1).state_dict(), "code": Malicious(str(trap))}, path)
    with pytest.raises(DistFairError, match=r"weights\.pt: cannot be read as weights without executing it"):
        load_weights(module, path)
    assert not trap.exists()
    assert equal(module, network())


def test_what_does_not_match_is_named_and_nothing_is_loaded():
    module, state = network(), network(1).state_dict()
    state["extra.weight"] = state.pop("2.bias")
    state["0.weight"] = torch.zeros(5, 3, 1, 1)
    text = (
        "here: not the weights of this Sequential; nothing was loaded; 1 missing: 2.bias; "
        "1 unexpected: extra.weight; 1 of another shape: 0.weight (5, 3, 1, 1) instead of (4, 3, 1, 1)"
    )
    with pytest.raises(DistFairError, match=re.escape(text)):
        load_state(module, state, "here")
    assert equal(module, network())


def test_ten_names_at_most():
    module = nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)])
    with pytest.raises(DistFairError, match=r"40 missing: 0\.weight, .* and 30 more; 1 unexpected: a"):
        load_state(module, {"a": torch.ones(1)}, "here")


def test_heads_are_left_out_only_when_asked():
    module = nn.Sequential()
    module.add_module("conv", nn.Conv2d(3, 4, 1))
    state = prefixed({**module.state_dict(), "fc.weight": torch.ones(1000, 4)}, "backbone.")
    state["classifier.weight"] = torch.ones(2, 4)
    with pytest.raises(DistFairError, match=r"2 unexpected: classifier\.weight, backbone\.fc\.weight"):
        load_state(module, state, "here")
    assert load_state(module, state, "here", heads=["fc"]) == ["backbone.fc.weight", "classifier.weight"]
    state["backbone.other.weight"] = torch.ones(1)
    with pytest.raises(DistFairError, match=r"1 unexpected: backbone\.other\.weight"):
        load_state(module, state, "here", heads=["fc"])


def test_old_files_lack_counters_and_hold_pointwise_matrices():
    module, state = network(), network(1).state_dict()
    del state["1.num_batches_tracked"]
    state["0.weight"] = state["0.weight"].flatten(1)
    load_state(module, state, "here")
    assert equal(module, network(1))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("absent.pt", None, "no such file"),
        ("weights.ckpt", b"", "weights are read from .safetensors"),
        ("broken.safetensors", b"\x00\x01", "cannot be read as weights"),
        ("truncated.pt", b"PK\x03\x04 and no more", "cannot be read as weights"),
    ],
)
def test_unreadable_files(tmp_path, name, content, text):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DistFairError, match=rf"{name}: {text}"):
        load_weights(network(), tmp_path / name)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, {}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(DistFairError, match="holds no state dict"):
        load_weights(network(), tmp_path / "weights.pt")
