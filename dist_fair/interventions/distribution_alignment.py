"""Distribution alignment (GDA): the predictions of every group follow those of all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dist_fair.data.batch import Batch
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Gather, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.density import FLOOR, grid, kernels, mirrored, silverman
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
    A (group, class) without samples has the weight 0; without any the loss is 0 and so are its gradients. Who has some
    is for the device to know: shapes do not depend on it, and the host never waits.
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
        number = len(self.groups) + 1
        summing = torch.eye(number, dtype=torch.float64)
        summing[-1] = 1
        # Made anew from the data by whoever builds the recipe: not a part of checkpoints.
        constants = {
            "images": mirrored(grid(settings.grid, summing)),  # of the grid
            "table": torch.from_numpy(self._table(number)),
            "summing": summing,  # rows of groups and of unknown ones to rows of groups and of all
            "difference": torch.tensor([-1.0, 1.0], dtype=torch.float64),
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

    def _table(self, number: int) -> np.ndarray:
        """By attributes and label of a sample: its label and group, (2,); or in which sum it is, (2 G + 2,)."""
        if not self.gathers:
            return self.groups.table(np.eye(2 * number).reshape(number, 2, 2 * number))
        codes = np.append(np.arange(number - 1.0), -1)
        return self.groups.table(np.stack(np.broadcast_arrays([0.0, 1.0], codes[:, None]), axis=-1))

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Either the rows (p, label, group), (B, 3), or kernel sums (G + 1, 2, m) and counts (G + 1, 2).

        The last row of the sums is that of samples whose group is unknown.
        """
        with torch.autocast(outputs.logits.device.type, enabled=False):
            p = torch.sigmoid(outputs.logits.double() @ self.difference)
            rows = self.table[(*self.groups.columns(batch.attributes), batch.labels)]
            if self.gathers:
                return {"predictions": Gather(torch.cat([p[:, None], rows], dim=1))}
            sums = rows.mT @ kernels(p, self.images, self.settings.bandwidth)
            return {"sums": Sum(sums.view(-1, 2, self.settings.grid)), "counts": Sum(rows.sum(0).view(-1, 2))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        settings = self.settings
        with torch.autocast(self.images.device.type, enabled=False):
            if self.gathers:
                points, q, classes, counts = self._from_predictions(summary["predictions"])
            else:
                points, q, classes, counts = self._from_sums(summary["sums"], summary["counts"])
            present = counts.clamp_max(1)
            weights = present / (present.sum().clamp_min(1) if settings.average == "present" else len(self.groups))
            if settings.debias:
                q, classes = torch.cat([q, q, classes]), torch.cat([classes.expand_as(q), q, classes])
                weights = torch.cat([weights, -weights / 2, -weights.sum(0, keepdim=True) / 2])
            floor = FLOOR if settings.support == "grid" else 0.0
            costs = entropic_transport(points, q, classes, settings.epsilon, weights, floor)
        return {"distribution_alignment": costs.sum()}

    def _from_sums(self, sums: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Points (n,), densities of each group (G, 2, n) and of each class (1, 2, n), counts (G, 2)."""
        q, classes = (self.summing @ sums.flatten(1)).view_as(sums).split([len(self.groups), 1])
        return self.images[0], q, classes, counts[:-1]

    def _from_predictions(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same from predictions, which the transport wants in ascending order."""
        rows = rows[rows[:, 0].detach().argsort(stable=True)]
        p, label, code = rows[:, 0], rows[:, 1].detach().long(), rows[:, 2].detach().long()
        of_class = label == torch.arange(2, device=p.device)[:, None]
        of_group = code == torch.arange(len(self.groups), device=p.device)[:, None]
        members = torch.cat([(of_group[:, None] & of_class).flatten(0, 1), of_class])
        if self.settings.support == "samples":
            points, sums = p, members.to(p)
        else:
            places = torch.stack([code.clamp_min(0) * 2 + label, 2 * len(self.groups) + label])
            points, sums = self.images[0], self._sums(p, members, places)
        q, classes = sums.view(-1, 2, len(points)).split([len(self.groups), 1])
        return points, q, classes, members[:-2].sum(1).view(-1, 2).to(p)

    def _sums(self, p: torch.Tensor, members: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Kernel sums (k, m) of sets of predictions, members (k, B) bool, each set with a bandwidth of its own.

        places: (2, B), in which of the first k - 2 sets a prediction is, if in any, and in which of the last two.
        """
        bandwidth = silverman(p, members, self.settings.grid)[places]
        both = kernels(p.expand(2, -1).flatten(), self.images, bandwidth.view(-1, 1, 1)).view(2, len(p), -1)
        inside = members.to(p)
        return torch.cat([inside[:-2] @ both[0], inside[-2:] @ both[1]])
