"""What a checkpoint costs training, in ratios measured in one run: `python benchmarks/checkpoint_stall.py`.

The state of a detector with AdamW's moments is saved every few steps: `synchronous` waits for the write in each save,
as `torch.save` does; `background` goes on while a thread writes. The stall is the time in `save` (and, synchronous, in
`finish`); what the thread costs the steps beside it, by taking turns on the cores, is in `steps beside a write`: the
time of a step while a write is in flight over that of one while none is. `read in steps`: what a run that resumes
waits for its newest checkpoint, hashes and all, from the memory of the system.

By the clock, for waiting is what is measured; medians over rounds that measure each way once, with the spread of the
middle 60 per cent. About two minutes on two cores. Prints Markdown and writes it to
benchmarks/results/checkpoint_stall.md.
"""

import argparse
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from timing import ratio_cells
from torch import nn

from dist_fair.cli import guarded
from dist_fair.collectives import Communicator
from dist_fair.engine import checkpoint
from dist_fair.engine.run_folder import write_text
from dist_fair.engine.saving import Saver
from dist_fair.errors import DistFairError
from dist_fair.reporting.progress import Progress
from dist_fair.reporting.tables import markdown

RESULTS = Path(__file__).parent / "results" / "checkpoint_stall.md"
SYNCHRONOUS, BACKGROUND = "synchronous", "background"


@dataclass(frozen=True)
class Setting:
    """A detector, its input and how often it is saved; a write is over before the next one is due."""

    device: str
    detector: str
    pixels: int
    batch: int
    every: int
    rounds: int


SETTINGS = (
    Setting("cpu", "resnet18", 64, 8, 10, 6),
    Setting("cpu", "resnet50", 64, 8, 10, 4),
    Setting("cuda", "resnet50", 224, 64, 100, 20),
)


class Plain:
    """A detector in training without the rest of a run: what a Saver needs of a backend, and a step."""

    name = "plain"

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        self.module = timm.create_model(setting.detector, num_classes=2).to(setting.device).train()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 1e-4)
        self.images = torch.randn(setting.batch, 3, setting.pixels, setting.pixels, device=setting.device)
        self.labels = torch.arange(setting.batch, device=setting.device) % 2

    def step(self) -> float:
        """Forward, backward and the optimizer's; the loss, for which the device is waited, as in a run."""
        loss = nn.functional.cross_entropy(self.module(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def state(self, owned) -> dict[str, checkpoint.Tensors]:
        """As of a backend."""
        model = {name: value.detach().to("cpu", copy=True) for name, value in self.module.state_dict().items()}
        return {"model": model, "optimizer": checkpoint.optimizer_tensors(self.module, self.optimizer, owned)}


@dataclass
class Times:
    """Seconds of one way in one round: a save's stall, and steps with a write in flight and with none."""

    stall: float = 0.0
    beside: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


def timed(backend: Plain, saver: Saver, number: int, every: int, wait: bool) -> Times:
    """A save and the steps up to the next one."""
    times, began = Times(), time.perf_counter()
    saver.save(number, backend)
    if wait:
        saver.finish()
    times.stall = time.perf_counter() - began
    for _ in range(every):
        busy, began = saver.busy, time.perf_counter()
        backend.step()
        taken = time.perf_counter() - began
        if busy == saver.busy:  # else part of it was beside a write
            (times.beside if busy else times.alone).append(taken)
    saver.finish()
    return times


def measured(setting: Setting, rounds: int, root: Path) -> dict[str, list[Times]]:
    """The times of both ways in each round, after one round to warm up."""
    backend, order = Plain(setting), random.Random(0)
    saver = Saver(root, {}, Communicator(), keep=1)
    found: dict[str, list[Times]] = {SYNCHRONOUS: [], BACKGROUND: []}
    backend.step()
    with Progress(2 * (rounds + 1), f"{setting.detector} on {setting.device}", every=2) as progress:
        for number in range(rounds + 1):
            for place, way in enumerate(order.sample([*found], 2)):
                found[way].append(timed(backend, saver, 2 * number + place, setting.every, way == SYNCHRONOUS))
                progress.step()
    return {way: times[1:] for way, times in found.items()}


def rows(setting: Setting, rounds: int | None, folder: Path | None) -> list[list[str]]:
    """The rows of a setting, one per way."""
    root = Path(tempfile.mkdtemp(prefix="checkpoint_stall", dir=folder))
    try:
        found = measured(setting, rounds or setting.rounds, root)
        size = sum(path.stat().st_size for path in checkpoint.newest(root).iterdir()) / 2**20
        read = [seconds_to_read(checkpoint.newest(root)) for _ in range(3)]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    stalls = {way: np.array([one.stall for one in times]) for way, times in found.items()}
    step = np.median([taken for way in found for one in found[way] for taken in one.alone])
    beside = np.array([taken / step for one in found[BACKGROUND] for taken in one.beside])
    start = [setting.device, setting.detector, str(setting.pixels), str(setting.batch), f"{size:,.0f}"]
    last = {SYNCHRONOUS: "-", BACKGROUND: ratio_cells(beside, 2)[0] if len(beside) else "-"}
    return [[*start, way, f"{np.median(stall) * 1e3:,.0f}", *ratio_cells(stall / step, 2),
             *ratio_cells(stall / stalls[SYNCHRONOUS], 3), last[way], f"{np.median(read) / step:.2f}"]
            for way, stall in stalls.items()]  # fmt: skip


def seconds_to_read(folder: Path) -> float:
    """How long a resume takes to have a checkpoint's tensors, checked."""
    began = time.perf_counter()
    found = checkpoint.read(folder)
    for part in checkpoint.PARTS:
        found.tensors(part)
    return time.perf_counter() - began


def report(devices: Sequence[str], rounds: int | None, folder: Path | None) -> str:
    """The table of all settings on these devices."""
    header = ("device", "detector", "pixels", "batch", "MiB", "write", "stall ms", "stall in steps", "20 to 80 %",
              "of synchronous", " 20 to 80 %", "steps beside a write", "read in steps")  # fmt: skip
    found = [row for setting in SETTINGS if setting.device in devices for row in rows(setting, rounds, folder)]
    missing = [f"{one.detector} on {one.device}" for one in SETTINGS if one.device not in devices]
    left_out = f"\nLeft out: {'; '.join(missing)}.\n" if missing else ""
    return f"{markdown(header, found, (*header[:3], header[5]))}{left_out}"


def main(arguments: list[str]) -> int:
    """Exit code 0; a DistFairError is left to the caller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the CPU and, where there is one, a GPU")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: as suit each setting)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: that of temporary files)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DistFairError("--device cuda: torch sees no GPU here; leave it out, or --device cpu")
    torch.set_num_threads(1)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    gpu = torch.cuda.get_device_name() if "cuda" in devices else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores of which one trains, {gpu}, torch {torch.__version__}"
    command = shlex.join(["python", "benchmarks/checkpoint_stall.py", *arguments])
    head = f"# What a checkpoint costs training\n\n`{command}` ({machine}, Python {platform.python_version()})"
    text = f"{head}\n\n{report(devices, options.rounds, options.folder)}"
    write_text(RESULTS, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
