"""Runs of the program on the GPU, in this process or in one of their own, and on the CPU to compare with.

Two processes' worth of imports is 20 s of the three minutes that `pytest -m gpu` may take. So most runs happen in the
process of pytest; what needs one of its own (a process group, a setting that torch reads once, a signal) begins when
the tests begin, several at a time, and is waited for by whoever asks: a test module lists it in APART,

    APART = {"backends": lambda folder: alone(folder, [("ddp", [...]), ("fsdp", [...])])}

and its tests call apart("backends").
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState

from tests.conftest import STAND_IN

HERE = Path(__file__).parents[2]
DEVICE = os.environ.get(STAND_IN, "cuda")
TIMEOUT = 170.0 if DEVICE == "cuda" else 1200.0  # seconds for the runs of a process
Run = tuple[str, Sequence[str]]  # its folder, below that of its process; its arguments, all but out=

# Whatever the recipe: a few steps at the demo's scale, of which each has all that the method does.
SHORT = [
    "train.steps=3", "train.batch_size=32", "data.window=8", "data.image_size=64", "data.workers=2",
    "optimizer.lr=5e-4", "evaluation.at_end=false", "evaluation.bootstrap=5", "evaluation.figures=false",
    "wandb.mode=disabled",
]  # fmt: skip
_DECOUPLING = ("interventions.channel_decoupling.at=[0.4]", "interventions.channel_decoupling.batch_size=50",
               "interventions.channel_decoupling.batches=2")  # fmt: skip
_AT_ONCE = {
    "erm": (),
    "ipw": ("interventions.inverse_propensity.delay=0",),
    "daid": ("interventions.inverse_propensity.delay=0", "interventions.subgroup_norm.delay=0",
             "interventions.pair_alignment.delay=0", "interventions.pair_alignment.ramp=0"),
    "dag_fdd": ("interventions.conditional_value_at_risk.delay=0", "interventions.conditional_value_at_risk.ramp=0"),
    "daw_fdd": ("interventions.conditional_value_at_risk.delay=0", "interventions.conditional_value_at_risk.ramp=0"),
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


def train(out: Path, arguments: Sequence[str], device: str = DEVICE) -> Path:
    """A run in this process; its folder."""
    from dist_fair.train import main

    with on(device):
        assert main([*arguments, f"out={out}"]) == 0
    return out


@contextmanager
def on(device: str) -> Iterator[None]:
    """The program finds this device, "cuda" or "cpu"; accelerate remembers the first that it found in a process."""
    hidden = mock.patch.object(torch.cuda, "device_count", return_value=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with hidden if device == "cpu" else nullcontext():
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# Processes of their own -----------------------------------------------------------------------------------------------


def alone(folder: Path, runs: Sequence[Run], **environment: str) -> Path:
    """Runs in turn in one new process; their folder, where a file `log` has what they said."""
    folder.mkdir()
    listed = json.dumps([[*arguments, f"out={folder / name}"] for name, arguments in runs])
    with (folder / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-m", "tests.gpu.runs", listed], stdout=log, stderr=subprocess.STDOUT,
                              env=surroundings(**environment), cwd=HERE, timeout=TIMEOUT)  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{(folder / 'log').read_text()[-6000:]}"
    return folder


def surroundings(**environment: str) -> dict[str, str]:
    """The environment of a process that runs the program from this checkout, on no launcher's behalf."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUBLAS_WORKSPACE_CONFIG")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if DEVICE == "cpu" else {}
    return kept | {"PYTHONPATH": path} | hidden | environment


class Apart:
    """What was begun in processes of their own: apart(name) waits for what it gives, or raises what it raised."""

    def __init__(self, tasks: Mapping[str, Callable[[Path], object]], folder: Path):
        # Each is a process with two loading workers; on a machine of few cores they would time each other out.
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 3))
        self._begun: dict[str, Future] = {name: self._pool.submit(task, folder / name) for name, task in tasks.items()}

    def __call__(self, name: str) -> object:
        return self._begun[name].result()

    def close(self) -> None:
        """Begins nothing more, and waits for what was begun."""
        self._pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    from dist_fair.train import main

    for one in json.loads(sys.argv[1]):
        assert main(one) == 0
