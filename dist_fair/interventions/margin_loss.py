"""Margin loss (PG-FDD): a head tells demographics apart, with wider margins for rarer groups."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Intervention, Sum, Summary, Weighted, groups_of, register
from dist_fair.interventions.heads import lifted, loss_mean, loss_sums

LOGITS = "demographic_logits"


@register("margin_loss")
class MarginLoss(Intervention):
    """L_fair of "Preserving Fairness Generalization in Deepfake Detection" (CVPR 2024, PG-FDD), which is the
    label-distribution-aware margin loss (LDAM, Cao et al., NeurIPS 2019) of the demographic groups.

        mean over i of  -log softmax(s (z_i - m))_g,   g = g_i,   m_g = max_margin n_g^(-1/4) / max_q n_q^(-1/4),

    and m = 0 for all other groups. z is `demographic_logits` (B, G) of the detector's extras, n_g how often the plan
    draws group g: known before the first step, the same for every batch and rank. Samples of unknown group are left
    out; the mean is over the others of the global batch, and without any the loss is 0 and so are its gradients.
    Sample weights are for the classifier and do not enter: the margins are this loss's answer to rare groups.
    Term: margin_loss.
    """

    terms = ("margin_loss",)

    @dataclass
    class Settings(Weighted):
        """weight: the paper's 0.1. scale: s. max_margin: of the rarest group; both are of the released code."""

        weight: float = 0.1
        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        scale: float = 30.0
        max_margin: float = 0.5

        def __post_init__(self):
            super().__post_init__()
            if not self.scale > 0:
                raise DistFairError(f"margin_loss: scale={self.scale}: above 0")
            if not self.max_margin >= 0:
                raise DistFairError(f"margin_loss: max_margin={self.max_margin}: must not be negative")

    settings: Settings

    @classmethod
    def needs(cls, settings: Settings, index: Index) -> dict[str, int]:
        return {LOGITS: len(groups_of(settings.attributes, index))}

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.groups = facts.groups(settings.attributes)
        drawn = facts.drawn(self.groups)
        if (drawn > 0).sum() < 2:
            raise DistFairError(f"margin_loss: attributes={list(settings.attributes)}: training draws samples of "
                                f"{(drawn > 0).sum()} group, there is nothing to tell apart; name other "
                                "attributes")  # fmt: skip
        # Made anew from the plan by whoever builds the recipe: not a part of checkpoints.
        self.register_buffer("margins", torch.from_numpy(margins(drawn, settings.max_margin)), persistent=False)
        members = self.groups.table(np.eye(len(drawn) + 1, len(drawn)))
        self.register_buffer("members", torch.from_numpy(members).float(), persistent=False)

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """See `loss_sums`, (2,); of samples of known group."""
        logits, own = lifted(outputs.extras[LOGITS]), self.members[self.groups.columns(batch.attributes)]
        scaled = self.settings.scale * (logits - own * self.margins.to(logits))
        return {"losses": Sum(loss_sums(scaled, own))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"margin_loss": loss_mean(summary["losses"])}


def margins(drawn: np.ndarray, max_margin: float) -> np.ndarray:
    """m_g of groups that are drawn so often, (G,); any unit. 0 for one that never is: no sample has it."""
    roots = np.power(drawn, -0.25, out=np.zeros(len(drawn)), where=drawn > 0)
    return max_margin * roots / roots.max()
