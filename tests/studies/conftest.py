"""What studies are tried on: small drawn data, a recipe of four steps, and shell scripts in place of trainings."""

import os
import subprocess
from unittest import mock

import pytest
import torch

from dist_fair.studies import runs
from tests.command_line.runs import card

RECIPE = """
defaults: [erm]
train: {steps: 4, batch_size: 32}
data: {window: 8, image_size: 32}
checkpoint: {every: 2}
evaluation: {bootstrap: 0, batch_size: 24}
wandb: {mode: disabled}
detector: {arguments: {layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}}
"""


@pytest.fixture(scope="package", autouse=True)
def no_gpu():
    gone = mock.patch.object(torch.cuda, "device_count", return_value=0)
    with gone, mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The card of a small data set; tests only read it."""
    return card(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="session")
def erm(data, tmp_path_factory):
    """The arguments of a run."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return f"recipe={path}", f"data={data}"


@pytest.fixture
def started(monkeypatch):
    """Puts a shell script in place of each training and returns the processes; `others`: how many ran at its start.

    number: a signal that comes while the second one starts.
    """

    def put(script: str, number: int | None = None) -> list[subprocess.Popen]:
        processes = []

        def start(run, ranks):
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            run.log.write_text("\n".join(f"line {number}" for number in range(9)))
            others = sum(process.poll() is None for process in processes)
            processes.append(subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL))
            processes[-1].others = others
            if number and len(processes) == 2:
                os.kill(os.getpid(), number)
            return processes[-1]

        monkeypatch.setattr(runs, "_start", start)
        return processes

    return put
