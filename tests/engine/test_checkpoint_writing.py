import json
import os

import pytest
import torch
from safetensors.torch import load_file

from dist_fair.engine import checkpoint, checkpoint_writing
from dist_fair.engine.checkpoint_writing import Best, prune
from tests.engine.checkpoints import names, save, save_dealt


def test_a_crash_before_the_rename_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, step=1)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step=2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).name == checkpoint.name_of(1)
    prune(tmp_path, step=1, keep=3)
    assert names(tmp_path) == [checkpoint.name_of(1)]


def test_all_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []

    def noted(name, call, where):
        def act(*arguments):
            done.append((name, os.path.basename(where(arguments[0]))))
            return call(*arguments)

        return act

    def opened(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync, opened))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace, str))
    save(tmp_path, step=2)
    partial = ".step-00000002.partial"
    before, after = done[: done.index(("replace", partial))], done[done.index(("replace", partial)) + 1 :]
    files = ("model.safetensors", "optimizer.safetensors", "state.json", partial)
    assert {*before} == {("fsync", name) for name in files}
    assert before[-1] == ("fsync", partial)
    assert after[0] == ("fsync", tmp_path.name)


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 200):
        save(tmp_path, step)
    (tmp_path / "step-00000005_mine").mkdir()
    prune(tmp_path, step=200, keep=2)
    assert names(tmp_path) == ["step-00000005_mine", checkpoint.name_of(10), checkpoint.name_of(200)]


def test_what_was_just_written_is_never_pruned(tmp_path):
    """As where step 30 is damaged and the run goes on from step 10."""
    for step in (10, 30, 15):
        save(tmp_path, step)
    prune(tmp_path, step=15, keep=1)
    assert names(tmp_path) == [checkpoint.name_of(15), checkpoint.name_of(30)]
    save(tmp_path, 30)
    prune(tmp_path, step=30, keep=1)
    assert names(tmp_path) == [checkpoint.name_of(30)]


def test_a_removal_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def cut_short(folder, **_):
        (folder / "model.safetensors").unlink()

    monkeypatch.setattr(checkpoint_writing.shutil, "rmtree", cut_short)
    prune(tmp_path, step=2, keep=1)
    monkeypatch.undo()
    assert checkpoint.complete(tmp_path) == [tmp_path / checkpoint.name_of(2)]
    prune(tmp_path, step=2, keep=1)
    assert names(tmp_path) == [checkpoint.name_of(2)]


@pytest.mark.parametrize(("order", "best"), [("min", 2), ("max", 3)])
def test_the_best_is_kept_too(tmp_path, order, best):
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75), (4, 0.5), (5, 0.75)):
        save(tmp_path, step, loss=loss)
        prune(tmp_path, step, 1, Best(order, "loss"))
    assert names(tmp_path) == ["best.json", checkpoint.name_of(best), checkpoint.name_of(5)]
    told = json.loads((tmp_path / "best.json").read_text())
    assert told == {"checkpoint": checkpoint.name_of(best), "by": f"{order}:loss", "value": {2: 0.25, 3: 0.75}[best]}
    prune(tmp_path, step=5, keep=1)
    assert names(tmp_path) == [checkpoint.name_of(5)]


def test_a_step_without_the_number_is_not_the_best(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2, term=1.5)
    save(tmp_path, 3)
    best = Best("max", "term")
    prune(tmp_path, 3, 1, best)
    assert names(tmp_path) == ["best.json", checkpoint.name_of(2), checkpoint.name_of(3)]
    assert best.unknown({"term": None, "loss": 1.0}) is None
    assert "did you mean 'term'?" in Best("max", "tern").unknown({"term": None, "loss": 1.0})


def test_state_json_says_where_each_tensor_is_and_who_wrote_it(tmp_path):
    folder, *_ = save_dealt(tmp_path, count=2)
    state = json.loads((folder / "state.json").read_text())
    assert state["format"] == 2
    assert state["writer"]["torch"] == torch.__version__
    for name, file in state["files"].items():
        assert {*file["tensors"]} == {*load_file(folder / name)}
        assert file["bytes"] == (folder / name).stat().st_size
        assert file["sha256"] == checkpoint.sha256(folder / name)
    assert {*state["files"]} == {f"{part}-0000{n}-of-00002.safetensors" for part in checkpoint.PARTS for n in (1, 2)}
