"""`dist-fair sweep cluster=slurm` on a real Slurm; what is trained is a stand-in, but for one whole run."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from dist_fair import cli
from dist_fair.studies import job, slurm
from tests.command_line.runs import card
from tests.slurm import trained
from tests.studies.conftest import RECIPE


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
    assert cli.main(["train", *recipe, "evaluation.figures=false", f"out={folder}"]) == 0
    return folder


@pytest.fixture
def sweep(cluster, recipe, tmp_path, monkeypatch):
    """Runs the command in this process; returns its exit code."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(slurm, "POLL", 0.3)
    monkeypatch.setattr(slurm, "in_queue", lambda asked=slurm.in_queue: hurry(cluster, asked()))

    def run(*arguments: str) -> int:
        return cli.main(["sweep", *recipe, "cluster=slurm", f"out={tmp_path / 'out'}", *arguments])

    return run


@pytest.fixture
def stand_in(real, monkeypatch):
    """What each start of each run is to do."""
    monkeypatch.setattr(job, "PROGRAM", (sys.executable, "-S", trained.__file__))
    monkeypatch.setenv("TRAINED", str(real))
    return lambda **ends: monkeypatch.setenv("ENDS", json.dumps({name.replace("__", ","): end for name, end in ends.items()}))


def hurry(cluster, queue):
    """Requeued jobs start after 2 s; by itself Slurm lets them wait until their credentials expire."""
    for name, state in queue.items():
        told = cluster.run("scontrol", "-o", "show", "job", name)
        if state == "PENDING" and "Restarts=0" not in told and "Reason=BeginTime" in told and name not in HURRIED:
            cluster.run("scontrol", "update", f"jobid={name}", "starttime=now+2")
            HURRIED.add(name)
    return queue


HURRIED = set()


def calls(out: Path) -> dict[str, list[dict]]:
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}


GRID = ["optimizer.lr=0.01,0.02", "seed=0,1"]
NAMES = ["lr=0.01,seed=0", "lr=0.01,seed=1", "lr=0.02,seed=0", "lr=0.02,seed=1"]


def ends(monkeypatch, **told):
    monkeypatch.setenv("ENDS", json.dumps(told))


def test_four_runs_of_which_one_fails(sweep, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ENDS", json.dumps({"lr=0.02,seed=0": [2], "lr=0.01,seed=1": [75]}))
    out = tmp_path / "out"
    assert sweep(*GRID, "parallel=3", "ranks=2", "cpus=1") == 2
    told = capsys.readouterr()
    print(told.out, told.err)
    assert 0
