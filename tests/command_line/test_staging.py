"""Training and evaluation that read copies on a local disk."""

import re
from pathlib import Path

import pytest

from dist_fair import evaluate
from tests.command_line.runs import QUICK_WITHOUT_METHODS, difference, predictions
from tests.command_line.several import Start, together


def copied(disk: Path) -> list[str]:
    """The data sets that lie there, in alphabetical order."""
    return sorted(path.name.rpartition("-")[0] for path in disk.iterdir() if path.is_dir())


def test_a_staged_run_is_the_same_run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["recipe=erm", f"data={data}", *QUICK_WITHOUT_METHODS, "train.steps=4", "evaluation.bootstrap=0"]
    staged = [*arguments, f"data.stage_to={tmp_path}/disk"]
    together(2, [Start(tmp_path / "plain", arguments), Start(tmp_path / "staged", staged)])
    assert difference(tmp_path / "plain", tmp_path / "staged") == 0
    assert predictions(tmp_path / "plain", "near") == predictions(tmp_path / "staged", "near")
    assert copied(tmp_path / "disk") == ["far", "near", "train"]
    assert re.search(r"^stage (\d)/\1 ", (tmp_path / "staged.log").read_text(), re.MULTILINE)
    monkeypatch.setenv("DISK", str(tmp_path / "other"))
    assert evaluate.main([str(tmp_path / "plain"), "data.stage_to=$DISK", "--out", str(tmp_path / "own")]) == 0
    assert copied(tmp_path / "other") == ["far", "near"]
    assert predictions(tmp_path / "own", "far")["sample_id"] == predictions(tmp_path / "plain", "far")["sample_id"]
