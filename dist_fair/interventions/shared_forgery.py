"""Shared forgery (PG-FDD): one branch learns what all manipulations have in common, by telling real from fake."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.detectors.base import Outputs
from dist_fair.interventions.base import Facts, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.heads import loss_mean, loss_sums

LOGITS = "shared_logits"


@register("shared_forgery")
class SharedForgery(Intervention):
    """L_sha of "Preserving Fairness Generalization in Deepfake Detection" (CVPR 2024, PG-FDD).

    Mean cross-entropy of `shared_logits` (B, 2) of the detector's extras with the labels, over the global batch. Sample
    weights are for the classifier and do not enter. Term: shared_forgery.
    """

    terms = ("shared_forgery",)
    couples = False

    @dataclass
    class Settings(Weighted):
        """weight: 1 in the paper's code."""

    settings: Settings

    @classmethod
    def needs(cls, settings: Settings, index: Index) -> dict[str, int]:
        return {LOGITS: 2}

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.register_buffer("classes", torch.eye(2), persistent=False)

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """See `loss_sums`, (2,)."""
        return {"losses": Sum(loss_sums(outputs.extras[LOGITS], self.classes[batch.labels]))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"shared_forgery": loss_mean(summary["losses"])}
