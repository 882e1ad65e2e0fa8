"""Training with subgroup norm on each rank, and the classic bugs to plant there. At the top of a module: it travels by
name."""

from types import SimpleNamespace

import numpy as np
import torch

from dist_fair import collectives
from dist_fair.collectives import Communicator
from dist_fair.data.index import Column
from dist_fair.interventions import base, cross_entropy
from dist_fair.interventions.subgroup_norm import SubgroupNorm
from tests.interventions import cases
from tests.interventions.exactness import averaged, restored
from tests.interventions.worlds import Alone

SIZE, WIDTH = 23, 5
# Each leaves something out: one class, every group (and with it the running moments), male/Black always.
STEPS = (("usual", 0), ("one class", 1), ("unknown", 2), ("usual", 3))
BUFFERS = ("running_count", "running_mean", "running_variance")


def index(size=60):
    """Attribute codes of a training set, some unknown, and how often the plan draws each sample."""
    random = np.random.default_rng(8)
    codes = {name: random.integers(-1, len(values), size) for name, values in cases.VOCABULARY.items()}
    return codes, random.dirichlet(np.ones(size))


def build(settings, width=WIDTH):
    codes, frequencies = index()
    columns = {name: Column(values, codes[name].astype(np.int32)) for name, values in cases.VOCABULARY.items()}
    facts = base.Facts(SimpleNamespace(attributes=columns), frequencies, seed=5, steps=100, channels=0)
    return SubgroupNorm(SubgroupNorm.Settings(**settings), facts, width)


def step_batch(step, size=SIZE):
    """A global batch, its features (size, 4), shifted by gender, and weights."""
    kind, seed = STEPS[step]
    whole, features, weights = cases.batch(size, seed, kind)
    return whole, features + whole.attributes["gender"][:, None], weights


def matrices():
    """Parameters before and behind the norm."""
    random = torch.Generator().manual_seed(3)
    sizes = (4, WIDTH), (WIDTH, 2)
    return [torch.randn(size, generator=random, dtype=torch.float64).requires_grad_() for size in sizes]


def train(comm, settings, sizes, bug="nothing"):
    """What each step gives on this rank: outputs, gradients as if averaged by DDP, buffers; and outputs in evaluation.

    A loss through the summaries of an intervention: weighted cross-entropy, a `replicated` sum.
    """
    norm, (before, after) = build(settings).train(), matrices()
    BUGS[bug](comm, norm)
    objective = cross_entropy.CrossEntropy(cross_entropy.CrossEntropy.Settings(), SimpleNamespace(index=None), WIDTH)
    found = {}
    for step in range(len(STEPS)):
        whole, features, weights = step_batch(step)
        rows = cases.parts(sizes)[comm.rank]
        part = whole.rows(rows, sizes)
        h = features[rows] @ before
        h.retain_grad()
        normalised = norm.transform(h, part, comm)
        summary = objective.summarise(cases.outputs(normalised @ after), part, weights[rows])
        loss = objective.objective(base.exchange({"it": summary}, comm, sizes)["it"])["cross_entropy"]
        before.grad = after.grad = None
        loss.backward()
        found |= {f"loss {step}": loss.detach(), f"outputs {step}": normalised.detach()}
        found |= {f"inputs {step}": h.grad / comm.world}  # the one gradient rule
        found |= averaged([(f"before {step}", before), (f"after {step}", after)], comm)
        found |= {f"{name} {step}": getattr(norm, name).clone() for name in BUFFERS}
    norm.eval()
    found["outputs in evaluation"] = norm.transform(h, part, comm).detach()
    return found


def train_each(comm, all_settings, sizes):
    return [train(comm, settings, sizes) for settings in all_settings]


def train_with_each(comm, bugs, settings, sizes):
    """The same with one bug after the other; what they patch is put back."""
    answers = []
    for bug in bugs:
        with restored():
            answers.append(train(comm, settings, sizes, bug))
    return answers


# Bugs: each takes (comm, norm) and plants itself. ---------------------------------------------------------------------


def nothing(comm, norm):
    pass


def local_moments(comm, norm):
    """What every single-process norm becomes under DDP."""
    Communicator.shared_sum = lambda self, tensor, name: tensor


def local_counts(comm, norm):
    """Global sums over local counts."""
    add = Communicator.shared_sum
    Communicator.shared_sum = lambda self, tensor, name: torch.cat([tensor[:, :1], add(self, tensor, name)[:, 1:]], 1)


def no_gradient(comm, norm):
    """An all-reduce as it comes: no gradient crosses it."""
    Communicator.shared_sum = lambda self, tensor, name: self.sum(tensor, name)


def local_gradient(comm, norm):
    """Every rank differentiates through the moments by its own rows' outputs only."""
    collectives._SharedSum.backward = staticmethod(lambda ctx, gradient: (gradient, None, None))


def replicated(comm, norm):
    """The verb for what every rank repeats."""
    Communicator.shared_sum = Communicator.replicated_sum


def times_world(comm, norm):
    """The factor W, which the gradients already carry, a second time."""
    _scale_backward(comm.world)


def over_world(comm, norm):
    """lightly #1977: gradients averaged over ranks instead of summed."""
    _scale_backward(1 / comm.world)


def _scale_backward(factor):
    backward = collectives._SharedSum.backward
    collectives._SharedSum.backward = staticmethod(lambda ctx, gradient: backward(ctx, gradient * factor))


def own_running_moments(comm, norm):
    """Outputs as they should be, running moments from the rank's own rows."""
    transform = norm.transform

    def twice(features, batch, comm):
        before = {name: getattr(norm, name).clone() for name in BUFFERS}
        result = transform(features, batch, comm)
        if norm.training:
            for name, value in before.items():
                getattr(norm, name).copy_(value)
            transform(features.detach(), batch, Alone())
        return result

    norm.transform = twice


def double_update(comm, norm):
    """Running moments moved twice a step (davda54/sam #17)."""
    track = norm._track
    norm._track = lambda *moments: (track(*moments), track(*moments))


BUGS = {
    bug.__name__: bug
    for bug in (
        nothing, local_moments, local_counts, no_gradient, local_gradient, replicated, times_world, over_world,
        own_running_moments, double_update,
    )
}  # fmt: skip
