"""The folder of a detector in use: written whole or not, refused where it is damaged, hostile or something else."""

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save

from dist_fair.engine import exporting
from dist_fair.engine.deployment import load_detector
from dist_fair.errors import DistFairError
from tests.engine import deployment_worlds
from tests.engine.deployment_worlds import deployed, trained

MASKED = (0, 3, 4, 9, 11)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    exporting.write(folder, deployed(*trained("relu", "norm, projection", MASKED)))
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "out")


def change(folder, config=None, **tensors):
    """Another config, or other tensors (None: left out), with the hash that belongs to them."""
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    if tensors:
        held = load_file(folder / "model.safetensors") | tensors
        data = save({name: tensor for name, tensor in held.items() if tensor is not None})
        (folder / "model.safetensors").write_bytes(data)
        content["sha256"] = {"model.safetensors": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(content))


def test_a_damaged_file_is_found(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DistFairError, match=r"model\.safetensors is damaged"):
        load_detector(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DistFairError, match=r"model\.safetensors cannot be read"):
        load_detector(folder)
    with pytest.raises(DistFairError, match=r"is no exported detector .*dist-fair export RUN"):
        load_detector(folder.parent)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_is_not_executed(folder):
    data = pickle.dumps(Bomb(folder / "exploded"))
    (folder / "model.safetensors").write_bytes(data)
    change(folder, {"sha256": {"model.safetensors": hashlib.sha256(data).hexdigest()}})
    with pytest.raises(DistFairError, match="is no safetensors file"):
        load_detector(folder)
    assert not (folder / "exploded").exists()


ARGUMENTS = deployment_worlds.RESNET
CONFIGS = {
    "another format": ({"format": 2}, "has format 2; this version reads 1"),
    "no hash": ({"sha256": {"../model.safetensors": "0"}}, "KeyError"),
    "a further key": ({"pretrained": "weights.pt"}, "pretrained"),
    "a wrong type": ({"image_size": "64"}, "image_size=64 is not what an export writes"),
    "no size": ({"image_size": 0}, "image_size=0"),
    "no spread": ({"std": [0.5, 0.5, 0.0]}, "std"),
    "precision": ({"precision": "int8"}, "precision=int8"),
    "masked twice": ({"masked": [0, 3, 3, 9, 11]}, "masked"),
    "masked beyond": ({"masked": [0, 3, 4, 9, 12]}, "masked"),
    "fewer masked": ({"masked": [0, 3, 4, 9]}, "takes 7 features, and 8 come"),
    "all masked": ({"masked": [*range(12)]}, "masked"),
    "channels": ({"channels": 13}, "resnet18 has 12 channels, not 13"),
    "no detector": ({"name": "../../etc/passwd"}, "no such detector"),
    "from the hub": ({"name": "hf_hub:someone/model"}, "no such detector"),
    "a file's weights": ({"arguments": ARGUMENTS | {"checkpoint_path": "/tmp/x.pt"}}, "set by dist_fair"),
    "the hub's weights": ({"arguments": ARGUMENTS | {"pretrained": True}}, "cannot build it|multiple values"),
    "no arguments": ({"arguments": ARGUMENTS | {"layers": "many"}}, "detector"),
    "a step nobody knows": ({"steps": [{"kind": "eval"}, {"kind": "projection"}]}, "steps"),
    "a step's tensor": ({"steps": [{"kind": "standardisation", "mean": 0}, {"kind": "projection"}]}, "mean"),
    "fewer steps": ({"steps": [{"kind": "standardisation"}]}, "not the weights"),
}


@pytest.mark.parametrize("config", [*CONFIGS])
def test_a_hostile_config_is_refused(folder, config):
    wrong, text = CONFIGS[config]
    change(folder, wrong)
    with pytest.raises(DistFairError, match=text):
        load_detector(folder)


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"format": 1}', "[" * 100_000, "\x00"])
def test_a_config_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(DistFairError, match="not what `dist-fair export` writes"):
        load_detector(folder)


@pytest.mark.parametrize("tensors", [
    {"detector.classifier.weight": torch.ones(2, 7)}, {"detector.classifier.bias": None}, {"further": torch.ones(3)},
    {"steps.0.mean": torch.ones(1, 7)}, {"steps.0.mean": None}, {"steps.1.code": torch.ones(2)},
    {"steps.1.basis": torch.ones(9, 5)},
], ids=lambda tensors: next(iter(tensors)))  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(folder, tensors):
    change(folder, **tensors)
    with pytest.raises(DistFairError, match=str(folder)):
        load_detector(folder)


def test_an_export_is_there_as_a_whole_or_not(folder, tmp_path, monkeypatch):
    other, replace = deployed(*trained("smooth")), os.replace
    with pytest.raises(DistFairError, match="is there: choose another --out, or --replace it"):
        exporting.write(folder, other)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def crash(source, target):
        if str(source).endswith(".partial"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(DistFairError, match="could not be written: disk full"):
            exporting.write(target, other, replace=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    exporting.write(folder, other, replace=True)
    assert load_detector(folder).description.masked == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_an_exported_detector_is_replaced(folder, tmp_path):
    other = deployed(*trained())
    (folder / "thesis.tex").write_text("years of work")
    for target in (folder, tmp_path, folder / "thesis.tex"):
        with pytest.raises(DistFairError, match="is there and no exported detector"):
            exporting.write(target, other, replace=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
