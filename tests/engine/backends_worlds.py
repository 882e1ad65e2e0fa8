"""A small run with a backend, as each rank has it: losses, norms, scores, the state at the end.

The detectors are ResNets with synced norm and without kinks, PG-FDD's, or a ViT; data come from a plan, as in training.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from dist_fair.data.window import canonical_order, paired
from dist_fair.detectors import build_detector
from dist_fair.engine import backends
from dist_fair.engine.activations import checkpoint_activations
from dist_fair.engine.backends import zero
from dist_fair.engine.launch import accelerator
from dist_fair.engine.loop import Rhythm, Trainer
from dist_fair.engine.module import TrainingModule
from dist_fair.engine.optimization import build_optimizer, build_schedule
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, build, registered
from dist_fair.recipe.schema import Optimizer, Schedule, Train
from tests.engine import accumulation_worlds as worlds
from tests.engine import planted_backend_bugs

STEPS = 3
BOTH = worlds.BOTH
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 16], "stem_type": "deep", "stem_width": 4, "smooth": True}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
PLAIN = {"cross_entropy": {}}
CASES = {
    "erm": PLAIN,
    "sfd_gda": {**PLAIN, "channel_decoupling": {"at": [0.4], "part": 0.2, "batch_size": 16, "batches": 1},
                "distribution_alignment": worlds.ALIGNMENT},
    "daid": {**PLAIN, "inverse_propensity": BOTH, "subgroup_norm": {**BOTH, "minimum": 4},
             "low_rank_projection": {"rank": 5}, "pair_alignment": BOTH},
    "pg_fdd": worlds.CASES["pg_fdd"],
    "pg_fdd_frozen": worlds.CASES["pg_fdd"],
    "tokens": PLAIN,
}  # fmt: skip


@dataclass
class Task:
    """A run of `case` from the beginning, or from the state of the result `start`, up to step `stop`."""

    backend: str = "ddp"
    case: str = "erm"
    stop: int = STEPS
    start: dict | None = None
    train: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=lambda: {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05})
    bug: str | None = None
    misfits: bool = False  # what `misfits` says of it, instead

    def chosen(self):
        return Optimizer(**self.optimizer)


def run(comm, tasks):
    """The results of several tasks, on this rank; an error is its text."""
    rank, world = str(comm.rank), str(comm.world)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, OMP_NUM_THREADS="1")
    with mock.patch.object(torch.cuda, "device_count", return_value=0):
        return [misfits(comm, task) if task.misfits else one_run(comm, task) for task in tasks]


def one_run(comm, task):
    settings = Train(
        **{"backend": task.backend, "clip": 0.3, "accumulate": 1, "batch_size": worlds.BATCH, **task.train}
    )
    plan = worlds.plan("pg_fdd" if task.case.startswith("pg_fdd") else "plain", settings.accumulate)
    module = made(task.case, plan, comm, settings)
    chosen, kept = task.chosen(), Kept()
    order = canonical_order(plan, settings.accumulate, comm.world) if settings.accumulate_exact else None
    rhythm = Rhythm(STEPS, task.stop, settings.accumulate, settings.clip, None, order)
    with getattr(planted_backend_bugs, task.bug)() if task.bug else nullcontext():
        backend = shared(settings, module, chosen)
        schedule = build_schedule(backend.optimizer, Schedule(name="cosine", warmup=0.2), STEPS)
        trainer = Trainer(backend, schedule, comm, rhythm, sam=chosen.sam, seed=5, saver=kept, describe=str)
        if task.start:
            trainer.resume(checkpoint_of(task.start))
        batches = partial(
            worlds.batches, plan, comm.rank, comm.world, side=32 if task.case.startswith("pg_fdd") else 16
        )
        trainer.run(batches, Scoring(batches), [kept])
        with backend.whole() as plain:
            scores = scored(plain, *batches(0, 1))
    return {"losses": np.array(kept.losses), "norms": np.array(kept.norms), "scores": scores,
            "step": trainer.step, "tells": backend.describe(), **kept.state}  # fmt: skip


def made(case, plan, comm, settings):
    """Detector and interventions as `assembly.build_module` puts them together."""
    torch.manual_seed(7)
    chosen = {name: registered()[name].Settings(**given) for name, given in CASES[case].items()}
    needs = {}
    for name, own in chosen.items():
        needs |= registered()[name].needs(own, plan.index)
    if case.startswith("pg_fdd"):
        norm = "frozen" if case.endswith("frozen") else "synced"
        detector = build_detector("pg_fdd", False, norm, worlds.PG_FDD, comm, needs)
    elif case == "tokens":
        detector = build_detector("vit_tiny_patch16_224", False, "synced", VIT, comm, needs)
    else:
        detector = build_detector("resnet18", False, "synced", RESNET, comm, needs)
    checkpoint_activations(SimpleNamespace(train=settings, detector=SimpleNamespace(name=case, norm="")), detector)
    facts = Facts(plan.index, plan.frequencies, 5, STEPS, detector.channels, paired(plan))
    parts, width = build(chosen, facts, detector.features)
    if width != detector.features:
        detector.resize_classifier(width)
    return TrainingModule(detector, parts, comm, settings.precision)


def shared(settings, module, optimizer):
    """The backend of some settings, on the CPU, where offloading has no effect but goes the same ways. ZeRO's buckets
    are small: several of them, and a tensor that is larger than one."""
    with mock.patch.object(backends, "refuse_idle_offload"), mock.patch.object(zero, "_BUCKET", 2000):
        return backends.make_backend(settings, module, lambda plain: build_optimizer(plain, optimizer), accelerator())


def scored(module, batch):
    """Scores of a batch, of all ranks."""
    module.eval()
    rows = module.score(batch)
    module.train()
    return module.comm.gather(rows, "scores").numpy()


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
    """ScoringData: the first batches of the training."""

    def __init__(self, first):
        self.first = first

    def batches(self, size, count, *key):
        return self.first(0, count)


def checkpoint_of(result):
    """What a Trainer resumes from."""
    return SimpleNamespace(tensors=tensors_of(result).__getitem__, folder="a checkpoint", step=result["step"])


def tensors_of(result):
    return {part: {name: torch.from_numpy(np.array(value)) for name, value in result[part].items()}
            for part in ("model", "optimizer")}  # fmt: skip


def misfits(comm, task):
    """{what does not fit: the refusal}, and what "changed", of a backend that was given states of its own run."""
    settings, state = Train(backend=task.backend), tensors_of(one_run(comm, task))
    module = made(task.case, worlds.plan("plain"), comm, settings)
    backend, bias = shared(settings, module, task.chosen()), "detector.classifier.bias"
    before, texts = backend.state(lambda name: True), {}
    for fault, part, key, value in (
        ("a tensor less", "model", bias, None),
        ("another shape", "model", bias, torch.ones(3)),
        ("another moment", "optimizer", f"exp_avg/{bias}", torch.ones(3)),
        ("a moment less", "optimizer", f"exp_avg/{bias}", None),
        ("a moment more", "optimizer", "exp_avg/detector.other", torch.ones(3)),
    ):
        wrong = {one: dict(tensors) for one, tensors in state.items()}
        wrong[part][key] = value
        wrong[part] = {one: tensor for one, tensor in wrong[part].items() if tensor is not None}
        try:
            backend.load(wrong["model"], wrong["optimizer"], "a checkpoint")
        except DistFairError as error:
            texts[fault] = str(error)
    after, nothing = backend.state(lambda name: True)["model"], torch.zeros(0)
    changed = [key for key, value in before["model"].items() if not torch.equal(value, after.get(key, nothing))]
    return {"refusals": texts, "changed": changed}
