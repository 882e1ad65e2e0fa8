"""What PG-FDD costs beside its networks, in ratios measured in one run: `python benchmarks/pg_fdd_cost.py`.

A training step of recipe=pg_fdd without SAM, over a step in which the same three encoders and the same decoder run
forward and backward with nothing but sums for a loss: no heads, no objectives, no exchange. Forward, backward and
optimizer, on made-up images that are there already.

Ratios are medians over rounds that measure each way once, with the spread of the middle 60 per cent. One thread a
process; about six minutes on two cores. Prints Markdown and writes it to benchmarks/results/pg_fdd_cost.md.
"""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from timing import Way, measured, peak_memory, ratio_cells

from dist_fair.cli import guarded
from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.index import Column
from dist_fair.data.plan import TapeSpec
from dist_fair.data.window import Window
from dist_fair.engine.assembly import build_module
from dist_fair.engine.optimization import build_optimizer
from dist_fair.engine.run_folder import write_text
from dist_fair.errors import DistFairError
from dist_fair.keyed_rows import mixed
from dist_fair.recipe.composition import load
from dist_fair.recipe.schema import Recipe
from dist_fair.recipes import interventions
from dist_fair.reporting.progress import say
from dist_fair.reporting.tables import markdown

RESULTS = Path(__file__).parent / "results" / "pg_fdd_cost.md"
VALUES = {"gender": ("female", "male"), "race": ("Asian", "Black", "Other", "White")}  # G = 8
MANIPULATIONS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
NETWORKS, METHOD = "three encoders and decoder", "PG-FDD"


@dataclass(frozen=True)
class Setting:
    """A recipe in a size."""

    device: str
    arguments: tuple[str, ...]
    pixels: int
    batch: int
    rounds: int


SETTINGS = (
    Setting("cpu", ("recipe=pg_fdd",), 64, 64, 12),
    Setting("cpu", ("recipe=pg_fdd_resnet50",), 128, 8, 6),
    Setting("cuda", ("recipe=pg_fdd_xception", "train.precision=bf16"), 256, 32, 40),
)


def plan(size: int) -> SimpleNamespace:
    """The plan of `size` samples, half of them fake, as far as detector and interventions look at it."""
    rng = np.random.default_rng(0)
    attributes = {name: Column(values, rng.choice(len(values), size).astype(np.int32))
                  for name, values in VALUES.items()}  # fmt: skip
    forged = np.where(np.arange(size) % 2, rng.choice(len(MANIPULATIONS), size), -1)
    index = SimpleNamespace(attributes=attributes, manipulations=Column(MANIPULATIONS, forged.astype(np.int32)),
                            labels=np.arange(size) % 2)  # fmt: skip
    tapes = (TapeSpec("real", 0), TapeSpec("fake", 1))
    return SimpleNamespace(index=index, frequencies=np.full(size, 1 / size), specs=tapes, parts=(size // 2, size // 2),
                           batch_size=size)  # fmt: skip


def made_batch(setting: Setting) -> Batch:
    """All of the plan's samples; images are noise in [-1, 1]."""
    index, size = plan(setting.batch).index, setting.batch
    images = torch.rand(size, 3, setting.pixels, setting.pixels, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(
        images=images,
        labels=torch.from_numpy(index.labels).long(),
        attributes={name: torch.from_numpy(column.codes).long() for name, column in index.attributes.items()},
        manipulations=torch.from_numpy(index.manipulations.codes).long(),
        samples=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
        keys=torch.arange(size),
        sizes=(size,),
        position=0,
    ).to(setting.device)


def method(recipe: Recipe, batch: Batch, device: str) -> Way:
    """A step of the recipe."""
    module = build_module(recipe, plan(len(batch)), steps=100, comm=Communicator()).train().to(device)
    optimizer = build_optimizer(module, recipe.optimizer)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(Window([batch]), 0.99).loss.backward()
        optimizer.step()

    return run


def networks(recipe: Recipe, batch: Batch, device: str) -> Way:
    """A step of the encoders and the decoder alone, which makes as many images as PG-FDD's losses want."""
    module = build_module(recipe, plan(len(batch)), steps=100, comm=Communicator()).train().to(device)
    detector = module.detector
    optimizer = build_optimizer(detector, recipe.optimizer)
    half = recipe.train.precision == "bf16"

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            outputs = detector.extract(batch.images, batch.keys)
        code, condition = outputs.extras["code"], outputs.extras["condition"]
        own = outputs.decode(code, condition, batch.keys)
        cross = outputs.decode(code.roll(1, 0), condition, mixed(batch.keys, 1))
        (own.mean() + cross.mean() + outputs.features.mean()).backward()
        optimizer.step()

    return run


def rows(setting: Setting, rounds: int | None) -> list[list[str]]:
    """Time and memory of each way, and their ratios to the networks alone."""
    say(f"{' '.join(setting.arguments)} on {setting.device}")
    arguments = [*setting.arguments, "detector.pretrained=false", "optimizer.sam.rho=null"]
    recipe = load(arguments, interventions()).recipe
    alone = load([*arguments, *(f"~interventions.{name}" for name in recipe.interventions
                                if name not in ("reconstruction_loss", "conditional_value_at_risk"))],
                 interventions()).recipe  # fmt: skip
    batch = made_batch(setting)
    ways = {NETWORKS: networks(alone, batch, setting.device), METHOD: method(recipe, batch, setting.device)}
    seconds = measured(ways, rounds or setting.rounds, setting.device)
    memory = {name: peak_memory(way, setting.device) for name, way in ways.items()}
    start = [setting.device, " ".join(setting.arguments), str(setting.pixels), str(setting.batch),
             recipe.train.precision]  # fmt: skip
    return [[*start, name, f"{np.median(taken) * 1e3:,.1f}", *ratio_cells(taken / seconds[NETWORKS], 3), memory[name],
             _ratio(memory[name], memory[NETWORKS])] for name, taken in seconds.items()]  # fmt: skip


def _ratio(one: str, other: str) -> str:
    return "-" if "-" in (one, other) else f"{float(one.replace(',', '')) / float(other.replace(',', '')):.3f}"


def report(devices: Sequence[str], rounds: int | None) -> str:
    """The table of all settings on these devices."""
    header = ("device", "recipe", "pixels", "batch", "precision", "with", "ms", "ratio", "20 to 80 %", "peak MiB",
              "ratio of peaks")  # fmt: skip
    found = [row for setting in SETTINGS if setting.device in devices for row in rows(setting, rounds)]
    missing = [f"`{' '.join(one.arguments)}` on {one.device}" for one in SETTINGS if one.device not in devices]
    left_out = f"\nLeft out: {'; '.join(missing)}.\n" if missing else ""
    return f"{markdown(header, found, header[:6])}{left_out}"


def main(arguments: list[str]) -> int:
    """Exit code 0; a DistFairError is left to the caller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the CPU and, where there is one, a GPU")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: as suit each setting)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DistFairError("--device cuda: torch sees no GPU here; leave it out, or --device cpu")
    torch.set_num_threads(1)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    gpu = torch.cuda.get_device_name() if "cuda" in devices else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores of which one works, {gpu}, torch {torch.__version__}"
    command = shlex.join(["python", "benchmarks/pg_fdd_cost.py", *arguments])
    head = f"# What PG-FDD costs beside its networks\n\n`{command}` ({machine}, Python {platform.python_version()})"
    text = f"{head}\n\n{report(devices, options.rounds)}"
    write_text(RESULTS, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
