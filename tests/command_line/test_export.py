"""`dist-fair export` and `predict`: an image's score is the one that evaluation gave it, with no recipe and no data."""

import csv
import json
import shutil
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as parquet
import pytest

import dist_fair
from dist_fair import cli
from tests.command_line.runs import QUICK_WITHOUT_METHODS, call, predictions, succeed

# Subgroup norm, a projection and masked channels; the data set is evaluated in batches of another size than predicted.
RECIPE = ("recipe=daid", *QUICK_WITHOUT_METHODS, "interventions.low_rank_projection.rank=16",
          "+interventions.channel_decoupling={batch_size: 50, batches: 1, at: [0.3, 0.6], part: 0.05}",
          "interventions.subgroup_norm.delay=0.1", "train.steps=6", "data.image_size=40")  # fmt: skip


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run folder, and beside it the images of data set `near` as files KEY.png, and the exported detector."""
    folder = tmp_path_factory.mktemp("export")
    assert cli.main(["train", *RECIPE, f"data={data}", "data.eval=[near]", f"out={folder / 'run'}"]) == 0
    for shard in sorted((data.parent / "near").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".png"):
                    (folder / "images").mkdir(exist_ok=True)
                    (folder / "images" / member.name).write_bytes(tar.extractfile(member).read())
    assert cli.main(["export", str(folder / "run"), "--out", str(folder / "detector")]) == 0
    return folder / "run"


def predict(*arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments)])


def rows(path: Path) -> list[dict]:
    with path.open() as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize("source", ["detector", "run", "run/checkpoints/step-00000006"])
def test_scores_are_those_of_the_evaluation(run, tmp_path, source):
    """Also where a run folder or a checkpoint is named; batches of 7 leave a rest."""
    assert predict(run.parent / source, run.parent / "images", "--out", tmp_path / "s.csv", "--batch-size", 7) == 0
    evaluated = predictions(run, "near")
    expected = dict(zip(evaluated["sample_id"], evaluated["score"], strict=True))
    found = {Path(row["image"]).stem: float(row["score"]) for row in rows(tmp_path / "s.csv")}
    assert found.keys() == expected.keys()
    assert len(found) == 53
    assert len({*found.values()}) > 40
    assert max(abs(found[name] - expected[name]) for name in found) < 1e-6


def test_the_folder_says_what_it_is(run, capsys):
    config = json.loads((run.parent / "detector" / "config.json").read_text())
    assert (config["channels"], len(config["masked"])) == (128, 12)
    assert [step["kind"] for step in config["steps"]] == ["standardisation", "projection"]
    assert (config["image_size"], config["mean"]) == (40, [0.5, 0.5, 0.5])
    assert {"fingerprint", "step", "dist_fair", "checkpoint", "recipe"} <= config["provenance"].keys()
    assert config["provenance"]["fingerprint"].startswith(
        json.loads((run / "evaluation.json").read_text())["near"]["recipe"]
    )
    assert cli.main(["export", str(run), "interventions.subgroup_norm.inference=none"]) == 0
    said = capsys.readouterr().out
    assert "116 (12 removed)" in said
    config = json.loads((run / "detector" / "config.json").read_text())
    assert [step["kind"] for step in config["steps"]] == ["projection"]


def test_a_deployed_detector_needs_no_recipe(run, monkeypatch):
    """Neither Hydra nor a run; and `import dist_fair` does not even import torch."""
    succeed(call(sys.executable, "-c", "import dist_fair, sys; assert 'torch' not in sys.modules"))
    monkeypatch.delitem(sys.modules, "dist_fair.engine.deployment")
    for name in ("hydra", "omegaconf", "accelerate", "dist_fair.recipe.composition", "dist_fair.engine.assembly"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    image = next((run.parent / "images").iterdir())
    detector = dist_fair.load_detector(run.parent / "detector")
    scores = detector(detector.preprocess([image, image]))
    assert scores.shape == (2,)
    assert scores[0] == scores[1]
    assert 0 < scores[0] < 1
    assert predict(run.parent / "detector", image) == 0


def test_bad_images_are_told_and_the_rest_is_scored(run, tmp_path, capsys):
    images = tmp_path / "[red]faces"
    (images / "deep").mkdir(parents=True)
    good = [*sorted((run.parent / "images").iterdir())][:3]
    for number, source in enumerate(good):
        shutil.copy(source, images / "deep" / f"{number}.PNG")
    (images / "text.jpg").write_text("no image")
    (images / "cut.png").write_bytes(good[0].read_bytes()[:-30])
    (images / "notes.txt").write_text("not looked at")
    cv2.imwrite(str(images / "huge.png"), np.zeros((8000, 7000), np.uint8))
    out = tmp_path / "new" / "scores.parquet"
    assert predict(run.parent / "detector", images, images / "text.jpg", "--out", out, "--threshold", 0) == 3
    said = capsys.readouterr().out
    assert "3 of 6 images scored, 3 of them fake (score >= 0.0), 3 could not be read" in said
    assert "text.jpg: not a jpg, png or webp image" in said
    found = parquet.read_table(out).to_pydict()
    assert [Path(image).name for image in found["image"]] == [
        "cut.png",
        "0.PNG",
        "1.PNG",
        "2.PNG",
        "huge.png",
        "text.jpg",
    ]
    assert [score is None for score in found["score"]] == [True, False, False, False, True, True]
    assert found["verdict"] == ["", "fake", "fake", "fake", "", ""]
    assert ["IEND" in found["problem"][0], "7000 x 8000" in found["problem"][4]] == [True, True]
    assert predict(run.parent / "detector", *good, images / "cut.png") == 3  # few: a table
    table = capsys.readouterr().out
    assert "[red]faces" in table
    assert "not scored" in table
    assert "cut.png: the image is truncated (no IEND)" in table


def test_what_makes_no_sense_is_refused(run, tmp_path, capsys):
    detector, images = run.parent / "detector", run.parent / "images"
    (tmp_path / "empty").mkdir()
    cases = {
        (detector, tmp_path / "empty"): "no jpg, png or webp image in this folder",
        (detector, tmp_path / "nowhere.png"): "not there",
        (detector, images): "53 images are more than the screen shows",
        (detector, images, "--out", tmp_path / "scores.xlsx"): "ends in .csv or .parquet",
        (detector, images, "--out", tmp_path / "s.csv", "--threshold", "1.5"): "--threshold=1.5",
        (detector, images, "--out", tmp_path / "s.csv", "--batch-size", "0"): "--batch-size=0",
        (detector, images, "--out", tmp_path / "s.csv", "--device", "gpu"): "error: device=gpu",
        (images, images, "--out", tmp_path / "s.csv"): "`dist-fair export RUN` makes one",
        (detector, images, "--out", tmp_path / "empty" / ".." / "empty.csv" / "s.csv"): None,
    }
    for arguments, text in cases.items():
        assert predict(*arguments) == (2 if text else 0)
        assert (text or "") in capsys.readouterr().err
    exports = {
        (detector.parent / "images",): "neither a checkpoint nor a run folder",
        (run, "--out", detector): "is there: choose another --out, or --replace it",
        (run, "--out", run, "--replace"): "is there and no exported detector",
        (run, "--out", tmp_path / "new", "detector.norm=local"): "part of how",
        (run, "--out", tmp_path / "new", "interventions.subgroup_norm.inference=group"): "nobody knows a face's group",
    }
    for arguments, text in exports.items():
        assert cli.main(["export", *map(str, arguments)]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_recipe_that_was_changed_by_hand_is_noticed(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace("image_size: 40", "image_size: 48"))
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 2
    assert "is of another recipe than" in (said := capsys.readouterr().err)
    assert "data.image_size: 40, 48" in said
