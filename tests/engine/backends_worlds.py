"""A small run, on each rank, with each backend: losses, norms, what is masked, the state at the end.

The detectors are ResNets with synced norm and without kinks, or PG-FDD's; data come from a plan, as in training.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from dist_fair.data.window import canonical_order, paired
from dist_fair.detectors import build_detector
from dist_fair.engine.backends import make_backend
from dist_fair.engine.launch import accelerator
from dist_fair.engine.loop import Rhythm, Trainer
from dist_fair.engine.module import TrainingModule
from dist_fair.engine.optimization import build_optimizer, build_schedule
from dist_fair.interventions.base import Facts, build, registered
from dist_fair.recipe.schema import Optimizer, Schedule, Train
from tests.engine import accumulation_worlds as worlds
from tests.engine import planted_backend_bugs

STEPS = 6
BOTH = worlds.BOTH
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 16], "smooth": True}
PLAIN = {"cross_entropy": {}}
CASES = {
    "erm": PLAIN,
    "sfd_gda": {**PLAIN, "channel_decoupling": {"at": [0.4], "part": 0.2, "batch_size": 16, "batches": 1},
                "distribution_alignment": worlds.ALIGNMENT},
    "daid": {**PLAIN, "inverse_propensity": BOTH, "subgroup_norm": {**BOTH, "minimum": 4},
             "low_rank_projection": {"rank": 5}, "pair_alignment": BOTH},
    "pg_fdd": worlds.CASES["pg_fdd"],
}  # fmt: skip


@dataclass
class Task:
    """A run of `case` from `start`'s state, or from the beginning, up to step `stop`."""

    backend: str = "ddp"
    case: str = "erm"
    stop: int = STEPS
    start: dict | None = None
    train: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=lambda: {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05})
    bug: str | None = None


def run(comm, tasks):
    """The results of several tasks, on this rank; an error is its text."""
    rank, world = str(comm.rank), str(comm.world)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, OMP_NUM_THREADS="1")
    with mock.patch.object(torch.cuda, "device_count", return_value=0):
        return [one_run(comm, task) for task in tasks]


def one_run(comm, task):
    settings = Train(
        **{"backend": task.backend, "clip": 0.3, "accumulate": 1, "batch_size": worlds.BATCH, **task.train}
    )
    plan = worlds.plan("pg_fdd" if task.case == "pg_fdd" else "plain", settings.accumulate)
    module = made(task.case, plan, comm, settings)
    chosen, kept = Optimizer(**task.optimizer), Kept()
    order = canonical_order(plan, settings.accumulate, comm.world) if settings.accumulate_exact else None
    rhythm = Rhythm(STEPS, task.stop, settings.accumulate, settings.clip, None, order)
    with getattr(planted_backend_bugs, task.bug)() if task.bug else nullcontext():
        backend = make_backend(settings, module, lambda plain: build_optimizer(plain, chosen), accelerator())
        schedule = build_schedule(backend.optimizer, Schedule(name="cosine", warmup=0.2), STEPS)
        trainer = Trainer(backend, schedule, comm, rhythm, sam=chosen.sam, seed=5, saver=kept, describe=str)
        if task.start:
            trainer.resume(task.start)
        trainer.run(lambda first, last: worlds.batches(plan, comm.rank, comm.world, first, last, side=32),
                    Scoring(plan, comm), [kept])  # fmt: skip
        with backend.whole() as plain:
            scores = scored(plain, plan, comm)
    return {"losses": np.array(kept.losses), "norms": np.array(kept.norms), "scores": scores,
            "step": trainer.step, "tells": backend.describe(), **kept.state}  # fmt: skip


def made(case, plan, comm, settings):
    """Detector and interventions as `assembly.build_module` puts them together."""
    torch.manual_seed(7)
    chosen = {name: registered()[name].Settings(**given) for name, given in CASES[case].items()}
    needs = {}
    for name, own in chosen.items():
        needs |= registered()[name].needs(own, plan.index)
    if case == "pg_fdd":
        detector = build_detector("pg_fdd", False, "synced", worlds.PG_FDD, comm, needs)
    else:
        detector = build_detector("resnet18", False, "synced", RESNET, comm, needs)
    facts = Facts(plan.index, plan.frequencies, 5, STEPS, detector.channels, paired(plan))
    parts, width = build(chosen, facts, detector.features)
    if width != detector.features:
        detector.resize_classifier(width)
    return TrainingModule(detector, parts, comm, settings.precision)


def scored(module, plan, comm):
    """Scores of the first batch, of all ranks."""
    module.eval()
    rows = module.score(worlds.batches(plan, comm.rank, comm.world, 0, 1, side=32)[0])
    module.train()
    return comm.gather(rows, "scores").numpy()


class Kept:
    """Saver and observer in one."""

    def __init__(self):
        self.losses, self.norms, self.state = [], [], None

    def __call__(self, step, values):
        self.losses.append(values["loss"])
        self.norms.append(values["gradient_norm"])

    def save(self, step, backend, values=None):
        state = backend.state(lambda name: True)
        self.state = {part: {name: value.numpy() for name, value in tensors.items()} for part, tensors in state.items()}
        return {}

    def poll(self):
        pass

    finish = poll


class Scoring:
    """ScoringData of the plan's first batches."""

    def __init__(self, plan, comm):
        self.plan, self.comm = plan, comm

    def batches(self, size, count, *key):
        return worlds.batches(self.plan, self.comm.rank, self.comm.world, 0, count, side=32)


def checkpoint_of(result):
    """What a Trainer resumes from."""
    tensors = {part: {name: torch.from_numpy(np.array(value)) for name, value in result[part].items()}
               for part in ("model", "optimizer")}  # fmt: skip
    return SimpleNamespace(tensors=tensors.__getitem__, folder="a checkpoint", step=result["step"])
