"""`dist-fair sweep cluster=slurm` on a real Slurm; what is trained is a stand-in, but for one long test."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import parquet

from dist_fair import cli
from dist_fair.studies import job, slurm
from tests.command_line.runs import card
from tests.slurm import trained
from tests.studies.conftest import RECIPE

GRID = ["optimizer.lr=0.01,0.02", "seed=0,1"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The arguments of a run of four steps."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "tiny.yaml").write_text(RECIPE)
    return [f"recipe={root / 'tiny.yaml'}", f"data={card(root)}", "data.eval=[far]"]


@pytest.fixture(scope="module")
def real(recipe, tmp_path_factory):
    """A real run of it, which the stand-in copies."""
    folder = tmp_path_factory.mktemp("real") / "run"
    assert cli.main(["train", *recipe, "evaluation.bootstrap=0", "evaluation.figures=false", f"out={folder}"]) == 0
    return folder


@pytest.fixture
def looks():
    """What the command has seen in the queue, look by look."""
    return []


@pytest.fixture
def sweep(cluster, recipe, looks, tmp_path, monkeypatch):
    """Runs the command in this process, into OUT; returns its exit code."""
    hurried: set[str] = set()

    def in_queue(asked=slurm.in_queue):
        """Requeued jobs start after 2 s; by itself Slurm lets them wait until their credentials expire."""
        for name in (queue := asked()):
            told = cluster.run("scontrol", "-o", "show", "job", name)
            if "Reason=BeginTime" in told and name not in hurried:
                cluster.run("scontrol", "update", f"jobid={name}", "starttime=now+2")
                hurried.add(name)
        looks.append(queue)
        return queue

    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(slurm, "POLL", 0.3)
    monkeypatch.setattr(slurm, "in_queue", in_queue)
    return lambda *arguments: cli.main(["sweep", *recipe, "cluster=slurm", f"out={tmp_path / 'out'}", *arguments])


@pytest.fixture
def stand_in(real, monkeypatch):
    """Tells what each start of each run is to do: `trained.ENDS`."""
    monkeypatch.setattr(job, "PROGRAM", (sys.executable, "-S", trained.__file__))
    monkeypatch.setenv("TRAINED", str(real))
    return lambda ends: monkeypatch.setenv("ENDS", json.dumps(ends))


def calls(out: Path) -> dict[str, list[dict]]:
    """The starts of each run."""
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}


def when(true: Callable[[], bool], then: Callable[[], object]) -> None:
    """Does something beside the test, as soon as something is true."""

    def wait() -> None:
        while not true():
            time.sleep(0.1)
        then()

    threading.Thread(target=wait, daemon=True).start()


def test_one_of_four_runs_fails_one_is_pre_empted_and_the_same_command_does_the_rest(sweep, stand_in, tmp_path, capsys):
    out = tmp_path / "out"
    stand_in({"lr=0.02,seed=0": [2], "lr=0.01,seed=1": [75]})
    assert sweep(*GRID, "parallel=3", "cpus=1") == 2
    told = capsys.readouterr()
    failed = out / "lr=0.02,seed=0"
    assert "4 runs in" in told.out
    assert "submitted 4 runs as job" in told.out
    assert told.err.startswith("error: 1 of 4 runs failed; the same command again trains only what is missing\n")
    assert f"FAILED, exit code 2; {failed}.log ends:\n    rank 0 of 1, start 0\n    error: told to end" in told.err
    assert {name: len(starts) for name, starts in calls(out).items()} == {
        "lr=0.01,seed=0": 1, "lr=0.01,seed=1": 2, "lr=0.02,seed=0": 1, "lr=0.02,seed=1": 1,
    }  # fmt: skip
    (script,) = (out / ".slurm").glob("[0-9]*_submission.sh")
    assert "#SBATCH --array=0-3%3" in script.read_text()
    assert parquet.read_table(out / "leaderboard.parquet").select(["setting", "runs", "planned"]).to_pylist() == [
        {"setting": "lr=0.01", "runs": 2, "planned": 2},
        {"setting": "lr=0.02", "runs": 1, "planned": 2},
    ]
    assert "Incomplete: 1 of 4 runs failed." in (out / "leaderboard.md").read_text()

    before = calls(out)
    assert sweep(*GRID, "cpus=1") == 0
    assert "3 of 4 runs are finished\nsubmitted 1 runs as job" in capsys.readouterr().out
    assert {name for name, starts in calls(out).items() if len(starts) > len(before[name])} == {failed.name}
    assert "ncomplete" not in (out / "leaderboard.md").read_text()


def test_a_stopped_sweep_leaves_its_jobs_and_finds_them_again(cluster, sweep, stand_in, looks, tmp_path, capsys):
    """Of the two jobs that the second command finds, one is then asked to stop, as at its time limit, one cancelled."""
    out = tmp_path / "out"
    stand_in({"lr=0.01": ["wait"], "lr=0.02": ["wait"]})
    when(lambda: len(calls(out)) == 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert sweep(GRID[0], "ranks=2") == 130
    jobs = json.loads((out / "jobs.json").read_text())
    array = jobs["lr=0.01"].partition("_")[0]
    told = capsys.readouterr()
    assert f"2 runs stay in the queue: the same command watches them again, `scancel {array}` ends them" in told.out
    assert sweep(GRID[0], "--dry-run") == 0
    assert f"lr=0.01: running as job {jobs['lr=0.01']}\n" in capsys.readouterr().out

    def end() -> None:
        cluster.run("scancel", "--signal=USR2", jobs["lr=0.01"])
        cluster.run("scancel", jobs["lr=0.02"])

    before = len(looks)
    when(lambda: len(looks) > before + 2, end)
    assert sweep(GRID[0], "ranks=2") == 2
    told = capsys.readouterr()
    assert "2 runs are in the queue already" in told.out
    assert "submitted" not in told.out
    assert f"job {jobs['lr=0.02']}: CANCELLED" in told.err
    assert json.loads((out / "jobs.json").read_text()) == jobs
    first, second = calls(out)["lr=0.01"]
    assert first["SLURM_JOB_ID"] == second["SLURM_JOB_ID"]
    assert (second["RANK"], second["WORLD_SIZE"], second["MASTER_ADDR"]) == ("0", "2", "127.0.0.1")
    assert len(calls(out)["lr=0.02"]) == 1
    assert (out / "lr=0.01.log.1").read_text().startswith("rank 1 of 2")


def test_what_sbatch_refuses_is_said(sweep, stand_in, tmp_path, capsys):
    assert sweep("seed=0", "partition=nowhere") == 2
    assert "error: sbatch refused the jobs: " in (told := capsys.readouterr().err)
    assert "invalid partition" in told.lower()
    assert not (tmp_path / "out" / "jobs.json").exists()


@pytest.mark.long
def test_two_real_runs_on_two_ranks_each(sweep, tmp_path):
    assert sweep("optimizer.lr=0.01,0.02", "ranks=2", "cpus=1") == 0
    table = parquet.read_table(tmp_path / "out" / "leaderboard.parquet").to_pydict()
    assert table["runs"] == [1, 1]
