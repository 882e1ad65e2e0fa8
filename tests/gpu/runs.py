"""Runs of the program on the GPU, and on the CPU to compare with, in processes that begin when the tests begin.

A process that imports the program and finds the GPU takes 10 s, and all of `pytest -m gpu` may take three minutes. So
runs are put together into a few processes, which work beside each other and beside the process of pytest; what they
left behind is then looked at. A test module lists its own in APART,

    APART = {"backends": alone([("ddp", [...]), ("fsdp", [...])])}

and its tests call apart("backends")["ddp"] for the folder of that run. A run that failed fails those who ask for it.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch

from tests.conftest import STAND_IN

HERE = Path(__file__).parents[2]
DEVICE = os.environ.get(STAND_IN, "cuda")
TIMEOUT = 170.0 if DEVICE == "cuda" else 3000.0  # seconds for all runs of a process
Run = tuple[str, Sequence[str]]  # its folder, below that of its process; its arguments, all but out=

# Whatever the recipe: a few steps at the demo's scale, of which each has all that the method does.
SHORT = [
    "train.steps=3", "train.batch_size=32", "data.window=8", "data.image_size=64", "data.workers=2",
    "optimizer.lr=5e-4", "evaluation.at_end=false", "evaluation.bootstrap=5", "evaluation.figures=false",
    "wandb.mode=disabled",
]  # fmt: skip
_DECOUPLING = ("interventions.channel_decoupling.at=[0.4]", "interventions.channel_decoupling.batch_size=50",
               "interventions.channel_decoupling.batches=2")  # fmt: skip
_WORST = ("interventions.conditional_value_at_risk.delay=0", "interventions.conditional_value_at_risk.ramp=0")
_AT_ONCE = {
    "erm": (),
    "ipw": ("interventions.inverse_propensity.delay=0",),
    "daid": ("interventions.inverse_propensity.delay=0", "interventions.subgroup_norm.delay=0",
             "interventions.pair_alignment.delay=0", "interventions.pair_alignment.ramp=0"),
    "dag_fdd": _WORST,
    "daw_fdd": _WORST,
    "sfd_gda": (*_DECOUPLING, "interventions.distribution_alignment.delay=0"),
    "gda": ("interventions.distribution_alignment.delay=0",),
    "sfd": _DECOUPLING,
    "pg_fdd": (),
}  # fmt: skip
RECIPES = [*_AT_ONCE]
WITHOUT_SAM = "optimizer.sam.rho=null"


def recipe(name: str, *arguments: str) -> list[str]:
    """Arguments of a short run of a recipe, whose parts act from the first step on; the last ones win."""
    return [f"recipe={name}", *SHORT, *_AT_ONCE[name], *arguments]


# In this process ------------------------------------------------------------------------------------------------------


def train(out: Path, arguments: Sequence[str], device: str = DEVICE) -> Path:
    """A run in this process; its folder."""
    from dist_fair.train import main

    with on(device):
        assert main([*arguments, f"out={out}"]) == 0
    return out


@contextmanager
def on(device: str) -> Iterator[None]:
    """The program finds this device, "cuda" or "cpu"; accelerate remembers the first that it found in a process."""
    from accelerate.state import AcceleratorState

    hidden = mock.patch.object(torch.cuda, "device_count", return_value=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with hidden if device == "cpu" else nullcontext():
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# Processes of their own -----------------------------------------------------------------------------------------------


class Folders(Mapping[str, Path]):
    """The folders of runs by name. Raises AssertionError for one that failed, with its traceback."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, names

    def __getitem__(self, name: str) -> Path:
        failed = self.folder / f"{name}.failed"
        assert not failed.exists(), failed.read_text()
        assert (self.folder / name).is_dir(), f"{name} never began: {(self.folder / 'log').read_text()[-3000:]}"
        return self.folder / name

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def alone(runs: Sequence[Run], device: str = DEVICE, **environment: str) -> Callable[["Processes", Path], Folders]:
    """A task of APART: runs in turn in one process, whose words are in a file `log`. environment: "{folder}" in it is
    the folder of the task."""

    def task(processes: "Processes", folder: Path) -> Folders:
        listed = json.dumps([[*arguments, f"out={folder / name}"] for name, arguments in runs])
        settings = {name: value.format(folder=folder) for name, value in environment.items()}
        settings |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        (folder / "runs.json").write_text(listed)
        process = processes.start(folder, "tests.gpu.runs", str(folder / "runs.json"), **settings)
        process.wait(timeout=TIMEOUT)
        return Folders(folder, [name for name, _ in runs])

    return task


class Processes:
    """Those that were started, so that none is left."""

    def __init__(self):
        self._started: list[subprocess.Popen] = []

    def start(self, folder: Path, module: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """`python -m module` from this checkout, on no launcher's behalf, and leader of a process group of its own."""
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUBLAS_WORKSPACE_CONFIG")
        kept = {name: value for name, value in os.environ.items() if name not in launched}
        command = [sys.executable, "-m", module, *arguments]
        settings = kept | {"PYTHONPATH": path} | environment
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=HERE, env=settings, start_new_session=True)
        self._started.append(process)
        return process

    def kill(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


class Apart:
    """The tasks of APART under way: apart(name) waits for what one gives, or raises what it raised."""

    def __init__(self, tasks: Mapping[str, Callable[[Processes, Path], object]], folder: Path):
        # Each is a process with two loading workers; where cores are few they come one after the other.
        self._pool, self._processes = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)), Processes()
        self._begun: dict[str, Future] = {}
        for name, task in tasks.items():
            own = folder / name.replace(", ", "-").replace(" ", "-")  # compilers do not take every path
            own.mkdir()
            self._begun[name] = self._pool.submit(task, self._processes, own)

    def __call__(self, name: str) -> object:
        return self._begun[name].result()

    def close(self) -> None:
        """Whatever nobody waited for ends here."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._processes.kill()


def _run_all(listed: Path) -> None:
    from dist_fair.train import main

    for arguments in json.loads(listed.read_text()):
        try:
            assert main(arguments) == 0
        except BaseException:
            Path(arguments[-1].removeprefix("out=") + ".failed").write_text(traceback.format_exc()[-8000:])


if __name__ == "__main__":
    _run_all(Path(sys.argv[1]))
