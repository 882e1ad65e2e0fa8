"""Features normalised within demographic groups, whose moments are those of the global batch (DAID).

Who holds what: rank r has its rows of h (B_r, d) and their groups; a group may lie on any ranks, in any numbers. Sums
add over ranks, so one exchange gives every rank the moments of every group, and of the whole batch:

    local      per group, and for the samples of unknown group     n_g, sum h, sum h^2
    wire       one all-reduce, fp64                                (G + 1)(2d + 1) numbers, whatever B and W are
    local      h^_i = (h_i - mu_g) / sqrt(sigma2_g + eps)          own rows only
    backward   through mu_g and sigma2_g                           one all-reduce of as many numbers

The sum is a `shared` one (see dist_fair.collectives): what follows it differs per rank. A rank knows only how its own
rows depend on the moments, so those gradients are summed over ranks. They carry W already, by the one gradient rule:
a factor here would be a second one, and a `replicated` sum, which multiplies a rank's own part by W, would be wrong
wherever ranks hold different rows. A rank without any row, or any member of a group, adds zeros and calls too.

Between features and result everything is fp64. sigma2 is then off by 1e-16 mu^2 / sigma2, relative: 1e-8 at mean 1e4
and variance 1, where fp32 sums keep no digit. That is less than what rounding the features to fp32 does to it, up to
mu / sigma = 6e8.

A step of these sizes costs a GPU the launches of its kernels, and hardly more. Products and closed forms, forward and
backward, make it 48 of them, with the wire and the running moments; the formulas as printed, by autograd, were 155.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

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
        size = len(self.groups) + 1  # the last is of unknown group
        floor = torch.full((size, 1), float(max(settings.minimum, 1)), dtype=torch.float64)
        floor[-1] = 2.0**100  # members that no group has: what makes these moments is the batch, to the last bit
        self.register_buffer("floor", floor, persistent=False)
        self.register_buffer("identity", torch.eye(size, dtype=torch.float64), persistent=False)
        self.register_buffer("members", torch.from_numpy(self.groups.table(np.eye(size))), persistent=False)
        # In checkpoints, with the running moments: what a detector answers must not change with the training data.
        # fp64: an fp32 mean near 1e4 is off by 5e-4.
        self.register_buffer("frequencies", torch.from_numpy(drawn / drawn.sum()))
        self.register_buffer("running_count", torch.zeros(len(self.groups), 1, dtype=torch.float64))
        self.register_buffer("running_mean", torch.zeros(len(self.groups), features, dtype=torch.float64))
        self.register_buffer("running_variance", torch.ones(len(self.groups), features, dtype=torch.float64))

    def transform(self, features: torch.Tensor, batch: Batch, comm: Communicator) -> torch.Tensor:
        """Normalised features, in their own type or fp32. Collectives in training only, the same on every rank."""
        with torch.autocast(features.device.type, enabled=False):
            return self._by_batch(features, batch, comm) if self.training else self._by_run(features, batch)

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

    def _members(self, batch: Batch) -> torch.Tensor:
        """(B, G + 1) ones and zeros; the last column is that of unknown groups.

        Products with it sum over groups and look groups up: deterministic on GPUs, unlike index_add.
        """
        return self.members[self.groups.columns(batch.attributes)]

    def _by_batch(self, features: torch.Tensor, batch: Batch, comm: Communicator) -> torch.Tensor:
        """As in training; moves the running moments."""
        h, members = features.double(), self._members(batch)
        add = comm.sum if self.settings.detach else comm.shared_sum
        sums = add(MomentSums.apply(h, members), "subgroup_norm")
        if self.track_running_stats:
            self._track(sums.detach()[:-1])
        normalised = Normalised.apply(h, members, sums, self.identity, self.floor, self.settings.epsilon)
        return normalised.to(_result(features))

    @torch.no_grad()
    def _track(self, sums: torch.Tensor) -> None:
        """Adds a batch's members, by their sums (G, 2d + 1), to the running moments.

        With n new members in a population that is now N: mu' = mu + sum (h - mu) / N and sigma2' = sigma2 +
        [sum (h - mu)(h - mu') - n sigma2] / N. Groups without any keep what they have: nothing is added.
        """
        count, mean, variance = self.running_count, self.running_mean, self.running_variance
        new, first, second = _split(sums)
        count.addcmul_(new.clamp_max(1), count, value=-self.settings.momentum).add_(new)
        number = count.clamp_min(torch.finfo(count.dtype).tiny)
        shifted = torch.addcmul(first, new, mean, value=-1)
        spread = torch.addcmul(second, mean, first, value=-1)
        mean.addcdiv_(shifted, number)
        spread.addcmul_(mean, shifted, value=-1).addcmul_(new, variance, value=-1)
        variance.addcdiv_(spread, number).clamp_min_(0)

    def _by_run(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As in evaluation. By the mixture, it is the same for all rows."""
        if self.settings.inference == "none":
            return features
        mixture = self.mixture()
        mean, variance = mixture
        if self.settings.inference == "group":
            seen, members = self.running_count > 0, self._members(batch)
            mean = members @ torch.cat([torch.where(seen, self.running_mean, mean), mean])
            variance = members @ torch.cat([torch.where(seen, self.running_variance, variance), variance])
        normalised = (features.double() - mean) * (variance + self.settings.epsilon).rsqrt()
        return normalised.to(_result(features))


class MomentSums(torch.autograd.Function):
    """Features h (B, d) and members (B, k) -> per column of the members sums of 1, h and h^2, (k, 2d + 1)."""

    @staticmethod
    def forward(ctx, h: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h, members)
        return members.T @ torch.cat([h.new_ones(len(h), 1), h, h * h], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        """dh = dS_1 + 2 h dS_2, those of the row's own population."""
        h, members = ctx.saved_tensors
        _, first, second = _split(members @ gradient)
        return torch.addcmul(first, h, second, value=2), None


class Normalised(torch.autograd.Function):
    """h^ (B, d) = (h - mu_g) s_g, s = 1 / sqrt(sigma2 + eps), with the moments of populations that are filled up.

    sums: (k, 2d + 1), of `MomentSums` over all ranks; all of them together are the batch, N members. floor: (k, 1),
    what each population is filled up to. The moments about 0 of a population are linear in the sums,

        M_g = sum over q of A_gq S_q,      A_gq = (1[g = q] + f_g / N) / (n_g + f_g),      f_g = [floor_g - n_g]_+

    (f_g is how many members it is filled up with), and mu = M_1, sigma2 = M_2 - M_1^2. With P_g = sum of dh^ over g and
    Q_g = sum of dh^ h^, all that backward needs of the own rows:

        dM_1 = -s (P - s mu Q)      dM_2 = -s^2 Q / 2      dS = A^T dM      dh = s_g dh^
    """

    @staticmethod
    def forward(ctx, h, members, sums, identity, floor, epsilon: float) -> torch.Tensor:
        counts = sums[:, :1]
        filled = torch.maximum(counts, floor)
        parts = torch.addcdiv(identity, filled - counts, counts.sum()).div_(filled)
        moments = parts @ sums
        _, mean, scale = _split(moments)
        scale.addcmul_(mean, mean, value=-1).clamp_min_(0).add_(epsilon).rsqrt_()
        _, own_mean, own_scale = _split(members @ moments)
        normalised = (h - own_mean) * own_scale  # not in place: torch 2.11, compiled, then loses its gradient
        ctx.save_for_backward(members, parts, moments, own_scale, normalised)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        members, parts, moments, own_scale, normalised = ctx.saved_tensors
        own = gradient * own_scale
        if not ctx.needs_input_grad[2]:
            return own, None, None, None, None, None
        _, mean, scale = _split(moments)
        rows = [gradient.new_zeros(len(gradient), 1), gradient, gradient * normalised]
        slopes = members.T @ torch.cat(rows, dim=1)
        _, first, second = _split(slopes)
        first.addcmul_(mean, second.mul_(scale), value=-1)
        second.mul_(0.5)
        slopes[:, 1:].unflatten(1, (2, -1)).mul_(scale[:, None])
        return own, None, torch.addmm(slopes, parts.T, slopes, beta=0, alpha=-1), None, None, None


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns (., 2d + 1) -> that of counts (., 1), those of h and of h^2, (., d) each."""
    width = rows.shape[1] // 2
    return rows.split([1, width, width], dim=1)


def _result(features: torch.Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


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
