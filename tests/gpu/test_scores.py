"""Evaluate, export and predict give the same scores on a GPU as on the CPU, in fp32, to 1e-4."""

import csv
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dist_fair import evaluate, export, predict
from tests.command_line.runs import predictions
from tests.gpu.runs import DEVICE, on, recipe, train

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-4
SET = "in_domain"
# Subgroup norm, a projection and masked channels: all that lies between features and score.
RECIPE = recipe(
    "daid", "train.steps=40", "optimizer.lr=2e-3", f"data.eval=[{SET}]", "evaluation.at_end=true", "data.image_size=48",
    "interventions.low_rank_projection.rank=16",
    "+interventions.channel_decoupling={batch_size: 50, batches: 1, at: [0.3], part: 0.05}",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory) -> Path:
    """A run that was trained and evaluated on the GPU."""
    return train(tmp_path_factory.mktemp("scores") / "run", RECIPE)


@pytest.fixture(scope="module")
def expected(run) -> dict[str, float]:
    """Sample -> its score, as the CPU evaluates the checkpoint."""
    with on("cpu"):
        assert evaluate.main([str(run), "--out", str(run.parent / "cpu")]) == 0
    return scores(run.parent / "cpu")


def scores(run):
    columns = predictions(run, SET)
    return dict(zip(columns["sample_id"], columns["score"], strict=True))


def difference(found, expected):
    """Largest difference of two scores of a sample; those of the CPU differ by much more from each other."""
    assert found.keys() == expected.keys()
    assert len(found) >= 90
    assert np.std([*expected.values()]) > 100 * TOLERANCE
    return max(abs(found[name] - expected[name]) for name in found)


def test_evaluation_at_the_end_of_the_training(run, expected):
    assert difference(scores(run), expected) < TOLERANCE


def test_evaluate(run, expected):
    with on(DEVICE):
        assert evaluate.main([str(run), "--out", str(run.parent / "again")]) == 0
    assert difference(scores(run.parent / "again"), expected) < TOLERANCE


@pytest.mark.parametrize("device", {DEVICE: (), "cpu": ()})
def test_predict_with_what_was_exported(run, expected, drawn, device, tmp_path):
    with tarfile.open(*(drawn / SET).glob("*.tar")) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".jpg"):
                (tmp_path / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    detector = run.parent / f"detector-{device}"
    with on(device):
        assert export.main([str(run), "--out", str(detector)]) == 0
        arguments = [str(detector), str(tmp_path), "--out", str(tmp_path / "s.csv"), "--device", device]
        assert predict.main([*arguments, "--batch-size", "32"]) == 0
    with (tmp_path / "s.csv").open() as file:
        found = {Path(row["image"]).stem: float(row["score"]) for row in csv.DictReader(file)}
    assert difference(found, expected) < TOLERANCE
