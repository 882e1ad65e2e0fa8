"""A study's runs: only what is missing is trained, nothing stale is taken."""

import contextlib
import io
import json
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from dist_fair import cli
from dist_fair.errors import DistFairError
from dist_fair.studies import runs
from dist_fair.studies.runs import Run, finished, over_seeds, results, train_all
from tests.command_line.runs import losses, metrics

FOLDER = "a study, of (three) = it's"  # whatever Hydra's grammar could stumble over


@pytest.fixture(scope="module")
def study(erm, tmp_path_factory):
    """A run that was finished, one that fails and one that was half done; what was printed; the error."""
    root = tmp_path_factory.mktemp("studies") / FOLDER
    whole, half = (Run(root / name, erm) for name in ("whole", "half"))
    broken = Run(root / "broken", (*erm, "detector.init_from=nowhere"))
    assert cli.main(["train", *whole.overrides]) == 0
    assert cli.main(["train", *half.overrides, "train.stop_after=2"]) == 0
    half.log.write_text("its first start\n")
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(DistFairError) as error:
        train_all([whole, broken, half], jobs=2)
    return whole, broken, half, printed.getvalue(), str(error.value)


def contents(folder: Path) -> dict:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# What is trained


def test_a_failing_run_is_listed_with_its_last_words_and_the_others_finish(study):
    whole, broken, half, _, error = study
    assert error.startswith("1 of 3 runs failed; the same command again trains only what is missing\n")
    assert f"{broken.folder}: exit code 2; {broken.log} ends:" in error
    assert "    error: nowhere is neither a checkpoint nor a run folder" in error
    assert "whole" not in error
    assert [finished(run) for run in (whole, broken, half)] == [True, False, True]
    assert {*results(whole)} == {"near", "far"}


def test_a_half_done_run_goes_on_and_its_log_too(study):
    whole, _, half, printed, _ = study
    assert [line["step"] for line in metrics(half.folder)] == [0, 1, 2, 3]
    np.testing.assert_allclose(losses(half.folder), losses(whole.folder), rtol=1e-5)
    assert f"{half.folder}: goes on from step-00000002" in printed
    assert half.log.read_text().startswith("its first start\n$ dist-fair train recipe=")
    assert "train 4/4" in half.log.read_text()


def test_a_line_tells_of_each_start_and_end(study):
    whole, broken, half, printed, _ = study
    assert printed.startswith("1 of 3 runs are finished\n")
    assert str(whole.folder) not in printed
    assert f"{broken.folder}: starts\n" in printed
    assert f"{broken.folder}: exit code 2 after " in printed
    assert f"{half.folder}: finished after " in printed
    assert [line.split("  ")[0] for line in printed.splitlines() if line.startswith("runs ")] == [
        "runs 2/3",
        "runs 3/3",
    ]


def test_finished_runs_are_left_alone(study, monkeypatch, capsys):
    whole, _, half, _, _ = study
    before = contents(whole.folder.parent)
    monkeypatch.setattr(runs, "_start", lambda *_: pytest.fail("started"))
    train_all([whole, half], jobs=2)
    assert contents(whole.folder.parent) == before
    assert capsys.readouterr().out == "2 of 2 runs are finished\n"


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_jobs_at_a_time(erm, tmp_path, started, jobs):
    processes = started("sleep 0.3")
    train_all(over_seeds(tmp_path, "run", erm, range(3)), jobs)
    assert len(processes) == 3
    assert max(process.others for process in processes) == jobs - 1


def test_a_killed_run_is_called_so(erm, tmp_path, started):
    started("kill -9 $$")
    with pytest.raises(DistFairError, match=r"killed by SIGKILL; .*run-0.log ends:\n    line 4\n(.*\n){3}    line 8$"):
        train_all(over_seeds(tmp_path, "run", erm, [0]))


@pytest.mark.parametrize(("given", "threads"), [(None, "1"), ("3", "3")])
def test_one_thread_a_rank_unless_told_otherwise(erm, tmp_path, monkeypatch, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    full = OSError(28, "No space left on device")
    with (
        mock.patch.object(subprocess, "Popen", side_effect=full) as popen,
        pytest.raises(DistFairError, match=r"run.log cannot be written \(No space left"),
    ):
        train_all([Run(tmp_path / "run", erm)], ranks=2)
    (command,), settings = popen.call_args
    assert command[1:] == ["-m", "dist_fair.train", *erm, f"out='{tmp_path}/run'", "--ranks", "2"]
    assert settings["env"]["OMP_NUM_THREADS"] == threads


# What counts as finished


@pytest.mark.parametrize(("changed", "is_finished"), [
    ("data.eval=[near]", True),
    ("evaluation.bootstrap=5", False),
    ("train.steps=8", False),
    ("train.epochs=0.8", True),
    ("train.epochs=2", False),
])  # fmt: skip
def test_finished_by_what_is_asked_for(study, changed, is_finished):
    assert finished(Run(study[0].folder, (*study[0].arguments, changed))) == is_finished


@pytest.mark.parametrize("change", [
    lambda found: found.pop("far"),
    lambda found: found["far"].update(checkpoint="step-00000002"),
    lambda found: found["near"].update(intervals={"replicates": 200}),
])  # fmt: skip
def test_a_partial_or_early_evaluation_is_not_the_end(study, tmp_path, change):
    run = Run(tmp_path / "run", study[0].arguments)
    shutil.copytree(study[0].folder, run.folder)
    assert finished(run)
    found = json.loads((run.folder / "evaluation.json").read_text())
    change(found)
    (run.folder / "evaluation.json").write_text(json.dumps(found))
    assert not finished(run)
    assert runs.state(run) == "goes on from step-00000004"


def test_results_are_those_of_the_sets_asked_for(study):
    assert [*results(Run(study[0].folder, (*study[0].arguments, "data.eval=[far]")))] == ["far"]


# What is refused before anything starts


@pytest.mark.parametrize("changed", ["optimizer.lr=1", "seed=5", "train.steps=8"])
def test_a_finished_run_must_be_the_one_asked_for(study, monkeypatch, changed):
    whole = study[0]
    monkeypatch.setattr(runs, "_start", lambda *_: pytest.fail("started"))
    key, _, value = changed.partition("=")
    with pytest.raises(DistFairError, match=rf"whole holds another run \(then, now\): {key}: [^;]*, {value}.*: remove"):
        train_all([Run(whole.folder.with_name("new"), whole.arguments),
                   Run(whole.folder, (*whole.arguments, changed))])  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), [
    ("optimizer.lrr=1", "last: command line: unknown key optimizer.lrr: did you mean 'optimizer.lr'?"),
    ("evaluation.at_end=false", "last: evaluation.at_end (command line): a study reads what its runs find"),
    ("data.eval=[]", "last: data.eval (command line): a study reads what its runs find: name evaluation sets"),
    ("train.stop_after=1", "last: train.stop_after (command line): a run of a study trains to its end"),
])  # fmt: skip
def test_a_mistake_in_the_last_run_stops_the_first(erm, tmp_path, monkeypatch, changed, message):
    monkeypatch.setattr(runs, "_start", lambda *_: pytest.fail("started"))
    with pytest.raises(DistFairError) as error:
        train_all([Run(tmp_path / "first", erm), Run(tmp_path / "last", (*erm, changed))])
    assert message in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_two_runs_in_one_folder(erm, tmp_path):
    with pytest.raises(DistFairError, match="run-0: two runs in one folder"):
        train_all([*over_seeds(tmp_path, "run", erm, [0, 1]), *over_seeds(tmp_path / "x" / "..", "run", erm, [0])])


def test_folders_of_something_else(erm, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(DistFairError, match="notes is not empty and no run folder"):
        train_all([Run(tmp_path / "notes", erm)])
    with pytest.raises(DistFairError, match="file is a file"):
        train_all([Run(tmp_path / "file", erm)])
    with pytest.raises(DistFairError, match=r"run.log cannot be written \(File exists"):
        train_all([Run(tmp_path / "file" / "run", erm)])


@pytest.mark.parametrize("counts", [{"jobs": 0}, {"ranks": -1}])
def test_counts_are_positive(erm, tmp_path, counts):
    with pytest.raises(DistFairError, match="at least 1"):
        train_all([Run(tmp_path, erm)], **counts)


def test_a_launched_rank_starts_no_study(erm, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DistFairError, match="start it once, without torchrun"):
        train_all([Run(tmp_path, erm)])
