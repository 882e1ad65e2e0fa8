"""What benchmarks/gpu.py compares: a step as dist_fair takes it, and the bare loops that are its measure.

    trained     the program's own loop (Trainer.run) with all that is in it: the batch as the loader hands it over, in
                bytes in page-locked memory, copied ahead and normalised; readings, verdict, stopwatch. Only what comes
                once in a while is not there: checkpoints, and who watches.
    bare        timm's model in plain PyTorch: autocast, the same fused optimizer, bytes normalised on the device. Its
                batch lies on the device already, and nobody ever reads its loss: no loop can do less.
    networks    PG-FDD's encoders and decoder, forward and backward, and nothing else

A Window runs some steps and has launched them when it returns. Windows of several ways are timed in turns, A B A B, by
events of the device, which waits before and after each: a drift of the clocks then hits all alike.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import timm
import torch
from torch.nn import functional

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch, Packed
from dist_fair.data.index import Column
from dist_fair.data.plan import TapeSpec
from dist_fair.data.prefetching import prefetched
from dist_fair.engine.assembly import build_module, on_device
from dist_fair.engine.backends import make_backend
from dist_fair.engine.device.compilation import compile_module
from dist_fair.engine.device.numerics import set_numerics
from dist_fair.engine.launch import accelerator
from dist_fair.engine.loop import Rhythm, Trainer
from dist_fair.engine.optimization import build_optimizer, build_schedule
from dist_fair.keyed_rows import mixed
from dist_fair.recipe.composition import load
from dist_fair.recipe.schema import Recipe
from dist_fair.recipes import interventions

VALUES = {"gender": ("female", "male"), "race": ("Asian", "Black", "Other", "White")}  # G = 8
SHARES = {"gender": (0.4, 0.6), "race": (0.2, 0.1, 0.1, 0.6)}
MANIPULATIONS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
POPULATION = 8192  # samples that weights, margins and group counts are made from; the batch is the first of them
RUN = 10**6  # steps of a run whose first few are measured: no delay is due, so recipes come without
OPTIMIZER = ("optimizer.name=adamw", "optimizer.lr=1e-4", "optimizer.weight_decay=0.01", "optimizer.momentum=null",
             "optimizer.sam.rho=null")  # fmt: skip
Window = Callable[[int], None]


@dataclass(frozen=True)
class Scale:
    """How much is measured, and on what. precision: fp32 or bf16. steps: of a window. rounds: windows of each way.
    models: role -> card of recipes/detector, timm's name, pixels. pg_fdd: its recipe, pixels, batch. images, workers:
    of the loader.
    """

    device: str
    precision: str
    batch: int
    steps: int
    rounds: int
    warmup: int
    models: Mapping[str, tuple[str, str, int]]
    pg_fdd: tuple[str, int, int]
    images: int
    workers: int
    whole: int  # steps of a training that is measured with its loader, of which the first half only warms up


FULL = Scale(
    "cuda", "bf16", 64, 15, 4, 8,
    {"ResNet-50": ("resnet50", "resnet50", 224), "EfficientNet-B4": ("tf_efficientnet_b4", "tf_efficientnet_b4", 224),
     "Xception": ("legacy_xception", "legacy_xception", 256)},
    ("pg_fdd_xception", 256, 32), 4096, 14, 200,
)  # fmt: skip
QUICK = Scale(
    "cpu", "fp32", 8, 2, 2, 1, {"small": ("small", "resnet18", 32), "small again": ("small", "resnet18", 32)},
    ("pg_fdd", 64, 8), 96, 2, 8,
)  # fmt: skip


# The batch ------------------------------------------------------------------------------------------------------------


def plan(batch: int, paired: bool) -> SimpleNamespace:
    """A plan as far as detector and interventions look at it: demographics are skewed, every second sample is fake."""
    random = np.random.default_rng(0)
    attributes = {name: Column(values, random.choice(len(values), POPULATION, p=SHARES[name]).astype(np.int32))
                  for name, values in VALUES.items()}  # fmt: skip
    labels = (np.arange(POPULATION) % 2).astype(np.int8)
    forged = np.where(labels, random.choice(len(MANIPULATIONS), POPULATION), -1).astype(np.int32)
    index = SimpleNamespace(attributes=attributes, manipulations=Column(MANIPULATIONS, forged), labels=labels)
    tapes = (TapeSpec("real", 0), TapeSpec("fake", 1)) if paired else (TapeSpec("all"),)
    parts = (batch // 2, batch // 2) if paired else (batch,)
    return SimpleNamespace(index=index, frequencies=np.full(POPULATION, 1 / POPULATION), specs=tapes, parts=parts,
                           batch_size=batch)  # fmt: skip


def packed(batch: int, pixels: int, device: str) -> Packed:
    """The first samples of the population as a loader hands them over; images are noise."""
    index = plan(batch, paired=False).index
    columns = [index.labels, index.manipulations.codes, np.arange(POPULATION), np.ones(POPULATION),
               np.arange(POPULATION) * 7919, *(column.codes for column in index.attributes.values())]  # fmt: skip
    together = torch.from_numpy(np.stack([column[:batch] for column in columns]).astype(np.int64))
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, pixels, pixels, 3), dtype=torch.uint8, generator=noise)
    made = Packed(images, together, tuple(index.attributes), (batch,), 0)
    return made.pin_memory() if device == "cuda" else made


# The ways -------------------------------------------------------------------------------------------------------------


class Nothing:
    """A Saver that saves nothing."""

    folder = None

    def save(self, step: int, backend: object, values: object = None) -> dict:
        return {}

    def poll(self) -> None:
        pass

    finish = poll


def settings(arguments: Sequence[str]) -> Recipe:
    """The recipe of `trained`, from scratch: the same work, and no download."""
    return load([*arguments, *OPTIMIZER, "detector.pretrained=false"], interventions()).recipe


def trained(arguments: Sequence[str], pixels: int, batch: int) -> Window:
    """The program's loop over one batch."""
    trainer, batches = trainer_of(settings(arguments), pixels, batch)

    def run(steps: int) -> None:
        trainer.rhythm.stop = trainer.step + steps
        trainer.run(batches, None, [])

    return run


def trainer_of(recipe: Recipe, pixels: int, batch: int) -> tuple[Trainer, Callable[[int, int], Iterator[Batch]]]:
    """A Trainer, put together as dist_fair.training does, and its batches: one that comes again and again."""
    found, comm, train = accelerator(), Communicator(), recipe.train
    device = found.device
    set_numerics(device, train.tf32, train.deterministic)
    module = build_module(recipe, plan(batch, paired=bool(recipe.data.tapes)), RUN, comm)
    module = on_device(module, device, recipe)
    compile_module(module, train.compile)
    backend = make_backend(train, module, partial(build_optimizer, settings=recipe.optimizer, fused=True), found)
    schedule = build_schedule(backend.optimizer, recipe.schedule, RUN)
    rhythm = Rhythm(RUN, 0, 1, train.clip, None)
    trainer = Trainer(backend, schedule, comm, rhythm, sam=recipe.optimizer.sam, seed=0, saver=Nothing(), describe=str)
    one = packed(batch, pixels, device.type)

    def batches(first: int, last: int) -> Iterator[Batch]:
        return prefetched(repeat(one, last - first), device, recipe.data.mean, recipe.data.std)

    return trainer, batches


def bare(
    name: str, pixels: int, batch: int, scale: Scale, *, channels_last: bool = True, compiled: bool = False
) -> Window:
    """timm's model in plain PyTorch. compiled: model and loss, by torch.compile as it comes."""
    device, layout = scale.device, torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model(name, num_classes=2).to(device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    one = packed(batch, pixels, device).to(device).batch()
    mean, std = (torch.full((1, 3, 1, 1), 127.5, device=device) for _ in range(2))

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=scale.precision == "bf16"):
            logits = model(images)
        return functional.cross_entropy(logits.float(), labels)

    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def run(steps: int) -> None:
        for _ in range(steps):
            images = one.images.permute(0, 3, 1, 2).to(torch.float32).sub_(mean).div_(std)
            loss_of(images.contiguous(memory_format=layout), one.labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def networks(arguments: Sequence[str], pixels: int, batch: int, scale: Scale) -> Window:
    """The encoders of a PG-FDD recipe and its decoder alone, which makes as many images as the losses want."""
    recipe = settings(arguments)
    kept = ("reconstruction_loss", "conditional_value_at_risk")  # of these the first needs all the networks
    others = [f"~interventions.{name}" for name in recipe.interventions if name not in kept]
    recipe = settings([*arguments, *others])
    module = build_module(recipe, plan(batch, paired=True), RUN, Communicator())
    detector = on_device(module, torch.device(scale.device), recipe).train().detector
    optimizer = build_optimizer(detector, recipe.optimizer, fused=True)
    one = packed(batch, pixels, scale.device).to(scale.device).batch()
    half = recipe.train.precision == "bf16"

    def run(steps: int) -> None:
        for _ in range(steps):
            images = one.normalised(recipe.data.mean, recipe.data.std).images
            with torch.autocast(scale.device, dtype=torch.bfloat16, enabled=half):
                outputs = detector.extract(images, one.keys)
            code, condition = outputs.extras["code"], outputs.extras["condition"]
            own = outputs.decode(code, condition, one.keys)
            cross = outputs.decode(code.roll(1, 0), condition, mixed(one.keys, 1))
            (own.mean() + cross.mean() + outputs.features.mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """Of a way: seconds a step in each round (rounds,); GiB at the peak, with weights and moments; seconds until it was
    warm, compilation included."""

    seconds: np.ndarray
    memory: float
    warm: float


def measured(ways: Mapping[str, Callable[[], Window]], scale: Scale) -> dict[str, Taken]:
    """Each way made, warmed up, and then all of them timed in turns."""
    windows, held, warm = {}, {}, {}
    for name, make in ways.items():
        before, began = allocated(scale.device), time.perf_counter()
        windows[name] = make()
        windows[name](scale.warmup)
        wait(scale.device)
        held[name], warm[name] = allocated(scale.device) - before, time.perf_counter() - began
        print(f"    {name}: warm after {warm[name]:.1f} s", flush=True)
    gc.collect()
    memory = {name: held[name] + peak(window, scale) for name, window in windows.items()}
    seconds: dict[str, list[float]] = {name: [] for name in windows}
    for number in range(scale.rounds):
        for name in [*windows][:: 1 - 2 * (number % 2)]:  # forth and back
            seconds[name].append(timed(windows[name], scale))
    return {name: Taken(np.array(seconds[name]), memory[name] / 2**30, warm[name]) for name in windows}


def timed(window: Window, scale: Scale) -> float:
    """Seconds a step."""
    wait(scale.device)
    if scale.device == "cpu":
        began = time.perf_counter()
        window(scale.steps)
        return (time.perf_counter() - began) / scale.steps
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    window(scale.steps)
    ended.record()
    wait(scale.device)
    return began.elapsed_time(ended) / 1000 / scale.steps


def peak(window: Window, scale: Scale) -> float:
    """Bytes beyond what is there before and after; not counted on a CPU: not-a-number."""
    if scale.device == "cpu":
        return math.nan
    wait(scale.device)
    before = allocated(scale.device)
    torch.cuda.reset_peak_memory_stats()
    window(2)
    wait(scale.device)
    return torch.cuda.max_memory_allocated() - before


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
