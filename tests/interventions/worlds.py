"""What runs on each rank, and the classic bugs to plant there. At the top of a module: it travels by name."""

import torch
from torch import nn

from dist_fair import collectives
from dist_fair.collectives import Communicator
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.interventions import base, channel_decoupling
from tests.interventions.cases import batch, build, outputs, parts
from tests.interventions.exactness import averaged

SIZE = 17


class Linear(nn.Module):
    """Features (B, 4) -> logits (B, 2), initialised the same everywhere."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(4, 2, generator=random, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(2, generator=random, dtype=torch.float64))

    def forward(self, features):
        return features @ self.matrix + self.bias


def step(comm, case, sizes, bug=None):
    """Loss and parameter gradients of one training step, averaged over ranks as DDP does."""
    whole, features, weights = batch(SIZE)
    rows = parts(sizes)[comm.rank]
    model, intervention = Linear(), build(case)
    bug = BUGS.get(bug, nothing)
    scale = bug(comm, intervention) or 1.0
    summary = intervention.summarise(outputs(model(features[rows])), whole.rows(rows, sizes), weights[rows])
    (name,) = intervention.terms
    term = intervention.objective(base.exchange({"it": summary}, comm, sizes)["it"])[name]
    (term * scale).backward()
    return term.item(), averaged(model.named_parameters(), comm)


class Small(Detector):
    """One convolution, normalisation with statistics of its own, ReLU, mask. Channel 3 is dead."""

    def __init__(self, channels=11):
        super().__init__(channels, channels)
        random = torch.Generator().manual_seed(2)
        self.convolution, self.norm = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random)
        self.norm.running_mean.copy_(torch.randn(channels, generator=random))
        self.norm.weight.data[3], self.norm.bias.data[3] = 0, -1
        self.double()

    def extract(self, images, keys=None):
        maps = self.norm(self.convolution(images)).relu() * self.channel_mask[:, None, None]
        return Outputs(maps.new_zeros(len(maps), 0), maps.mean((2, 3)), maps)


class Scoring:
    """ScoringData over made batches; sizes: rows per rank."""

    def __init__(self, sizes, rank):
        self.sizes, self.rank = sizes, rank

    def batches(self, size, count, *key):
        assert size == sum(self.sizes)
        for number in range(count):
            made, _, _ = batch(size, seed=100 * key[-1] + number)
            yield made.rows(parts(self.sizes)[self.rank], self.sizes)


def decouple(comm, settings, sizes, bug=None):
    """Scores at the first iteration, and the masks and records after each of three."""
    settings = {"part": 0.2, "batch_size": sum(sizes), "batches": 2, "at": [0.1, 0.2, 0.3], **settings}
    detector = Small()
    intervention = build(("channel_decoupling", settings), channels=detector.channels)
    BUGS.get(bug, nothing)(comm, intervention)
    scoring = Scoring(sizes, comm.rank)
    scores = intervention.scores(0, detector, scoring, comm).tolist()
    records, masks = [], []
    for number in range(40):
        if intervention.restructures(number):
            records.append((number, intervention.restructure(number, detector, scoring, comm)))
            masks.append(detector.channel_mask.tolist())
    assert detector.training
    return scores, masks, records


# Bugs: each takes (comm, intervention), plants itself, and may return a factor for the loss. ------------------------


def nothing(comm, intervention):
    pass


def no_factor(comm, intervention):
    """The collectives' backward forgets W: gradients W times too small."""
    collectives._ReplicatedSum.backward = staticmethod(lambda ctx, gradient: (gradient, None, None))
    collectives._ReplicatedGather.backward = staticmethod(
        lambda ctx, gradient: (gradient[ctx.start : ctx.stop], None, None, None)
    )


def times_world(comm, intervention):
    """The popular `loss * world_size` on top."""
    return float(comm.world)


def detached(comm, intervention):
    """all_reduce and all_gather as they come: no gradient crosses them."""
    Communicator.replicated_sum = lambda self, tensor, name: self.sum(tensor, name).requires_grad_()
    Communicator.replicated_gather = lambda self, rows, name, sizes: self.gather(rows, name, sizes).requires_grad_()


def local(comm, intervention):
    """No exchange: every rank's loss is over its own samples, its own groups, its own class means."""
    Communicator.replicated_sum = lambda self, tensor, name: tensor
    Communicator.replicated_gather = lambda self, rows, name, sizes: rows


def local_counts(comm, intervention):
    """Sums are global, the numbers they are divided by or selected with are local."""
    reduce = Communicator.replicated_sum

    def half(self, tensor, name):
        whole = reduce(self, tensor, name)
        mask = torch.zeros_like(tensor)
        mask[-14:] = 1  # counts come last, (G + 1, 2)
        if tensor.numel() == 6:  # or are every third number, (2, 3)
            mask = torch.tensor([0, 0, 1]).to(tensor).repeat(2)
        return torch.where(mask > 0, tensor, whole)

    Communicator.replicated_sum = half


def reversed_ranks(comm, intervention):
    """A gather whose parts come back in another order than the ranks'."""
    gather = Communicator._gather

    def backwards(self, rows, name, sizes):
        return torch.cat(gather(self, rows, name, sizes).split(sizes)[::-1])

    Communicator._gather = backwards


def own_rows(comm, intervention):
    """Each rank scores by its own part of the scoring batch."""
    intervention.scores = lambda iteration, detector, data, _: type(intervention).scores(
        intervention, iteration, detector, data, Alone()
    )


def own_rows_unnoticed(comm, intervention):
    """The same, and nobody compares the masks."""
    own_rows(comm, intervention)
    comm.agree = lambda value, name: None


class Alone(Communicator):
    """A rank that believes it is alone."""

    def __init__(self):
        super().__init__()
        self.rank, self.world = 0, 1

    def _sizes(self, rows, sizes):
        return [len(rows)]


def with_self(comm, intervention):
    """Every sample counts as its own neighbour, as in the released code of the method's origin."""
    loss = channel_decoupling.soft_nearest_neighbour_loss

    def biased(maps, codes, temperature, distance):
        twice = torch.cat([maps, maps], dim=1)
        return loss(twice, torch.cat([codes, codes]), temperature, distance)

    channel_decoupling.soft_nearest_neighbour_loss = biased


BUGS = {
    bug.__name__: bug
    for bug in (
        no_factor, times_world, detached, local, local_counts, reversed_ranks, own_rows, own_rows_unnoticed, with_self
    )
}  # fmt: skip
