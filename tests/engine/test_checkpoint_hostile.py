import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file

from dist_fair.engine import checkpoint
from dist_fair.engine.checkpoint_writing import write_file
from dist_fair.errors import DistFairError
from tests.engine.checkpoints import edit, same, save, save_dealt, trained

FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_in_place_of_a_tensor_file_is_not_executed(tmp_path):
    folder, *_ = save(tmp_path)
    bomb, target = Bomb(), tmp_path / "exploded"
    bomb.path = str(target)
    (folder / "model.safetensors").write_bytes(pickle.dumps(bomb))
    digest = checkpoint.sha256(folder / "model.safetensors")
    edit(folder, lambda state: state["files"]["model.safetensors"].update(sha256=digest))
    with pytest.raises(DistFairError, match="no safetensors file"):
        checkpoint.read(folder).tensors("model")
    with pytest.raises(DistFairError, match="no safetensors file"):
        checkpoint.open_part(folder / "model.safetensors")
    assert not target.exists()


def renamed(state, old, new):
    state["files"][new] = state["files"].pop(old)


def twice(state):
    state["files"][SECOND]["tensors"].append("0.bias")


HOSTILE = {
    "../x": (lambda state: renamed(state, FIRST, "../x.safetensors"), "'../x.safetensors' is no"),
    "absolute": (lambda state: renamed(state, FIRST, "/etc/passwd"), "'/etc/passwd' is no"),
    "another file": (lambda state: renamed(state, FIRST, "state.json"), "'state.json' is no"),
    "a file is not listed": (lambda state: state["files"].pop(THIRD), "not one whole set"),
    "no model": (lambda state: state.update(files={}), "files of the model are not one whole set"),
    "a tensor twice": (twice, "'0.bias' is there twice"),
    "files is a list": (lambda state: state.update(files=[1]), "state.json: "),
    "a file is a number": (lambda state: state["files"].update({FIRST: 1}), "state.json: "),
    "hash is a number": (lambda state: state["files"][FIRST].update(sha256=1), "no file of"),
    "tensors is a dict of lists": (lambda state: state["files"][FIRST].update(tensors=[[1]]), "state.json: "),
    "no files": (lambda state: state.pop("files"), "lacks 'files'"),
    "no step": (lambda state: state.pop("step"), "lacks 'step'"),
    "a step below 0": (lambda state: state.update(step=-1), "-1 is no step"),
    "a step without end": (lambda state: state.update(step=10**400), "00 is no step"),
    "a step of 1e400": (lambda state: state.update(step=1e400), "inf is no step"),
    "a step that is true": (lambda state: state.update(step=True), "True is no step"),
    "a step that is text": (lambda state: state.update(step="3"), "3 is no step"),
    "recipe is a list": (lambda state: state.update(recipe=[]), "are not objects"),
    "values are words": (lambda state: state.update(values={"loss": "x"}), "state.json: could not convert"),
    "values without end": (lambda state: state.update(values={"loss": 10**400}), "state.json: int too large"),
    "a list": (lambda state: [state], "not an object"),
    "format is a list": (lambda state: state.update(format=[[]]), "has format"),
    "format of the future": (lambda state: state.update(format=99), "format 99; this version reads"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_state_is_refused_in_one_line(tmp_path, attack):
    folder, *_ = save_dealt(tmp_path)
    change, message = HOSTILE[attack]
    edit(folder, lambda state: result if isinstance(result := change(state), list) else None)
    with pytest.raises(DistFairError, match=re.escape(message)) as caught:
        checkpoint.read(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00" * 99, '{"format": 2, "step": ' + "9" * 9999 + "}"])
def test_what_is_no_json_is_refused(tmp_path, text):
    folder, *_ = save(tmp_path)
    (folder / "state.json").write_text(text)
    with pytest.raises(DistFairError, match=r"is no checkpoint of dist_fair: state\.json"):
        checkpoint.read(folder)


def test_a_huge_state_is_not_read(tmp_path, monkeypatch):
    folder, *_ = save(tmp_path)
    monkeypatch.setattr(checkpoint, "LARGEST", 100)
    with pytest.raises(DistFairError, match="larger than 100 bytes"):
        checkpoint.read(folder)


def test_a_file_with_other_tensors_than_listed_is_refused(tmp_path):
    """A tensor in two files, as state.json does not say."""
    folder, *_ = save_dealt(tmp_path)
    entry = write_file(folder / SECOND, load_file(folder / SECOND) | {"0.bias": torch.ones(5)})
    edit(folder, lambda state: state["files"][SECOND].update(sha256=entry["sha256"], bytes=entry["bytes"]))
    with pytest.raises(DistFairError, match=r"lists other tensors than it has: \['0.bias'\]"):
        checkpoint.read(folder).tensors("model")


def test_a_missing_shard_is_named(tmp_path):
    folder, *_ = save_dealt(tmp_path)
    (folder / "optimizer-00002-of-00003.safetensors").unlink()
    with pytest.raises(DistFairError, match=r"optimizer-00002-of-00003.safetensors is missing or damaged"):
        checkpoint.read(folder)
    assert checkpoint.read(folder, ("model",)).tensors("model")


def test_other_names_and_shapes_are_refused_before_anything_is_loaded(tmp_path):
    folder, module, _ = save(tmp_path)
    tensors = checkpoint.read(folder).tensors("model")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(DistFairError, match=r"'2\.weight' is float32 \(3, 5\), the recipe has float32 \(2, 5\)"):
        checkpoint.load_model(module, tensors | {"0.bias": torch.ones(5), "2.weight": torch.ones(3, 5)}, folder)
    with pytest.raises(DistFairError, match=r"missing \['0\.bias'\], unexpected \['0\.bais'\].*'0\.bias'"):
        checkpoint.load_model(module, {("0.bais" if k == "0.bias" else k): v for k, v in tensors.items()}, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    with pytest.raises(DistFairError, match=r"'1\.num_batches_tracked' is float32 \(\), the recipe has int64 \(\)"):
        checkpoint.load_model(module, tensors | {"1.num_batches_tracked": torch.ones(())}, folder)
    with pytest.raises(DistFairError, match=r"'0\.bias' is bool \(5,\), the recipe has float32"):
        checkpoint.load_model(module, tensors | {"0.bias": torch.ones(5, dtype=torch.bool)}, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    "bad",
    [
        {"exp_avg/0.weight": torch.ones(1, 1)},
        {"exp_avg/9.weight": torch.ones(5, 4)},
        {"0.weight": torch.ones(5, 4)},
        {"exp_avg/0.bias": torch.ones(5, dtype=torch.int)},
    ],
)
def test_moments_that_do_not_fit_are_refused_before_any_is_loaded(bad):
    module, optimizer = trained()
    before = checkpoint.optimizer_tensors(module, optimizer)
    with pytest.raises(DistFairError, match="does not fit"):
        checkpoint.load_optimizer(module, optimizer, {"exp_avg/2.bias": torch.full((2,), 7.0)} | bad)
    same(checkpoint.optimizer_tensors(module, optimizer), before)
