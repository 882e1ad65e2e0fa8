"""Contrastive loss (PG-FDD): forgery features lie closer to those of their own kind than to the other half's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from dist_fair import keyed
from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Gather, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.heads import forgery_classes, forgery_labels, lifted
from dist_fair.interventions.triplets import triplets
from dist_fair.keyed_rows import mixed, uniform

SCOPES = ("global", "local")
SHARED, SPECIFIC = "shared", "specific"


@register("contrastive_loss")
class ContrastiveLoss(Intervention):
    """L_con of "Preserving Fairness Generalization in Deepfake Detection" (CVPR 2024, PG-FDD).

        sum over spaces and halves of  mean over anchors a of  [d(a, p_a) - d(a, n_a) + margin]_+

    Spaces are the pooled features `shared` and `specific`, (B, d) each, of the detector's extras; halves are the reals
    and the fakes; d(x, y) = ||x - y + 1e-6||. The positive p_a is another sample of a's half, in the specific space of
    its class (real, or one manipulation); the negative n_a is one of the other half. See `triplets` for which. A fake
    of unknown manipulation is a negative only in the specific space. An anchor that has no positive is left out of the
    mean; a half that has no anchor, or no other half, gives 0 and has gradient 0.

    Draws are of (seed, epoch, sample): other triplets in the next epoch, whatever ranks, restarts and passes of SAM.

    scope: global   over the global batch. 2 d + 8 floats a sample on the wire; the rest is repeated on each rank.
           local    over each rank's rows; losses and anchors are then added up. It depends on the number of ranks.
    self_pairs: positives by a random permutation of the class. On average one anchor of a class is its own positive
    then, and a lone member always is. With scope=local that is what the released code computes under DDP.

    From the features on everything is fp64. Sample weights are for the classifier and do not enter. Raises
    DistFairError if specific is true and the training data name no manipulation. Term: contrastive.
    """

    terms = ("contrastive",)

    @dataclass
    class Settings(Weighted):
        """weight, margin: of the paper's code. specific: the terms of the specific space. The others: see above."""

        weight: float = 0.05
        margin: float = 3.0
        specific: bool = True
        scope: str = "global"
        self_pairs: bool = False

        def __post_init__(self):
            super().__post_init__()
            if not self.margin > 0:
                raise DistFairError(f"contrastive_loss: margin={self.margin}: above 0")
            if self.scope not in SCOPES:
                raise DistFairError(f"contrastive_loss: scope={self.scope}: one of {', '.join(SCOPES)}")

    settings: Settings

    @classmethod
    def needs(cls, settings: Settings, index: Index) -> dict[str, int]:
        if not settings.specific:
            return {SHARED: 0}
        forgery_classes(index, "interventions.contrastive_loss.specific=false")
        return {SHARED: 0, SPECIFIC: 0}

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.classes = max(2, 1 + len(facts.index.manipulations.values))
        salts = [[keyed.integer("contrastive_loss", space)] for space in self.reads]
        # Made anew by whoever builds the recipe: not a part of checkpoints.
        self.register_buffer("salts", torch.tensor(salts), persistent=False)
        self.register_buffer("halves", torch.eye(2), persistent=False)

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Per space, rows (B, 4 + d): label, class, two draws (fp32, exact on the wire), features; or their sums."""
        codes = {SHARED: batch.labels, SPECIFIC: forgery_labels(batch)}
        numbers = torch.stack([code for space in self.reads for code in (batch.labels, codes[space])], dim=1)
        draws = uniform(mixed(batch.keys, self.salts).flatten(), 2).view(len(self.reads), -1, 2)
        rows = []
        for space, own, drawn in zip(self.reads, numbers.float().split(2, dim=1), draws, strict=True):
            features = lifted(outputs.extras[space])
            rows.append(torch.cat([own.to(features), drawn.to(features), features], dim=1))
        if self.settings.scope == "global":
            return {space: Gather(part) for space, part in zip(self.reads, rows, strict=True)}
        return {space: Sum(part) for space, part in zip(self.reads, self._sums(rows), strict=True)}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = [summary[space] for space in self.reads]
        sums = self._sums(parts) if self.settings.scope == "global" else torch.stack(parts)
        losses, anchors = sums.unbind(-1)
        return {"contrastive": (losses / anchors.detach().clamp_min(1)).sum()}

    def _sums(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Per space sums of the losses and numbers of anchors, of reals and of fakes, (S, 2, 2) fp64."""
        numbers = torch.stack([part[:, :4].detach() for part in rows])
        labels, codes = numbers[..., :2].long().unbind(-1)
        *others, there = triplets(labels, codes, numbers[..., 2:], self.classes, self.settings.self_pairs)
        losses = [self._losses(part[:, 4:].double(), chosen)
                  for part, chosen in zip(rows, torch.stack(others, dim=1), strict=True)]  # fmt: skip
        anchors = self.halves[labels].double() * there[..., None]
        return torch.stack([torch.stack(losses)[..., None] * anchors, anchors], dim=-1).sum(1)

    def _losses(self, features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """(n,), of features (n, d) with these rows for positives and negatives, (2, n)."""
        near, far = functional.pairwise_distance(features, features[others])
        return (near - far + self.settings.margin).clamp_min(0)
