"""Cross-entropy over the global batch: what every recipe trains with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_fair.data.batch import Batch
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.heads import lifted

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

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.register_buffer("classes", torch.eye(2), persistent=False)
        self.register_buffer("signs", torch.tensor([-1.0, 0.0, 0.0]), persistent=False)  # with which sums are losses

    @property
    def couples(self) -> bool:
        return self.settings.reduction != "mean"

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Per class, (2, 3): sums of -w l, of w and of 1."""
        logits, own = lifted(outputs.logits), self.classes[batch.labels]
        weighted = own * weights.to(logits)[:, None]
        columns = torch.stack([weighted * logits.log_softmax(1), weighted, own], dim=2)
        return {"classes": Sum(columns.sum(0))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sums = summary["classes"]
        counts = sums[:, 2:].detach()
        means = sums / (counts.sum() if self.settings.reduction == "mean" else counts).clamp_min(1)
        masses = means[:, 1].detach()
        whole = masses.sum()
        # sum over c of -m_c log(m_c / m): a constant prediction can do no better.
        chance = torch.xlogy(whole, whole) - torch.xlogy(masses, masses).sum()
        return {"cross_entropy": (means * self.signs).sum(), "cross_entropy_at_chance": chance}
