"""Training with sharpness-aware minimisation on each rank, an oracle that shares none of its code, bugs to plant."""

import functools
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.func import functional_call

import dist_fair.interventions  # noqa: F401  (registers)
from dist_fair import keyed_rows
from dist_fair.collectives import Communicator
from dist_fair.data.index import Column
from dist_fair.data.loading import training_loader
from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.data.window import Window, canonical_order, paired
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.detectors.norm import convert_norms
from dist_fair.engine import checkpoint, sharpness
from dist_fair.engine.backends.ddp import Ddp
from dist_fair.engine.loop import Rhythm, Trainer
from dist_fair.engine.module import TrainingModule
from dist_fair.engine.optimization import build_schedule
from dist_fair.engine.saving import Saver
from dist_fair.interventions.base import Facts, registered
from dist_fair.recipe.schema import Sam, Schedule
from tests.data.making import bare_index

BATCH, LANES, STEPS, DECAY = 32, 4, 20, 0.01
ALL, PAIRED = (TapeSpec("all"),), (TapeSpec("real", 0), TapeSpec("fake", 1))
BOTH = {"attributes": ["gender", "race"]}
METHODS = {
    "moments": {"cross_entropy": {}, "subgroup_norm": {**BOTH, "minimum": 4}, "pair_alignment": BOTH},
    "pairs": {"cross_entropy": {"reduction": "class_balanced"}, "pair_alignment": BOTH},
}


@dataclass(frozen=True)
class Run:
    """norm: synced, local (torch's own) or group. methods: of METHODS."""

    sam: Sam
    norm: str = "synced"
    methods: str = "moments"
    accumulate: int = 1
    exact: bool = False
    precision: str = "fp64"
    clip: float | None = None
    steps: int = STEPS

    def __hash__(self):
        return hash(repr(self))


class Small(Detector):
    """Two convolutions, a norm between them, dropout by keys."""

    def __init__(self, norm, width=8):
        super().__init__(width, width)
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.classifier = norm(width), nn.Linear(width, 2)

    def extract(self, images, keys=None):
        maps = nn.functional.silu(self.second(nn.functional.silu(self.norm(self.first(images)))))
        features = self.dropped(maps.mean((2, 3)), keys, 1)
        return Outputs(features[:, :0], features, maps)

    def classify(self, features, keys=None):
        return self.classifier(self.dropped(features, keys, 2))

    def dropped(self, x, keys, salt):
        return x if keys is None else keyed_rows.dropout(x, 0.25, keyed_rows.mixed(keys, salt))


def plan(accumulate=1, tapes=PAIRED):
    random = np.random.default_rng(3)
    names = {"gender": ("female", "male"), "race": ("Asian", "Black", "White")}
    attributes = {name: Column(values, random.integers(-1, len(values), 75).astype(np.int32))
                  for name, values in names.items()}  # fmt: skip
    index = replace(bare_index([25] * 3, random.integers(0, 2, 75)), attributes=attributes)
    return TrainingPlan(index, tapes, BATCH // accumulate, LANES, window=8, seed=4)


def build(run, chosen, comm):
    torch.manual_seed(7)
    group = run.norm == "group"
    detector = Small(functools.partial(nn.GroupNorm, 2) if group else nn.BatchNorm2d)
    convert_norms(detector, "local" if group else run.norm, comm)
    facts = Facts(chosen.index, chosen.frequencies, 5, run.steps, detector.channels, paired(chosen))
    kinds = registered()
    parts = {name: kinds[name](kinds[name].Settings(**settings), facts, detector.features)
             for name, settings in METHODS[run.methods].items()}  # fmt: skip
    return TrainingModule(detector, nn.ModuleDict(parts), comm, run.precision)


def optimizer_of(module):
    return torch.optim.SGD(module.parameters(), 0.2, momentum=0.9, weight_decay=DECAY)


def inputs(run, chosen, comm, first, last):
    """Micro-batches as training loads them; a sample's image (3, 8, 8) depends on its row and epoch."""

    def read(samples, epochs):
        drawn = [np.random.default_rng([*pair]).normal(size=(3, 8, 8)) for pair in zip(samples, epochs, strict=True)]
        images = np.stack(drawn).astype(np.float64 if run.precision == "fp64" else np.float32)
        return SimpleNamespace(images=images, samples=samples, bad=[])

    return training_loader(chosen, SimpleNamespace(index=chosen.index, read=read), comm.rank, comm.world, first, last)


def trainer(run, comm, folder, stop=None):
    """A Trainer as training.py makes it, with the batches that it runs on."""
    if torch.distributed.is_initialized():  # as a launcher says it
        names = {"RANK": comm.rank, "LOCAL_RANK": comm.rank, "WORLD_SIZE": comm.world,
                 "LOCAL_WORLD_SIZE": comm.world, "OMP_NUM_THREADS": 1}  # fmt: skip
        os.environ.update({name: str(value) for name, value in names.items()})
    chosen = plan(run.accumulate)
    module = build(run, chosen, comm)
    order = canonical_order(chosen, run.accumulate, comm.world) if run.exact else None
    rhythm = Rhythm(run.steps, stop or run.steps, run.accumulate, run.clip, None, order)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    backend = Ddp(module, optimizer_of, Accelerator(cpu=True, kwargs_handlers=[ddp]))
    made = Trainer(backend, build_schedule(backend.optimizer, Schedule(), run.steps), comm, rhythm,
                   seed=5, saver=Saver(Path(folder), {}, comm, 1), describe=str, sam=run.sam)  # fmt: skip
    return made, lambda first, last: inputs(run, chosen, comm, first, last)


def train(comm, run, folder, stop=None, bug=None):
    """Values of each step, and the state after the last, on this rank. Goes on from a checkpoint in `folder`."""
    made, stream = trainer(run, comm, folder, stop)
    if found := checkpoint.newest(Path(folder)):
        made.resume(checkpoint.read(found))
    values = []
    with bug(made) if bug else nullcontext():
        made.run(stream, None, [lambda step, told: values.append(told)])
    return values, {name: value.clone() for name, value in made.module.state_dict().items()}


def oracle(run):
    """The same on one rank, functionally: weights are arguments, so that nothing is perturbed, held or restored."""
    comm, chosen = Communicator(), plan(run.accumulate)
    module = build(run, chosen, comm).train()
    optimizer, values = optimizer_of(module), []
    for step in range(run.steps):
        units = [list(inputs(run, chosen, comm, step * run.accumulate, (step + 1) * run.accumulate))]
        if run.sam.scope != "global":
            size = run.sam.scope
            units = [[batch.rows(slice(start, start + size), (size,))]
                     for batch in units[0] for start in range(0, len(batch), size)]  # fmt: skip
        found = [_worst_point(module, unit, run.sam, step / run.steps) for unit in units]
        gradients, losses, rises, norms = zip(*found, strict=True)
        for name, parameter in module.named_parameters():
            parameter.grad = sum(gradient[name] for gradient in gradients) / len(units)
        norm = _norm([parameter.grad for parameter in module.parameters()])
        for parameter in module.parameters():
            parameter.grad *= min(1.0, (run.clip or torch.inf) / (float(norm) + 1e-6))
        optimizer.step()
        means = [float(sum(column) / len(units)) for column in (losses, rises, norms)]
        values.append(dict(zip(("loss", *sharpness.MEASURES), means, strict=True)) | {"gradient_norm": float(norm)})
    return values, module.state_dict()


def _worst_point(module, unit, sam, progress):
    """Gradients at w + e, loss at w, its rise, norm of the gradient at w."""

    def slopes(weights, buffers):
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        loss = sum(functional_call(module, weights | buffers, (Window([batch]), progress)).loss for batch in unit)
        loss = loss / len(unit)
        return loss.detach(), dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))

    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    low, first = slopes(weights, {})
    stretch = {name: weight.abs() if sam.adaptive else torch.ones_like(weight) for name, weight in weights.items()}
    norm = _norm([first[name] * stretch[name] for name in weights])
    away = {name: weight + sam.rho * stretch[name] ** 2 * first[name] / (norm + 1e-12)
            for name, weight in weights.items()}  # fmt: skip
    high, second = slopes(away, {name: buffer.clone() for name, buffer in module.named_buffers()})
    return second, low, high - low, norm


def _norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).square().sum().sqrt()


def difference(one, other):
    """Largest difference of the losses, norms and final states of two runs, relative to the largest value of each."""
    worst = 0.0
    for name in ("loss", "gradient_norm", *sharpness.MEASURES):
        left, right = (torch.tensor([line[name] for line in run[0]], dtype=torch.float64) for run in (one, other))
        worst = max(worst, _relative(left, right))
    return max(worst, *(_relative(value, other[1][name]) for name, value in one[1].items()))


def _relative(left, right):
    if left.shape != right.shape:
        return torch.inf
    return float((left - right).abs().max() / left.abs().max().clamp_min(1e-3))
