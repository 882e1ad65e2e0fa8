"""Specific forgery (PG-FDD): one branch learns what sets a manipulation apart, by telling how a fake was made."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.detectors.base import Outputs
from dist_fair.interventions.base import Facts, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.heads import forgery_classes, loss_mean, loss_sums

LOGITS = "specific_logits"


@register("specific_forgery")
class SpecificForgery(Intervention):
    """L_spe of "Preserving Fairness Generalization in Deepfake Detection" (CVPR 2024, PG-FDD).

    Mean cross-entropy of `specific_logits` (B, 1 + M) of the detector's extras with how the sample was made: class 0
    real, 1 + m a fake of manipulation m. A fake of unknown manipulation is left out; the mean is over the others of the
    global batch, and without any the loss is 0 and so are its gradients. Sample weights are for the classifier and do
    not enter. Raises DistFairError if the training data name no manipulation. Term: specific_forgery.

    couples: only where training draws fakes of unknown manipulation, which leave parts of a batch unequal.
    """

    terms = ("specific_forgery",)

    @dataclass
    class Settings(Weighted):
        """weight: 0.1 in the paper's code."""

        weight: float = 0.1

    settings: Settings

    @classmethod
    def needs(cls, settings: Settings, index: Index) -> dict[str, int]:
        return {LOGITS: forgery_classes(index, "interventions.specific_forgery=null")}

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        unknown = (facts.index.labels == 1) & (facts.index.manipulations.codes < 0)
        self.couples = bool(facts.frequencies[unknown].any())
        number = len(facts.index.manipulations.values)
        classes = torch.zeros(2, number + 1, 1 + number)  # by label and manipulation, of which the last is unknown
        classes[0, :, 0], classes[1, :-1, 1:] = 1, torch.eye(number)
        self.register_buffer("classes", classes, persistent=False)

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """See `loss_sums`, (2,); of samples that are real or of known manipulation."""
        return {"losses": Sum(loss_sums(outputs.extras[LOGITS], self.classes[batch.labels, batch.manipulations]))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"specific_forgery": loss_mean(summary["losses"])}
