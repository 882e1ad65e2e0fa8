"""Reconstruction loss (PG-FDD): an image is made again from its content and somebody's forgery."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.heads import lifted
from dist_fair.keyed_rows import mixed

MEASURES = tuple(f"reconstruction_{forgery}_{half}" for half in ("real", "fake") for forgery in ("self", "cross"))


@register("reconstruction_loss")
class ReconstructionLoss(Intervention):
    """L_rec of "Preserving Fairness Generalization in Deepfake Detection" (CVPR 2024, PG-FDD).

        sum over halves of  mean over i of  |x_i - G(f_i, c_i)| + |x_i - G(f_j, c_i)|,     j = partner(i)

    The halves are the reals and the fakes, |.| is the mean over pixels and colours, G the detector's `decode`, f the
    `code` (forgery) and c the `condition` (content and demographics) of its extras. The n-th real of a rank and its
    n-th fake are partners. Pairs of a lane stay together, so neither ranks nor micro-batches change them. Content
    decides what the image should be: the target is x_i also with the partner's forgery.

    Images are taken as the detector gets them. decode gives (-1, 1), which is their range for pixel mean 0.5 and
    standard deviation 0.5 (Xception's and the paper's).

    Dropout in decode is drawn anew for each of the two images, keyed by the row and whose forgery it is. Sample weights
    are for the classifier and do not enter. Raises DistFairError unless every rank has as many reals as fakes, lane by
    lane, and for images beyond the range of decode. Term: reconstruction. Measures: its four summands.
    """

    terms = ("reconstruction",)
    measures = MEASURES
    couples = False

    @dataclass
    class Settings(Weighted):
        """weight: 0.3 in the paper's code."""

        weight: float = 0.3

    settings: Settings

    @classmethod
    def needs(cls, settings: Settings, index: Index) -> dict[str, int]:
        return {"reconstruction": 0}

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        if not facts.paired:
            raise DistFairError("reconstruction_loss: pairs each real with a fake, but data.tapes do not give every "
                                "rank as many of both: set data.tapes={real: {label: 0, share: 1}, "
                                "fake: {label: 1, share: 1}}")  # fmt: skip
        lowest, highest = facts.pixels
        if lowest < -1.001 or highest > 1.001:
            raise DistFairError(
                f"reconstruction_loss: images from {lowest:.2f} to {highest:.2f}, which a decoder that ends in tanh "
                "cannot reach: set data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]"
            )
        # Made anew by whoever builds the recipe: not a part of checkpoints.
        self.register_buffer("halves", torch.eye(2), persistent=False)

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Per half, (2, 3): sums of the mean absolute errors with the own and the partner's forgery, and number."""
        code, condition = outputs.extras["code"], outputs.extras["condition"]
        others, errors = partners(batch.labels), []
        keys = mixed(batch.keys, torch.stack([batch.keys, batch.keys[others]]))
        for forgery, own in zip((code, _Swapped.apply(code, others)), keys, strict=True):
            images = lifted(outputs.decode(forgery, condition, own))
            errors.append((images - batch.images).abs().flatten(1).mean(1))
        columns = torch.stack([*errors, torch.ones_like(errors[0])], dim=1)
        return {"errors": Sum(self.halves[batch.labels].to(columns).T @ columns)}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        errors = summary["errors"]
        four = (errors[:, :2] / errors[:, 2:].detach().clamp_min(1)).flatten()
        return {"reconstruction": four.sum(), **dict(zip(MEASURES, four, strict=True))}


class _Swapped(torch.autograd.Function):
    """Rows (B, ...) in the places of their partners. Backward too is a gather: partners are each other's."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(others)
        return rows[others]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (others,) = ctx.saved_tensors
        return gradient[others], None


def partners(labels: torch.Tensor) -> torch.Tensor:
    """Of each row the one it is paired with, (B,): the n-th real and the n-th fake; as many of both."""
    halves = labels.argsort(stable=True)
    return torch.empty_like(halves).scatter_(0, halves, halves.roll(len(halves) // 2))
