"""What DAID costs, in ratios measured in one run: `python benchmarks/daid_cost.py [--only step] [--device cpu]`.

    step        A training step with DAID over the same step of ERM: forward, backward, optimizer, on made-up images
                that are there already. Loading them takes as long in both and would only make the ratio smaller.
    wire        Calls and bytes a rank puts into collectives in a step, as its Communicator counts them, on real ranks.
                Stops with an error if they depend on the batch or on the number of ranks.
    objective   Pair alignment in closed form and with mined pairs, against all pairs written out.

Ratios are medians over rounds that measure each way once, with the spread of the middle 60 per cent. One thread a
process; about four minutes on two cores. Prints Markdown and writes it to benchmarks/results/daid_cost.md.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
from timing import Way, measured, peak_memory, ratio_cells
from torch import nn

from dist_fair.cli import guarded
from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.index import Column
from dist_fair.data.window import Window
from dist_fair.demographics import Groups
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.detectors.registry import register
from dist_fair.engine.assembly import build_module
from dist_fair.engine.module import TrainingModule
from dist_fair.engine.optimization import build_optimizer
from dist_fair.engine.run_folder import write_text
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, exchange
from dist_fair.interventions.pair_alignment import PairAlignment
from dist_fair.recipe.composition import load
from dist_fair.recipe.schema import Recipe
from dist_fair.recipes import interventions
from dist_fair.reporting.progress import say
from dist_fair.reporting.tables import markdown

RESULTS = Path(__file__).parent / "results" / "daid_cost.md"
VALUES = {"gender": ("female", "male"), "race": ("Asian", "Black", "Indian", "White")}  # G = 8
SHARES = {"gender": (0.4, 0.6), "race": (0.1, 0.1, 0.2, 0.6)}
LARGE = 8192
PROGRESS = 0.99  # near the end of a run: every delay and ramp is over, all of DAID at full weight
EXPLICIT = "all pairs written out"


def population() -> tuple[SimpleNamespace, np.ndarray]:
    """The plan of LARGE samples with skewed demographics, as far as interventions look at it, and their labels."""
    rng = np.random.default_rng(0)
    attributes = {name: Column(values, rng.choice(len(values), LARGE, p=SHARES[name]).astype(np.int32))
                  for name, values in VALUES.items()}  # fmt: skip
    index = SimpleNamespace(attributes=attributes, manipulations=Column.unknown(LARGE))
    plan = SimpleNamespace(index=index, frequencies=np.full(LARGE, 1 / LARGE), specs=(), parts=(), batch_size=LARGE)
    return plan, rng.integers(0, 2, LARGE)


def made_batch(size: int, shape: Sequence[int], device: str = "cpu") -> Batch:
    """The first `size` of them as one rank's global batch; images of `shape` are noise."""
    plan, labels = population()
    codes = {name: torch.from_numpy(column.codes[:size]).long() for name, column in plan.index.attributes.items()}
    images = torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.from_numpy(labels[:size]), codes, torch.full((size,), -1), torch.arange(size),
                 torch.ones(size, dtype=torch.bool), torch.arange(size), (size,), 0).to(device)  # fmt: skip


def variant(arguments: Sequence[str], keep: Sequence[str] | None) -> Recipe:
    """The recipe with, beside cross-entropy, only the interventions `keep`, or all. Everything else stays equal."""
    recipe = load(arguments, interventions()).recipe
    kept = list(recipe.interventions) if keep is None else ["cross_entropy", *keep]
    return load([*arguments, *(f"~interventions.{name}" for name in recipe.interventions if name not in kept)],
                interventions()).recipe  # fmt: skip


def made_module(recipe: Recipe, comm: Communicator) -> TrainingModule:
    """What a run of the recipe would train."""
    return build_module(recipe, population()[0], steps=100, comm=comm).train()


@register("given_features")
class GivenFeatures(Detector):
    """No backbone: images are features (B, 2048) already."""

    def __init__(self, pretrained: bool | str, arguments: Mapping[str, object], needs: Mapping[str, int]):
        super().__init__(2048, 2048)
        self.classifier = nn.Linear(2048, 2)

    def extract(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> Outputs:
        return Outputs(images.new_empty(len(images), 0), images.requires_grad_(), images[:, :, None, None])

    def resize_classifier(self, features: int) -> None:
        self.classifier = nn.Linear(features, 2)

    def classify(self, features: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        return self.classifier(features)


@dataclass(frozen=True)
class Setting:
    """One detector in a size; pixels 0: features are given. alone: also with each part of DAID alone."""

    device: str
    arguments: tuple[str, ...]
    pixels: int
    batch: int
    rounds: int
    alone: bool = False


FROM_SCRATCH = "detector.pretrained=false"  # the same work, and no download
STEPS = (
    Setting("cpu", ("recipe=daid",), 64, 64, 20, alone=True),
    Setting("cpu", ("recipe=daid_xception", "detector=resnet50"), 128, 16, 6),
    Setting("cpu", ("recipe=daid_xception", "detector.name=given_features"), 0, 64, 100),
    Setting("cuda", ("recipe=daid_efficientnet_b4", "train.precision=bf16"), 224, 64, 60),
)


def step(devices: Sequence[str], rounds: int | None) -> str:
    """The table of all settings on these devices."""
    header = ("device", "recipe", "pixels", "batch", "precision", "with", "ms", "ratio to ERM", "20 to 80 %")
    rows = [row for setting in STEPS if setting.device in devices for row in step_rows(setting, rounds)]
    missing = [f"`{' '.join(one.arguments)}` on {one.device}" for one in STEPS if one.device not in devices]
    left_out = f"\nLeft out: {'; '.join(missing)}.\n" if missing else ""
    text = ("A step with DAID over the same recipe's step with cross-entropy alone. Forward, backward and optimizer; "
            "neither loading nor the reduction of gradients over ranks. At 0 pixels features (B, 2048) are given: the "
            "difference in ms is what DAID itself takes, the optimizer's work on U included.\n")  # fmt: skip
    return f"{text}\n{markdown(header, rows, header[:6])}{left_out}"


def step_rows(setting: Setting, rounds: int | None) -> list[list[str]]:
    say(f"step: {' '.join(setting.arguments)} on {setting.device}")
    arguments = (*setting.arguments, FROM_SCRATCH)
    parts = [name for name in variant(arguments, None).interventions if name != "cross_entropy"]
    kept: dict[str, Sequence[str] | None] = {"ERM": [], "DAID": None}
    kept |= {f"{name} alone": [name] for name in parts if setting.alone}
    recipes = {name: variant(arguments, keep) for name, keep in kept.items()}
    shape = (3, setting.pixels, setting.pixels) if setting.pixels else (2048,)
    batch = made_batch(setting.batch, shape, setting.device)
    ways = {name: training_step(recipe, batch, setting.device) for name, recipe in recipes.items()}
    seconds = measured(ways, rounds or setting.rounds, setting.device)
    start = [setting.device, " ".join(setting.arguments), str(setting.pixels), str(setting.batch),
             recipes["ERM"].train.precision]  # fmt: skip
    return [[*start, name, f"{np.median(taken) * 1e3:,.1f}", *ratio_cells(taken / seconds["ERM"], 3)]
            for name, taken in seconds.items()]  # fmt: skip


def training_step(recipe: Recipe, batch: Batch, device: str) -> Way:
    """One step of a module and an optimizer of its own."""
    module = made_module(recipe, Communicator()).to(device)
    optimizer = build_optimizer(module, recipe.optimizer)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(Window([batch]), PROGRESS).loss.backward()
        optimizer.step()

    return run


WIRE = ("recipe=daid_xception", "detector.name=given_features", FROM_SCRATCH)  # d = 2,048, projected to 256
WORLDS, BATCHES = (1, 4), (64, LARGE)


def wire(devices: Sequence[str], rounds: int | None) -> str:
    """The table of collectives by name; DistFairError if they grow with the batch or the ranks."""
    found: dict[str, dict[tuple[int, int], dict[str, list[int]]]] = {"ERM": {}, "DAID": {}}
    for world in WORLDS:
        say(f"wire: {world} rank(s)")
        for method, size, counts in counted_on(world):
            found[method][world, size] = counts
    header = ("method", "collective", "calls", *(f"bytes, W={world}, B={size:,}" for world, size in found["ERM"]))
    rows = []
    for method, cases in found.items():
        first, *others = cases.values()
        if any(other != first for other in others):
            raise DistFairError(f"wire: {method}: [calls, bytes] depend on (ranks, batch): {cases}")
        rows += [[method, name, str(calls), *(f"{counts[name][1]:,}" for counts in cases.values())]
                 for name, (calls, _) in first.items()]  # fmt: skip
    text = ("What a rank puts in, per step: G = 8 groups, d = 2,048, U of rank 256; W ranks, B samples on all of them. "
            "Checked on every rank: equal for every B and W. Not in it: gradients, 4 bytes a parameter with DDP; U has "
            "2,048 x 256.\n")  # fmt: skip
    return f"{text}\n{markdown(header, rows, header[:2])}"


def counted_on(world: int) -> list[tuple[str, int, dict[str, list[int]]]]:
    """(method, batch, collective -> [calls, bytes]), counted on `world` processes joined by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(count_on_rank, (world, folder), nprocs=world)
        return json.loads(Path(folder, "counts.json").read_text())


def count_on_rank(rank: int, world: int, folder: str) -> None:
    """Counts on this rank; rank 0 leaves what all ranks agree on in counts.json."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    comm, found = Communicator(), []
    for method, keep in (("ERM", []), ("DAID", None)):
        module = made_module(variant(WIRE, keep), comm)
        for size in BATCHES:
            own = size // world
            batch = made_batch(size, (2048,)).rows(slice(rank * own, (rank + 1) * own), (own,) * world)
            comm.drain()
            module(Window([batch]), PROGRESS).loss.backward()
            found.append([method, size, {name: [count.calls, count.bytes] for name, count in comm.drain().items()}])
    if any(other != found for other in comm.objects(found, "counts")):
        raise DistFairError(f"wire: rank {rank} of {world} counts otherwise than another: {found}")
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def objective(devices: Sequence[str], rounds: int | None) -> str:
    """The table of ways to the alignment loss and its gradient, on each device."""
    header = ("device", "way", "ms", f"{EXPLICIT} / way", "20 to 80 %", "peak memory, MiB")
    rows = []
    for device in devices:
        say(f"objective: {device}")
        ways = alignment_ways(made_batch(LARGE, (256,), device))
        losses = [float(ways[name]()) for name in ("closed form", EXPLICIT)]
        if abs(losses[0] - losses[1]) > 1e-9:
            raise DistFairError(f"objective: {device}: closed form and {EXPLICIT} differ: {losses}")
        memory = {name: peak_memory(way, device) for name, way in ways.items()}
        seconds = measured(ways, rounds or 3, device)
        rows += [[device, name, f"{np.median(taken) * 1e3:,.1f}", *ratio_cells(seconds[EXPLICIT] / taken, 1),
                  memory[name]] for name, taken in seconds.items()]  # fmt: skip
    text = (f"Pair alignment of a global batch of {LARGE:,}, d = 256, G = 8, fp64 from the features (fp32) on: loss "
            "and gradient, one rank.\n")  # fmt: skip
    return f"{text}\n{markdown(header, rows, header[:2])}"


def alignment_ways(batch: Batch) -> dict[str, Way]:
    """Each makes the loss and the gradient of the same features."""
    features = batch.images.requires_grad_()
    facts = Facts(population()[0].index, np.zeros(0), seed=0, steps=100, channels=256)
    groups = Groups.of([*VALUES], VALUES).codes(batch.attributes)
    outputs, weights = Outputs(features, features, features), torch.ones_like(features[:, 0])

    def ours(**settings: object) -> torch.Tensor:
        features.grad = None
        part = PairAlignment(PairAlignment.Settings(**settings), facts, 256)
        summary = exchange({"": part.summarise(outputs, batch, weights)}, Communicator(), batch.sizes)[""]
        loss = part.objective(summary)["pair_alignment"]
        loss.backward()
        return loss.detach()

    def explicit() -> torch.Tensor:
        features.grad = None
        units = nn.functional.normalize(features.double())
        paired = (batch.labels[:, None] == batch.labels) & (groups[:, None] != groups)
        loss = torch.where(paired, 1 - units @ units.T + 1e-6, 0).sum() / paired.sum()
        loss.backward()
        return loss.detach()

    return {"closed form": ours, "hardest pair of each": lambda: ours(pairs="hardest", hardest=1), EXPLICIT: explicit}


def main(arguments: list[str]) -> int:
    """Exit code 0; a DistFairError is left to the caller."""
    sections = {"step": step, "wire": wire, "objective": objective}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*sections], help="one of the three (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the CPU and, where there is one, a GPU")
    parser.add_argument("--rounds", type=int, help="measured rounds of every table (default: as suit each)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DistFairError("--device cuda: torch sees no GPU here; leave it out, or --device cpu")
    if options.rounds is not None and options.rounds < 1:
        raise DistFairError(f"--rounds {options.rounds}: at least 1, or leave it out")
    torch.set_num_threads(1)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = [options.only] if options.only else [*sections]
    command = shlex.join(["python", "benchmarks/daid_cost.py", *arguments])
    gpu = torch.cuda.get_device_name() if "cuda" in devices else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores of which one works, {gpu}, torch {torch.__version__}"
    parts = [f"# What DAID costs\n\n`{command}` ({machine}, Python {platform.python_version()})\n"]
    parts += [f"## {name}\n\n{sections[name](devices, options.rounds)}" for name in chosen]
    parts += [f"Left out by --only: {name}.\n" for name in sections if name not in chosen]
    text = "\n".join(parts)
    write_text(RESULTS, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
