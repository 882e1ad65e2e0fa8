"""The program as a person or a batch system stops it: one signal to every process that it has, data workers too.

Where in a run it may come is shown by test_interrupted.py; here the processes are those of a shell.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_fair.errors import Exit
from tests.command_line.interrupted import endings
from tests.command_line.runs import TOLERANCE, difference, metrics

TIMEOUT = 200  # seconds to start, or to end, on a busy machine
ERM = [
    "recipe=erm", "train.batch_size=12", "data.lanes=12", "data.window=8", "data.image_size=32", "log.every=1",
    "detector.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}", "wandb.mode=disabled",
    "train.steps=100000", "evaluation.at_end=false",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def command(data, run):
    return [*ERM, f"data={data}", "data.workers=2", f"out={run}"]


@pytest.fixture
def started(run):
    """started(*arguments): a run in a process group of its own, in its third step or later."""
    processes = []

    def start(*arguments: str) -> subprocess.Popen:
        told = run / "metrics.jsonl"
        before = told.read_text().count("\n") if told.exists() else 0
        settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        with open(f"{run}.log", "w") as log:
            processes.append(
                subprocess.Popen([sys.executable, "-m", "dist_fair.train", *arguments], stdout=log, stderr=log,
                                 start_new_session=True, env=os.environ | settings)
            )  # fmt: skip
        deadline = time.monotonic() + TIMEOUT
        while not told.exists() or told.read_text().count("\n") < before + 2:
            assert processes[-1].poll() is None, said(run)
            assert time.monotonic() < deadline, said(run)
            time.sleep(0.02)
        return processes[-1]

    yield start
    for process in processes:
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            one.kill()
        process.wait()


def said(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def test_a_signal_to_the_process_group_stops_it_with_a_checkpoint(command, run, started):
    process = started(*command)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(TIMEOUT) == Exit.PREEMPTED, said(run)
    stopped = len(metrics(run))
    assert "Traceback" not in said(run)
    assert said(run).endswith(f"step {stopped}: stopped by SIGTERM on rank 0; checkpointed; the same command goes on\n")

    process = started(*command)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(TIMEOUT) == Exit.INTERRUPTED, said(run)
    assert f"{run} goes on from step-{stopped:08d}" in said(run)
    assert said(run).endswith("interrupted\n")
    assert "Traceback" not in said(run)

    undisturbed, steps = run.with_name("undisturbed"), stopped + 5
    for out, more in ((run, 5), (undisturbed, steps)):
        (ended,) = endings(1, [*command, "data.workers=0", f"out={out}", f"train.stop_after={more}"])
        assert ended.code == 0, ended.said
    assert difference(undisturbed, run, range(steps)) < TOLERANCE


def test_a_signal_to_all_processes_of_several_ranks_stops_them_with_a_checkpoint(command, run, started):
    """As Slurm sends it: to the launcher, the ranks, and their workers."""
    process = started(*command, "--ranks", "2")
    everyone = [process, *psutil.Process(process.pid).children(recursive=True)]
    workers = [one for one in everyone[1:] if one.name() == "pt_data_worker"]
    assert len(workers) == 4
    for one in everyone:
        one.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == Exit.PREEMPTED, said(run)
    steps = len(metrics(run))
    assert f"step {steps}: stopped by SIGTERM on rank " in said(run)
    assert (run / "checkpoints" / f"step-{steps:08d}").is_dir()
    assert "Traceback" not in said(run)
    assert not any(one.is_running() for one in everyone[1:])
