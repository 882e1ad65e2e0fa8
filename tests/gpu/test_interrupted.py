"""A signal to the whole process group, loading workers included: a checkpoint, exit code 75, and on it goes."""

import os
import signal
import time

import pytest

from tests.command_line.runs import difference, losses, metrics
from tests.gpu.runs import DEVICE, recipe, train

pytestmark = pytest.mark.gpu
STEPS = 400  # more than are done before the signal
ARGUMENTS = recipe("daid", "train.precision=fp64", f"train.steps={STEPS}", "checkpoint.every=1000", "log.every=100")


def stopped(processes, folder):
    """A run that was asked to stop at some step, by SIGTERM to its process group: its folder, exit code, last words."""
    run = folder / "run"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if DEVICE == "cpu" else {}
    process = processes.start(folder, "dist_fair.train", *ARGUMENTS, f"out={run}", **hidden)
    while process.poll() is None and not under_way(run):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    code = process.wait(timeout=60)
    return run, code, (folder / "log").read_text()[-3000:]


def under_way(run):
    return (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= 3


APART = {"stopped": stopped}


def test_a_process_group_that_is_stopped_leaves_a_checkpoint_and_goes_on(apart, tmp_path):
    run, code, said = apart("stopped")
    assert code == 75, said
    done = len(metrics(run))
    assert 3 <= done < STEPS
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{done:08d}"]
    train(run, [*ARGUMENTS, "train.stop_after=3"])
    assert [line["step"] for line in metrics(run)] == [*range(done + 3)]
    undisturbed = train(tmp_path / "undisturbed", [*ARGUMENTS, f"train.stop_after={done + 3}"])
    assert len(losses(undisturbed)) == done + 3
    assert difference(undisturbed, run) < 1e-8
