"""Features normalised within demographic groups, whose moments are those of the global batch (DAID).

Who holds what: rank r has its rows of h (B_r, d) and their groups; a group may lie on any ranks, in any numbers. Sums
around a shift c add over ranks, so one exchange gives every rank the moments of every group, and of the whole batch:

    local      per group, and for the samples of unknown group     n_g, sum (h - c), sum (h - c)^2
    wire       one all-reduce, fp64                                (G + 1)(2d + 1) numbers, whatever B and W are
    local      h^_i = (h_i - mu_g) / sqrt(sigma2_g + eps)          own rows only
    backward   through mu_g and sigma2_g                           one all-reduce of as many numbers

The sum is a `shared` one (see dist_fair.collectives): what follows it differs per rank. A rank knows only how its own
rows depend on the moments, so those gradients are summed over ranks. They carry W already, by the one gradient rule:
a factor here would be a second one, and a `replicated` sum, which multiplies a rank's own part by W, would be wrong
wherever ranks hold different rows. A rank without any row, or any member of a group, adds zeros and calls too.

c is the running mean over groups, the same on all ranks; between features and result everything is fp64. In the first
step c is 0, and sigma2 loses 1e-16 mean^2 / sigma2: 1e-8 at mean 1e4 and variance 1, where fp32 sums keep no digit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.errors import DistFairError
from dist_fair.interventions.at_inference import Standardisation
from dist_fair.interventions.base import Delayed, Facts, Intervention, register

INFERENCES, MOMENTUM = ("mixture", "group", "none"), 0.1


class Moments(NamedTuple):
    """Mean and biased variance of some populations, each (k, d)."""

    mean: torch.Tensor
    variance: torch.Tensor

    def joined(self, other: "Moments", part: torch.Tensor) -> "Moments":
        """Moments of populations of which `part` (k, 1) is this one and the rest the other (Chan et al. 1979)."""
        rest = 1 - part
        mean = part * self.mean + rest * other.mean
        between = part * rest * (self.mean - other.mean) ** 2
        return Moments(mean, part * self.variance + rest * other.variance + between)


@register("subgroup_norm")
class SubgroupNorm(Intervention):
    """Subgroup-wise feature normalisation ("Fair Deepfake Detectors Can Generalize", eq. 6-7), (B, d) -> (B, d).

        h^_i = (h_i - mu_g) / sqrt(sigma2_g + eps)      mu_g, sigma2_g over all of group g in the global batch

    Small groups. One member alone has h^ = 0 whatever it is, and two that are alike have gradients of 1 / sqrt(eps). A
    group of n < minimum members is therefore filled up to `minimum` with members that are distributed like the whole
    batch: its moments are those of n parts group and minimum - n parts batch. Larger groups are exactly the paper's; a
    lone member's h^ lies within +-sqrt(minimum - 1). Samples of unknown group are normalised by the whole batch.

    Running moments of a group are those of a decaying population: whenever the group is present, its old members count
    (1 - momentum) times as much, and the new ones are added. Groups always present in equal numbers are soon weighted
    as in batch norm's moving average. But batch norm averages variances *within* batches, 0 for groups that come one at
    a time; here the variance between batches counts too, and a batch counts by its members. The price: while features
    drift, the drift counts as variance. Biased, low by momentum / (2 - momentum) / n, 5 % for lone members. What goes
    in is not filled up.

    Inference. The paper is silent; in use nobody knows a face's group.
        mixture   moments of all groups together, by how often the training plan draws each. Reads no attribute
        group     the running moments of the sample's own group; of the mixture, where it is unknown or was never seen
        none      features as they are
    Before the first step with it mean and variance are 0 and 1: features stay as they are. Under gradient accumulation
    each micro-batch is a batch of its own. No parameters: the classifier that follows has scale and shift.
    """

    @dataclass
    class Settings(Delayed):
        """epsilon: of eq. 7. minimum: members up to which groups are filled up; 0 or 1: the paper's raw moments.

        momentum: the part of old members that each batch forgets, in (0, 1]. detach: moments are constants to the
        gradient, which saves the all-reduce in backward. inference: mixture | group | none.
        """

        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        epsilon: float = 1e-5
        minimum: int = 8
        momentum: float = MOMENTUM
        detach: bool = False
        inference: str = field(default="mixture", metadata={"inference": True})

        def __post_init__(self):
            super().__post_init__()
            place = "subgroup_norm: "
            if not 0 < self.epsilon < float("inf"):
                raise DistFairError(f"{place}epsilon={self.epsilon}: a positive number")
            if self.minimum < 0:
                raise DistFairError(f"{place}minimum={self.minimum}: a number of members, or 0 for raw moments")
            if not 0 < self.momentum <= 1:
                raise DistFairError(f"{place}momentum={self.momentum}: above 0 and at most 1")
            if self.inference not in INFERENCES:
                raise DistFairError(f"{place}inference={self.inference}: one of {', '.join(INFERENCES)}")
            if self.inference == "none" and self.momentum != MOMENTUM:
                raise DistFairError(f"{place}momentum={self.momentum}: without effect under inference=none, which "
                                    "uses no running moments; leave it out")  # fmt: skip

    settings: Settings
    track_running_stats = True  # as in torch's batch norms: False holds the running moments

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.groups = facts.groups(settings.attributes)
        drawn = facts.drawn(self.groups)[:, None]
        if not drawn.any():
            raise DistFairError(f"subgroup_norm: attributes={settings.attributes}: no training sample has a known "
                                "value of each; name other attributes")  # fmt: skip
        # In checkpoints, with the running moments: what a detector answers must not change with the training data.
        # fp64: an fp32 mean near 1e4 is off by 5e-4.
        self.register_buffer("frequencies", torch.from_numpy(drawn / drawn.sum()))
        self.register_buffer("running_count", torch.zeros(len(self.groups), 1, dtype=torch.float64))
        self.register_buffer("running_mean", torch.zeros(len(self.groups), features, dtype=torch.float64))
        self.register_buffer("running_variance", torch.ones(len(self.groups), features, dtype=torch.float64))

    def transform(self, features: torch.Tensor, batch: Batch, comm: Communicator) -> torch.Tensor:
        """Normalised features, in their own type or fp32. Collectives in training only, the same on every rank."""
        if not self.training and self.settings.inference == "none":
            return features
        with torch.autocast(features.device.type, enabled=False):
            h = features.double()
            members, table = self._of_batch(h, batch, comm) if self.training else self._of_run(h, batch)
            scale = (table.variance + self.settings.epsilon).rsqrt()
            normalised = (h - members @ table.mean) * (members @ scale)
        return normalised.to(torch.promote_types(features.dtype, torch.float32))

    @classmethod
    def at_inference(cls, settings: Settings, tensors: Mapping[str, torch.Tensor]) -> Standardisation | None:
        if settings.inference == "none":
            return None
        if settings.inference == "group":
            raise DistFairError("interventions.subgroup_norm.inference=group: in use nobody knows a face's group: "
                                "interventions.subgroup_norm.inference=mixture, or none")  # fmt: skip
        whole = mixture(tensors["frequencies"], tensors["running_count"], _running(tensors))
        return Standardisation(whole.mean[0], (whole.variance[0] + settings.epsilon).rsqrt())

    def mixture(self) -> Moments:
        """Running moments (1, d) over the groups seen so far, by how often the plan draws them."""
        return mixture(self.frequencies, self.running_count, _running(self._buffers))

    def _members(self, h: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(B, G + 1) ones and zeros; the last column is that of unknown groups.

        Products with it sum over groups and look groups up: deterministic on GPUs, unlike index_add.
        """
        codes = self.groups.codes(batch.attributes)
        columns = torch.where(codes < 0, len(self.groups), codes)
        return (columns[:, None] == torch.arange(len(self.groups) + 1, device=h.device)).to(h)

    def _of_batch(self, h: torch.Tensor, batch: Batch, comm: Communicator) -> tuple[torch.Tensor, Moments]:
        """Who belongs where (B, G + 1), and what normalises there in training; moves the running moments."""
        members, shift = self._members(h, batch), self.mixture().mean
        x = h - shift
        local = torch.cat([members.sum(0)[:, None], members.T @ x, members.T @ (x * x)], dim=1)
        add = comm.sum if self.settings.detach else comm.shared_sum
        sums = add(local, "subgroup_norm")
        counts, groups = _from_sums(sums, shift)
        _, whole = _from_sums(sums.sum(0, keepdim=True), shift)
        if self.track_running_stats:
            self._track(counts[:-1], Moments(groups.mean[:-1], groups.variance[:-1]))
        part = counts / counts.clamp_min(max(self.settings.minimum, 1))
        part[-1] = 0  # of unknown group: the whole batch
        return members, groups.joined(whole, part)

    @torch.no_grad()
    def _track(self, counts: torch.Tensor, groups: Moments) -> None:
        """Adds a batch's members, counts (G, 1), to the running moments. Groups without any keep what they have."""
        old = (1 - self.settings.momentum) * self.running_count
        part = counts / (old + counts).clamp_min(torch.finfo(old.dtype).tiny)
        joined = groups.joined(Moments(self.running_mean, self.running_variance), part)
        self.running_mean.copy_(joined.mean)
        self.running_variance.copy_(joined.variance)
        self.running_count.copy_(torch.where(counts > 0, old + counts, self.running_count))

    def _of_run(self, h: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Moments]:
        """The same in evaluation; for the mixture all rows belong to one population."""
        mixture = self.mixture()
        if self.settings.inference == "mixture":
            return torch.ones_like(h[:, :1]), mixture
        seen = self.running_count > 0
        mean = torch.where(seen, self.running_mean, mixture.mean)
        variance = torch.where(seen, self.running_variance, mixture.variance)
        table = Moments(torch.cat([mean, mixture.mean]), torch.cat([variance, mixture.variance]))
        return self._members(h, batch), table


def mixture(frequencies: torch.Tensor, counts: torch.Tensor, groups: Moments) -> Moments:
    """Moments (1, d) of the groups that have a count (G, 1), mixed by their frequencies (G, 1)."""
    parts = frequencies * (counts > 0)
    # Before the first step all groups count: each has mean 0 and variance 1.
    parts = torch.where(parts.any(), parts, frequencies)
    parts = parts / parts.sum()
    mean = (parts * groups.mean).sum(0, keepdim=True)
    spread = groups.variance + (groups.mean - mean) ** 2
    return Moments(mean, (parts * spread).sum(0, keepdim=True))


def _running(tensors: Mapping[str, torch.Tensor]) -> Moments:
    return Moments(tensors["running_mean"], tensors["running_variance"])


def _from_sums(sums: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, Moments]:
    """Counts (k, 1), and moments (k, d), from sums of 1, h - shift and (h - shift)^2, (k, 2d + 1)."""
    width = shift.shape[1]
    counts, first, second = sums.split([1, width, width], dim=1)
    counts = counts.detach()
    divisor = counts.clamp_min(1)
    mean = first / divisor
    return counts, Moments(mean + shift, (second / divisor - mean**2).clamp_min(0))
