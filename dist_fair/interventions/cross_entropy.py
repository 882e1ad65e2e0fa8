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

        mean             sum_i w_i l_i / sum_i w_i
        class_balanced   sum over c of  sum_{y_i = c} w_i l_i / sum_{y_i = c} w_i

    The second is L_cls = C(h(z_r), y_r) + C(h(z_f), y_f) of SFD + GDA (CVPR 2026): the mean over the reals *plus* the
    mean over the fakes. A class that the global batch lacks contributes 0. Term: cross_entropy.
    """

    terms = ("cross_entropy",)

    @dataclass
    class Settings(Weighted):
        """reduction: mean | class_balanced."""

        reduction: str = "mean"

        def __post_init__(self):
            super().__post_init__()
            if self.reduction not in REDUCTIONS:
                raise DistFairError(f"cross_entropy: reduction={self.reduction}: one of {', '.join(REDUCTIONS)}")

    settings: Settings

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Per class, (2, 2): sums of w l and of w."""
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        losses = functional.cross_entropy(logits, batch.labels, reduction="none")
        weights = weights.to(losses)
        terms = torch.stack([weights * losses, weights], dim=1)
        return {"classes": Sum(terms.new_zeros(2, 2).index_add(0, batch.labels, terms))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        classes = summary["classes"]
        if self.settings.reduction == "mean":
            classes = classes.sum(0, keepdim=True)
        losses, weights = classes.unbind(1)
        present = weights > 0
        means = torch.where(present, losses / torch.where(present, weights, 1), 0 * losses)
        return {"cross_entropy": means.sum()}
