"""Distribution alignment (GDA): the predictions of every group follow those of all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_fair.data.batch import Batch
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Gather, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.density import grid, histogram, kernels, silverman
from dist_fair.interventions.transport import entropic_transport

SUPPORTS, AVERAGES = ("grid", "samples"), ("present", "groups")


@register("distribution_alignment")
class DistributionAlignment(Intervention):
    """Global Distribution Alignment of "Decoupling Bias, Aligning Distributions" (CVPR 2026).

        L_fair = mean over a of  OT_eps(q_r^a, R) + OT_eps(q_f^a, G)

    q_c^a is the distribution of p = softmax(logits)[1] over the samples of group a and class c, R and G those over all
    samples of the class, groups unknown included. The paper prints the second term with q_r^a: that would pull real
    predictions to the fake ones, against the cross-entropy, and is a misprint. See `transport` for OT_eps.

    support: grid     kernel densities on a grid. The kernel sums add over ranks: 2 (G + 1)(m + 1) floats on the wire.
             samples  the empirical distributions; gathers 3 floats per sample. n x n costs per group and class.
    From the predictions on everything is fp64: at epsilon 5e-4 the fp32 gradient was off by up to 6e-4, by rounding.
    A (group, class) without samples is left out; without any the loss is 0 and so are its gradients.
    Term: distribution_alignment.
    """

    terms = ("distribution_alignment",)

    @dataclass
    class Settings(Weighted):
        """weight: the paper's lambda. epsilon: of the transport, at most 1 and at least 1e-4. grid: number of bins.

        bandwidth: of the kernels, in units of p, or "silverman" (0.9 min(sd, IQR/1.34) n^(-1/5), per group and class,
        from gathered predictions). debias: OT(q, R) - OT(q, q) / 2 - OT(R, R) / 2 instead of OT(q, R).
        average: present (over all (group, class) with samples), or groups (the paper's 1/|A| sum over both classes).
        """

        weight: float = 0.005
        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        epsilon: float = 5e-4
        grid: int = 128
        bandwidth: Any = 0.05
        support: str = "grid"
        debias: bool = False
        average: str = "present"

        def __post_init__(self):
            super().__post_init__()
            place = "distribution_alignment: "
            if not 1e-4 <= self.epsilon <= 1:
                raise DistFairError(f"{place}epsilon={self.epsilon}: between 1e-4 and 1")
            if not 2 <= self.grid <= 4096:
                raise DistFairError(f"{place}grid={self.grid}: between 2 and 4096 bins")
            if self.support not in SUPPORTS:
                raise DistFairError(f"{place}support={self.support}: one of {', '.join(SUPPORTS)}")
            if self.average not in AVERAGES:
                raise DistFairError(f"{place}average={self.average}: one of {', '.join(AVERAGES)}")
            number = isinstance(self.bandwidth, int | float) and not isinstance(self.bandwidth, bool)
            if self.bandwidth != "silverman" and not (number and 0 < self.bandwidth <= 1):
                raise DistFairError(f"{place}bandwidth={self.bandwidth}: a number in (0, 1], or silverman")

    settings: Settings

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.groups = facts.groups(settings.attributes)
        self.gathers = settings.support == "samples" or settings.bandwidth == "silverman"

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Either the rows (p, label, group), (B, 3), or kernel sums (G + 1, 2, m) and counts (G + 1, 2).

        The last row of the sums is that of samples whose group is unknown.
        """
        logits = outputs.logits.double()
        p = torch.sigmoid(logits[:, 1] - logits[:, 0])
        codes = self.groups.codes(batch.attributes)
        if self.gathers:
            return {"predictions": Gather(torch.stack([p, batch.labels.to(p), codes.to(p)], dim=1))}
        with torch.autocast(p.device.type, enabled=False):
            rows = torch.where(codes < 0, len(self.groups), codes) * 2 + batch.labels
            shape = (2 * (len(self.groups) + 1), self.settings.grid)
            sums = kernels(p, grid(self.settings.grid, p), self.settings.bandwidth)
            sums = sums.new_zeros(shape).index_add(0, rows, sums)
            counts = torch.bincount(rows, minlength=shape[0]).to(p)
        return {"sums": Sum(sums.view(-1, 2, shape[1])), "counts": Sum(counts.view(-1, 2))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        any_part = next(iter(summary.values()))
        with torch.autocast(any_part.device.type, enabled=False):
            if "sums" in summary:
                points, q, classes, which = self._from_sums(summary["sums"], summary["counts"])
            else:
                points, q, classes, which = self._from_predictions(summary["predictions"])
            if not len(q):
                return {"distribution_alignment": 0.0 * sum(part.sum() for part in summary.values())}
            costs = self._costs(points, q, classes, which)
        terms = len(q) if self.settings.average == "present" else len(self.groups)
        return {"distribution_alignment": costs.sum() / terms}

    def _costs(self, points: torch.Tensor, q: torch.Tensor, classes: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """OT of each q (k, n) with its class's distribution, (k,). classes: (2, n). which: (k,), 0 real, 1 fake."""
        epsilon = self.settings.epsilon
        if not self.settings.debias:
            return entropic_transport(points, q, classes[which], epsilon)
        seen, which = which.unique(return_inverse=True)  # a class without samples has no distribution
        classes = classes[seen]
        left, right = torch.cat([q, q, classes]), torch.cat([classes[which], q, classes])
        costs, own, total = entropic_transport(points, left, right, epsilon).split([len(q), len(q), len(seen)])
        return costs - own / 2 - total[which] / 2

    def _from_sums(self, sums: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        group, which = (counts[:-1] > 0).nonzero(as_tuple=True)
        return grid(self.settings.grid, sums), histogram(sums[group, which]), histogram(sums.sum(0)), which

    def _from_predictions(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same from predictions, which the transport wants in ascending order."""
        rows = rows[rows[:, 0].detach().argsort(stable=True)]
        p, label, code = rows[:, 0], rows[:, 1].detach().long(), rows[:, 2].detach().long()
        of_class = label == torch.arange(2, device=p.device)[:, None]
        of_group = code == torch.arange(len(self.groups), device=p.device)[:, None]
        members = of_group[:, None] & of_class
        group, which = members.any(2).nonzero(as_tuple=True)
        members = torch.cat([members[group, which], of_class])
        if self.settings.support == "samples":
            points, distributions = p, members / members.sum(1, keepdim=True).clamp_min(1).to(p)
        else:
            points = grid(self.settings.grid, p)
            distributions = torch.stack([histogram(self._sum(p[one], points)) for one in members])
        return points, distributions[:-2], distributions[-2:], which

    def _sum(self, p: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Kernel sums (m,) of one set of predictions with a bandwidth of its own."""
        if not len(p):
            return torch.zeros_like(points)
        return kernels(p, points, silverman(p, self.settings.grid)).sum(0)
