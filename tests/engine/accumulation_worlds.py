"""A detector with everything that interventions may read, plans for it, what runs on each rank, and bugs to plant."""

import sys
from contextlib import contextmanager, nullcontext
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
from dist_fair.data.window import Window, canonical_order, paired
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.engine import module as engine
from dist_fair.engine.loop import Rhythm, Trainer
from dist_fair.engine.module import TrainingModule
from dist_fair.interventions.base import Facts, Gather, Intervention, Sum, Weighted, registered
from tests.data.making import bare_index

BATCH, LANES, STEPS = 32, 4, 8
PAIRED = (TapeSpec("real", 0), TapeSpec("fake", 1))
BOTH = {"attributes": ["gender", "race"]}
ALIGNMENT = {**BOTH, "epsilon": 0.3, "grid": 16, "bandwidth": 0.1}
PLAIN = {"cross_entropy": {}}
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
    "decoded": {**PLAIN, "decoded": {}},
    "delayed": {**PLAIN, "pair_alignment": {**BOTH, "delay": 0.5}},
}


class Small(Detector):
    """Two convolutions with group norm, dropout by keys; and, if needed, a head for demographics and a decoder."""

    offers = ("demographic_logits", "reconstruction")

    def __init__(self, needs, width=8):
        super().__init__(width, width)
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.classifier = nn.GroupNorm(2, width), nn.Linear(width, 2)
        self.demographics = nn.Linear(width, needs["demographic_logits"]) if "demographic_logits" in needs else None
        self.decoder = nn.Conv2d(width, 3, 3, padding=1) if "reconstruction" in needs else None
        self.condition = nn.Linear(width, width) if "reconstruction" in needs else None
        self.rows, self.decoded = [], []  # of each call

    def extract(self, images, keys=None):
        self.rows.append(len(images))
        code = nn.functional.silu(self.norm(self.first(images)))
        maps = nn.functional.silu(self.second(code)) * self.channel_mask[:, None, None]
        features = maps.mean((2, 3))
        extras = {}
        if self.training and self.demographics is not None:
            extras["demographic_logits"] = self.demographics(self.dropped(features, keys, 1))
        if self.training and self.decoder is not None:
            extras |= {"code": code, "condition": self.condition(features)}
        features = self.dropped(features, keys, 2)
        return Outputs(features[:, :0], features, maps, extras, self.decode if self.decoder is not None else None)

    def classify(self, features, keys=None):
        return self.classifier(self.dropped(features, keys, 3))

    def decode(self, code, condition, keys):
        self.decoded.append(len(code))
        return self.decoder(self.dropped(code * condition[:, :, None, None], keys, 4)).tanh()

    def resize_classifier(self, features):
        self.classifier = nn.Linear(features, 2)

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


class Decoded(Intervention):
    """Looks at pairs on a rank: fakes decoded under the conditions of the reals, and the reverse, against images."""

    terms = ("decoded",)

    @dataclass
    class Settings(Weighted):
        pass

    @classmethod
    def needs(cls, settings, index):
        return {"reconstruction": 0}

    def summarise(self, outputs, batch, weights):
        real, fake = (torch.where(batch.labels == label)[0] for label in (0, 1))
        rows, others = torch.cat([fake, real]), torch.cat([real, fake])
        decoded = outputs.decode(outputs.extras["code"][rows], outputs.extras["condition"][others], batch.keys[rows])
        errors = (decoded - batch.images[rows]).abs().mean((1, 2, 3))
        return {"errors": Sum(torch.stack([errors.sum(), errors.new_tensor(len(rows))]))}

    def objective(self, summary):
        return {"decoded": summary["errors"][0] / summary["errors"][1]}


STAND_INS = {"neighbours": Neighbours, "decoded": Decoded}


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


def plan(accumulate=1, tapes=PAIRED, batch_size=BATCH, lanes=LANES, data=None):
    return TrainingPlan(data or index(), tapes, batch_size // accumulate, lanes, window=8, seed=4)


def batches(plan, rank, world, start, stop, side=8):
    """Micro-batches as training loads them; a sample's image (3, side, side) depends on its row and epoch."""

    def read(samples, epochs):
        drawn = [np.random.default_rng([sample, epoch]).normal(size=(3, side, side))
                 for sample, epoch in zip(samples, epochs, strict=True)]  # fmt: skip
        return SimpleNamespace(images=np.stack(drawn), samples=samples, bad=[])

    return list(training_loader(plan, SimpleNamespace(index=plan.index, read=read), rank, world, start, stop))


def module(case, plan, comm, precision="fp64"):
    """Detector and interventions as `assembly.build_module` puts them together."""
    kinds = registered() | STAND_INS
    settings = {name: kinds[name].Settings(**given) for name, given in CASES[case].items()}
    needs = {}
    for name, chosen in settings.items():
        needs |= kinds[name].needs(chosen, plan.index)
    torch.manual_seed(7)
    detector = Small(needs)
    facts = Facts(plan.index, plan.frequencies, 5, STEPS, detector.channels, paired(plan))
    parts, width = nn.ModuleDict(), detector.features
    for name, chosen in settings.items():
        parts[name] = kinds[name](chosen, facts, width)
        width = parts[name].width
    detector.resize_classifier(width)
    return TrainingModule(detector, parts, comm, precision)


def trainer(case, comm, accumulate, exact=True, precision="fp64"):
    """A Trainer in training; the module is wrapped in DDP, as on a cluster, if there are processes to speak to."""
    chosen = plan(accumulate)
    bare = module(case, chosen, comm, precision)
    order = canonical_order(chosen, accumulate, comm.world) if exact and accumulate > 1 else None
    rhythm = Rhythm(STEPS, STEPS, accumulate, None, None, 1, order)
    accelerator = SimpleNamespace(
        no_sync=lambda wrapped: wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext(),
        backward=lambda loss: loss.backward(),
    )
    made = Trainer(bare, torch.optim.SGD(bare.parameters(), 0.2), None, accelerator, comm, rhythm,
                   seed=5, recipe={}, folder=None, describe=str)  # fmt: skip
    if torch.distributed.is_initialized():
        made.wrapped = DistributedDataParallel(bare, gradient_as_bucket_view=True)
    bare.train()
    return chosen, made


def step(comm, case, accumulate, number=1, **settings):
    """Loss, terms and gradients of one step, the buffers after it and the rows that the detector saw."""
    chosen, made = trainer(case, comm, accumulate, **settings)
    made.step = number
    return after(made, made._backward(batches(chosen, comm.rank, comm.world, number * accumulate,
                                              (number + 1) * accumulate)))  # fmt: skip


def steps(comm, tasks):
    """`step` of each (case, accumulate)."""
    return [step(comm, *task) for task in tasks]


def trajectory(case, accumulate, count=STEPS, **settings):
    """`step` after each of some steps of gradient descent, on one rank."""
    comm = Communicator()
    chosen, made = trainer(case, comm, accumulate, **settings)
    found = []
    for made.step in range(count):
        made.optimizer.zero_grad()
        first = made.step * accumulate
        history = made._backward(batches(chosen, comm.rank, comm.world, first, first + accumulate))
        found.append(after(made, history))
        made.optimizer.step()
    return found


def after(made, history):
    detector = made.module.detector
    result = {
        "loss": np.array(sum(losses.loss.item() for losses in history) / len(history)),
        "gradients": {name: value.grad.numpy().copy() for name, value in made.module.named_parameters()},
        "buffers": {name: value.numpy().copy() for name, value in made.module.named_buffers()},
        "rows": [*detector.rows],
        "decoded": [*detector.decoded],
    }
    detector.rows, detector.decoded = [], []
    return result


def difference(one, other):
    """Largest difference of losses, gradients and buffers; each relative to its largest value, or to 1e-3 if less."""
    assert one["gradients"].keys() == other["gradients"].keys()
    pairs = [(one["loss"], other["loss"])]
    for kind in ("gradients", "buffers"):
        pairs += [(value, other[kind][name]) for name, value in one[kind].items()]
    return max(float(np.abs(left - right).max() / max(np.abs(left).max(), 1e-3)) for left, right in pairs)


# Bugs: each is a context, on one rank, in which `step` has it. --------------------------------------------------------


@contextmanager
def patched(owner, name, value):
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def by_micro_batch():
    """Rows in the order in which they were read."""

    def as_read(plan, count, world):
        return torch.arange(count * plan.batch_size // world)

    return patched(sys.modules[__name__], "canonical_order", as_read)


def one_by_one():
    """Plain accumulation: an objective for each micro-batch."""
    return patched(Trainer, "_windows", lambda self, batches: [Window([batch]) for batch in batches])


def labels_as_read():
    """Outputs in canonical order, and labels and groups in another."""

    def merged(self):
        return arranged(replace(self, order=torch.arange(len(self.order))))

    arranged = Window.merged
    return patched(Window, "merged", merged)


def without_gradient():
    """The first pass has no graph, and nobody hands the second one the gradients of its outputs."""

    def constant(self, columns):
        return arranged(self, [column.detach() for column in columns])

    arranged = Window.arranged
    return patched(Window, "arranged", constant)


def divided_twice():
    """The joined loss is a mean over all samples, and is divided by the number of micro-batches as well."""

    def smaller(self, batches):
        history = backward(self, batches)
        for parameter in self.module.parameters():
            parameter.grad /= len(batches)
        return history

    backward = Trainer._backward
    return patched(Trainer, "_backward", smaller)


def redrawn():
    """The re-run draws dropout anew."""

    def dropped(self, x, keys, salt):
        return draw(self, x, keys, salt + 100 * (torch._C._current_graph_task_id() != -1))

    draw = Small.dropped
    return patched(Small, "dropped", dropped)


def last_only():
    """Only the micro-batch that kept its activations gets gradients."""

    def once(function, *arguments, use_reentrant):
        with torch.no_grad():
            return function(*arguments)

    return patched(engine, "checkpoint", once)


BUGS = {
    bug.__name__: bug
    for bug in (by_micro_batch, one_by_one, labels_as_read, without_gradient, divided_twice, redrawn, last_only)
}
