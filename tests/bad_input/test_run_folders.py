"""Run folders and checkpoints that belong to something else or were damaged; losses that are no numbers."""

import os
from pathlib import Path

import pytest

from dist_fair import cli
from tests.command_line.runs import metrics


def untouched(folder: Path, action) -> str:
    """What `action` returned; it must have left the folder as it was."""

    def contents():
        return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = contents()
    code, _, error = action()
    assert code == 2
    assert contents() == before
    return error


def test_a_folder_of_another_run(train, run):
    error = untouched(run, lambda: train("seed=5", f"out={run}"))
    assert f"out={run} holds another run (then, now): seed: 0, 5: choose another out=" in error


def test_a_folder_of_other_things(train, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    error = untouched(tmp_path / "thesis", lambda: train(f"out={tmp_path / 'thesis'}"))
    assert "is not empty and no run folder" in error
    assert "choose another out=" in error


def test_a_file_where_the_folder_should_be(train, tmp_path, run, capsys):
    (tmp_path / "file").write_text("x")
    code, _, error = train(f"out={tmp_path / 'file'}")
    assert code == 2
    assert f"{tmp_path}/file is a file" in error
    code, _, error = train(f"out={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert f"{tmp_path}/file/run" in error
    assert cli.main(["evaluate", str(run), f"--out={tmp_path / 'file'}"]) == 2
    assert (tmp_path / "file").read_text() == "x"


def test_never_resume_a_used_folder(train, run):
    error = untouched(run, lambda: train("resume=never", f"out={run}"))
    assert f"resume=never, but out={run} has step-00000003: choose another out=, or resume=auto" in error


def test_a_checkpoint_of_another_recipe(refused, run):
    step = run / "checkpoints" / "step-00000003"
    error = refused(f"resume={step}", "optimizer.lr=0.5", "train.steps=5")
    assert f"{step} is a checkpoint of another recipe (then, now): optimizer.lr: 0.02, 0.5; train.steps: 3, 5" in error
    assert "set detector.init_from" in error


@pytest.mark.parametrize("path", ["nowhere", "data", "data/card.yaml"])
def test_what_is_no_checkpoint(data, refused, path):
    error = refused(f"resume={data.parent / path}")
    assert f"{data.parent / path} is neither a checkpoint nor a run folder with one" in error


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flipped, Path.unlink, lambda path: os.truncate(path, 50)], ids=["bit", "gone", "cut"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_that_is_named_or_alone(train, run, name, harm, capsys):
    newest, older = (run / "checkpoints" / f"step-0000000{step}" for step in (3, 2))
    harm(newest / name)
    error = untouched(run, lambda: train(f"out={run}", f"resume={newest}"))
    assert f"{newest / name} is missing or damaged" in error
    harm(older / name)
    error = untouched(run, lambda: train(f"out={run}"))
    assert f"no checkpoint in {run / 'checkpoints'} is whole" in error
    assert "resume=PATH" in error
    if name == "model.safetensors":
        assert cli.main(["evaluate", str(run)]) == 2
        assert f"{newest / name} is missing or damaged" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_for_a_whole_one(train, run, finished):
    path = run / "checkpoints" / "step-00000003" / "model.safetensors"
    flipped(path)
    code, out, _ = train(f"out={run}")
    assert code == 0
    assert f"warning: {path} is missing or damaged" in out
    assert "going on from step-00000002" in out
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(finished)]


@pytest.mark.parametrize("text", ["", "[1]", '{"step": 3}', '{"step": 3, "recipe": {}, "sha256": {}, "format": 99}'])
def test_a_damaged_state_of_a_checkpoint(train, run, text):
    path = run / "checkpoints" / "step-00000003" / "state.json"
    path.write_text(text)
    error = untouched(run, lambda: train(f"out={run}", f"resume={path.parent}"))
    assert f"{path.parent}" in error
    assert "state.json" in error


def test_a_stored_recipe_that_was_damaged(train, run):
    (run / "recipe.yaml").write_text("train: [")
    assert f"{run}/recipe.yaml is not plain YAML" in untouched(run, lambda: train(f"out={run}"))


@pytest.mark.parametrize(("arguments", "said"), [
    (["nowhere"], "nowhere is neither a checkpoint nor a run folder"),
    (["RUN", "recipe=erm"], "has its own"),
    (["RUN", "data.eval=[nowhere]"], "nowhere is no folder"),
    (["RUN", "data.eval=[near,./near]"], "two entries with one name"),
    (["RUN", "--out=OTHER"], "is the folder of another run"),
])  # fmt: skip
def test_evaluate_what_cannot_be(run, finished, capsys, arguments, said):
    capsys.readouterr()
    places = [one.replace("RUN", str(run)).replace("OTHER", str(finished)) for one in arguments]
    assert said in untouched(run, lambda: (cli.main(["evaluate", *places]), *capsys.readouterr()))


def test_a_loss_that_is_not_finite(train, tmp_path, good):
    """A learning rate of 1e30 takes one step; the next one meets weights whose activations overflow."""
    code, _, error = train("optimizer.lr=1e30", "schedule.warmup=0", "checkpoint.every=10")
    assert code == 2
    assert "step 1: loss nan" in error
    assert f"in {good}/train/0000" in error  # samples by name
    assert "Lower optimizer.lr" in error
    out = tmp_path / "out"
    assert [line["step"] for line in metrics(out)] == [0]
    assert not [*(out / "checkpoints").iterdir()]
    assert not (out / "evaluation.json").exists()
