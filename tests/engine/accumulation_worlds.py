"""A small detector with dropout and without batch statistics, plans, cases, and what runs on each rank."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_fair.interventions  # noqa: F401  (registers)
from dist_fair import keyed_rows
from dist_fair.collectives import Communicator
from dist_fair.data.index import Column
from dist_fair.data.loading import training_loader
from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.data.window import canonical_order, paired
from dist_fair.detectors import build_detector
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.engine.backends.ddp import Ddp
from dist_fair.engine.loop import Rhythm, Trainer
from dist_fair.engine.module import TrainingModule
from dist_fair.interventions.base import Facts, Gather, Intervention, Weighted, registered
from dist_fair.recipe.schema import Sam
from tests.data.making import bare_index

BATCH, LANES, STEPS = 32, 4, 8
MIXED, PAIRED = (TapeSpec("all"),), (TapeSpec("real", 0), TapeSpec("fake", 1))
BOTH = {"attributes": ["gender", "race"]}
ALIGNMENT = {**BOTH, "epsilon": 0.3, "grid": 16, "bandwidth": 0.1}
PLAIN = {"cross_entropy": {}}
PG_FDD = {"backbone": "resnet18", "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 16, "width": 16,
          "heads": {"hidden": 8}, "smooth": True}  # fmt: skip
CASES = {
    "plain": PLAIN,
    "balanced": {"cross_entropy": {"reduction": "class_balanced"}},
    "subgroup_norm": {**PLAIN, "subgroup_norm": {"minimum": 4}},
    "subgroup_norm, detached": {**PLAIN, "subgroup_norm": {"minimum": 0, "detach": True}},
    "all pairs": {"pair_alignment": BOTH},
    "hardest pairs": {"pair_alignment": {**BOTH, "pairs": "hardest", "hardest": 2, "match": "manipulation"}},
    "grid": {"distribution_alignment": ALIGNMENT},
    "samples": {"distribution_alignment": {**ALIGNMENT, "support": "samples"}},
    "dag": {"conditional_value_at_risk": {"attributes": [], "inner_alpha": None, "alpha": 0.3}},
    "daw": {"conditional_value_at_risk": {**BOTH, "inner_alpha": 0.6}},
    "margin": {**PLAIN, "margin_loss": BOTH},
    "daid": {
        **PLAIN,
        "inverse_propensity": BOTH,
        "subgroup_norm": BOTH,
        "low_rank_projection": {"rank": 4},
        "pair_alignment": BOTH,
    },
    "neighbours": {**PLAIN, "neighbours": {}},
    "pg_fdd": {
        "conditional_value_at_risk": BOTH,
        "shared_forgery": {},
        "specific_forgery": {},
        "margin_loss": BOTH,
        "contrastive_loss": {},
        "reconstruction_loss": {},
    },
    "delayed": {**PLAIN, "pair_alignment": {**BOTH, "delay": 0.5}},
}


class Small(Detector):
    """Two convolutions with group norm, dropout by keys and, if needed, a head for demographics."""

    offers = ("demographic_logits",)

    def __init__(self, needs, width=8):
        super().__init__(width, width)
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(2, width)
        self.second, self.classifier = nn.Conv2d(width, width, 3, stride=4, padding=1), nn.Linear(width, 2)
        self.demographics = nn.Linear(width, needs["demographic_logits"]) if needs else None

    def extract(self, images, keys=None):
        images = images.to(self.first.weight.dtype)
        maps = nn.functional.silu(self.second(nn.functional.silu(self.norm(self.first(images)))))
        maps = maps * self.channel_mask[:, None, None]
        features, extras = maps.mean((2, 3)), {}
        if self.training and self.demographics is not None:
            extras["demographic_logits"] = self.demographics(self.dropped(features, keys, 1))
        return Outputs(features[:, :0], self.dropped(features, keys, 2), maps, extras)

    def classify(self, features, keys=None):
        return self.classifier(self.dropped(features, keys, 3))

    def resize_classifier(self, features):
        self.classifier = nn.Linear(features, 2)
        self.classifier.weight.data *= 10  # predictions that differ

    def dropped(self, x, keys, salt):
        return x if keys is None else keyed_rows.dropout(x, 0.25, keyed_rows.mixed(keys, salt))


class Neighbours(Intervention):
    """Looks at the order of the global batch: the mean product of the features of each row and the next."""

    terms = ("neighbours",)

    @dataclass
    class Settings(Weighted):
        pass

    def summarise(self, outputs, batch, weights):
        return {"rows": Gather(outputs.features)}

    def objective(self, summary):
        return {"neighbours": 10 * (summary["rows"] * summary["rows"].roll(1, 0)).mean()}


def index(size=75, seed=3):
    """Training data of three shards with unknown values, an absent group (male/Black) and manipulations."""
    random = np.random.default_rng(seed)
    gender, race = random.integers(-1, 2, size), random.integers(-1, 3, size)
    race[(gender == 1) & (race == 1)] = 2
    attributes = {"gender": Column(("female", "male"), gender.astype(np.int32)),
                  "race": Column(("Asian", "Black", "White"), race.astype(np.int32))}  # fmt: skip
    labels = random.integers(0, 2, size)
    manipulations = np.where(labels == 1, random.integers(-1, 2, size), -1).astype(np.int32)
    made = bare_index([size // 3] * 3, labels)
    return replace(made, attributes=attributes, manipulations=Column(("Deepfakes", "FaceSwap"), manipulations))


def plan(case, accumulate=1):
    tapes = PAIRED if case in ("pg_fdd", "hardest pairs", "daid") else MIXED
    return TrainingPlan(index(), tapes, BATCH // accumulate, LANES, window=8, seed=4)


def batches(plan, rank, world, start, stop, side=8):
    """Micro-batches as training loads them; a sample's image (3, side, side) depends on its row and epoch."""

    def read(samples, epochs):
        drawn = [np.random.default_rng([sample, epoch]).normal(size=(3, side, side))
                 for sample, epoch in zip(samples, epochs, strict=True)]  # fmt: skip
        return SimpleNamespace(images=np.stack(drawn), samples=samples, bad=[])

    return list(training_loader(plan, SimpleNamespace(index=plan.index, read=read), rank, world, start, stop))


def module(case, plan, comm, precision="fp64"):
    """Detector and interventions as `assembly.build_module` puts them together."""
    kinds = registered() | {"neighbours": Neighbours}
    settings = {name: kinds[name].Settings(**given) for name, given in CASES[case].items()}
    needs = {}
    for name, chosen in settings.items():
        needs |= kinds[name].needs(chosen, plan.index)
    torch.manual_seed(7)
    # PG-FDD's adjustment has batch norm, whatever the backbone.
    detector = build_detector("pg_fdd", False, "frozen", PG_FDD, comm, needs) if case == "pg_fdd" else Small(needs)
    facts = Facts(plan.index, plan.frequencies, 5, STEPS, detector.channels, paired(plan))
    parts, width = nn.ModuleDict(), detector.features
    for name, chosen in settings.items():
        parts[name] = kinds[name](chosen, facts, width)
        width = parts[name].width
    if case != "pg_fdd":
        detector.resize_classifier(width)
    return TrainingModule(detector, parts, comm, precision)


def trainer(case, comm, accumulate, exact=True, precision="fp64"):
    """A Trainer in training; the module is wrapped in DDP, as on a cluster, if there are processes to speak to."""
    chosen = plan(case, accumulate)
    bare = module(case, chosen, comm, precision)
    order = canonical_order(chosen, accumulate, comm.world) if exact and accumulate > 1 else None
    rhythm = Rhythm(STEPS, STEPS, accumulate, None, None, order)
    accelerator = SimpleNamespace(
        no_sync=lambda wrapped: wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext(),
        backward=lambda loss: loss.backward(),
        prepare_model=lambda plain: (
            DistributedDataParallel(plain, gradient_as_bucket_view=True)
            if torch.distributed.is_initialized()
            else plain
        ),
    )
    backend = Ddp(bare, lambda plain: torch.optim.SGD(plain.parameters(), 0.2), accelerator)
    made = Trainer(backend, None, comm, rhythm, sam=Sam(), seed=5, saver=None, describe=str)
    bare.train()
    made.rows, made.decoded = counted(bare.detector)
    return chosen, made


def counted(detector):
    """The numbers of rows of the calls of `extract` and of the decoder, as they come."""
    rows, decoded, extract = [], [], detector.extract

    def noted(images, keys=None):
        rows.append(len(images))
        return extract(images, keys)

    detector.extract = noted
    if hasattr(detector, "decoder"):
        detector.decoder.register_forward_pre_hook(lambda _, arguments: decoded.append(len(arguments[0])))
    return rows, decoded


def step(comm, case, accumulate, number=1, **settings):
    """Loss and gradients of one step, the buffers after it, and the rows of the detector's calls."""
    chosen, made = trainer(case, comm, accumulate, **settings)
    made.step = number
    return after(made, loaded(chosen, comm, made, case))


def steps(comm, tasks):
    """`step` of each (case, accumulate)."""
    return [step(comm, *task) for task in tasks]


def trajectory(case, accumulate, **settings):
    """`step` after each step of a run, on one rank."""
    comm, found = Communicator(), []
    chosen, made = trainer(case, comm, accumulate, **settings)
    for made.step in range(STEPS):
        made.backend.optimizer.zero_grad()
        found.append(after(made, loaded(chosen, comm, made, case)))
        made.backend.optimizer.step()
    return found


def loaded(plan, comm, made, case):
    """The micro-batches of the trainer's step."""
    first = made.step * made.rhythm.accumulate
    side = 32 if case == "pg_fdd" else 8
    return batches(plan, comm.rank, comm.world, first, first + made.rhythm.accumulate, side)


def after(made, batches):
    history = made._backward(batches)
    gradients = {name: torch.zeros_like(one) if one.grad is None else one.grad.clone()
                 for name, one in made.module.named_parameters()}  # fmt: skip
    result = {
        "loss": sum(losses.loss.item() for losses in history) / len(history),
        "gradients": {name: gradient.numpy() for name, gradient in gradients.items()},
        "buffers": {name: value.numpy().copy() for name, value in made.module.named_buffers()},
        "rows": [*made.rows],
        "decoded": [*made.decoded],
    }
    made.rows.clear()
    made.decoded.clear()
    return result


def difference(one, other):
    """Largest difference of losses, gradients and buffers; relative to the tensor's largest value, or to 1e-3 of that
    of all gradients or buffers."""
    worst = abs(one["loss"] - other["loss"]) / one["loss"]
    for kind in ("gradients", "buffers"):
        assert one[kind].keys() == other[kind].keys()
        least = 1e-3 * max(np.abs(value).max() for value in one[kind].values())
        for name, value in one[kind].items():
            worst = max(worst, np.abs(value - other[kind][name]).max() / max(np.abs(value).max(), least))
    return worst
