"""Cross-entropy over the global batch: what every recipe trains with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from dist_fair.data.batch import Batch
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Intervention, Sum, Summary, Weighted, register

REDUCTIONS = ("mean", "class_balanced")


@register("cross_entropy")
class CrossEntropy(Intervention):
    """Cross-entropy of logits (B, 2) with labels (B,), samples weighted by w.

        mean             sum_i w_i l_i / B                                     E[w l] of DAID, eq. 12
        class_balanced   sum over c of  sum_{y_i = c} w_i l_i / #{y_i = c}     L_cls of SFD + GDA (CVPR 2026)

    The second is the mean over the reals *plus* the mean over the fakes; a class that the global batch lacks
    contributes 0. Samples are counted, not their weights: dividing by the sum of a batch's weights would undo the
    weighting in batches of one group, and by the more the smaller they are. Term: cross_entropy.

    Measure: cross_entropy_at_chance, what the best constant prediction would have got on this batch. A loss that stays
    there has learned nothing.
    """

    terms = ("cross_entropy",)
    measures = ("cross_entropy_at_chance",)

    @dataclass
    class Settings(Weighted):
        """reduction: mean | class_balanced."""

        reduction: str = "mean"

        def __post_init__(self):
            super().__post_init__()
            if self.reduction not in REDUCTIONS:
                raise DistFairError(f"cross_entropy: reduction={self.reduction}: one of {', '.join(REDUCTIONS)}")

    settings: Settings

    @property
    def couples(self) -> bool:
        return self.settings.reduction != "mean"

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Per class, (2, 3): sums of w l, of w and of 1."""
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        losses = functional.cross_entropy(logits, batch.labels, reduction="none")
        weights = weights.to(losses)
        columns = torch.stack([weights * losses, weights, torch.ones_like(losses)], dim=1)
        return {"classes": Sum(columns.new_zeros(2, 3).index_add(0, batch.labels, columns))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        losses, weights, counts = summary["classes"].unbind(1)
        if self.settings.reduction == "mean":
            counts = counts.sum().expand(2)
        losses, masses = losses / counts.clamp_min(1), weights / counts.clamp_min(1)
        chance = -torch.xlogy(masses, masses / masses.sum().clamp_min(torch.finfo(masses.dtype).tiny)).sum()
        return {"cross_entropy": losses.sum(), "cross_entropy_at_chance": chance}
