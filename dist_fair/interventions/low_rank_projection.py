"""Low-rank projection (DAID): the classifier sees a subspace of the features, spanned by orthonormal directions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.errors import DistFairError
from dist_fair.interventions.at_inference import Projection
from dist_fair.interventions.base import Facts, Intervention, Weighted, register
from dist_fair.interventions.pairs import unit_vectors

REDUCTIONS = ("frobenius", "mean")


@register("low_rank_projection")
class LowRankProjection(Intervention):
    """Projection and orthogonality loss of "Fair Deepfake Detectors Can Generalize", eq. 10 and 11.

        h~ = U^T h^        U (d, rank) is learned; features (B, d) -> (B, rank)
        L_ortho = ||U^T U - I||_F^2

    The paper prints ||U U^T - I||_F^2. That is the same plus d - rank, whatever U is: the gradients are equal, and this
    one is 0 where the columns of U are orthonormal, at a cost of d rank^2 instead of d^2 rank. With rank = d an
    orthonormal U keeps every cosine and filters nothing.

    The loss depends on parameters alone. It is the same on every rank, with the same gradient, and so is the mean of
    these: no collective and no factor W. Term: orthogonality.
    """

    terms = ("orthogonality",)

    @dataclass
    class Settings(Weighted):
        """weight: lambda_ortho, the paper's 0.2. rank: of U, at most d; the paper gives none.

        reduction: frobenius (the paper), or mean (over the rank^2 entries, as in the authors' code: at rank 256 that is
        65,536 times smaller). normalise: scales each h^ to norm 1 before the projection, as in the authors' code; one
        of norm below 1e-12 becomes 0. hard: U is orthonormal by construction (needs weight=0: L_ortho would be 0).
        """

        weight: float = 0.2
        rank: int = 256
        reduction: str = "frobenius"
        hard: bool = False
        normalise: bool = False

        def __post_init__(self):
            super().__post_init__()
            place = "low_rank_projection: "
            if self.rank < 1:
                raise DistFairError(f"{place}rank={self.rank}: at least 1")
            if self.reduction not in REDUCTIONS:
                raise DistFairError(f"{place}reduction={self.reduction}: one of {', '.join(REDUCTIONS)}")
            if self.hard and self.weight != 0:
                raise DistFairError(f"{place}hard=true, weight={self.weight}: U is orthonormal by construction, so the "
                                    "term has no effect: set weight=0, or hard=false")  # fmt: skip

    couples = False
    settings: Settings

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        if settings.rank > features:
            raise DistFairError(f"low_rank_projection: rank={settings.rank} is more than the {features} features "
                                f"that enter: set rank to at most {features}")  # fmt: skip
        self.width = settings.rank
        self.basis = nn.Parameter(nn.init.orthogonal_(torch.empty(features, settings.rank)))
        self.register_buffer("identity", torch.eye(settings.rank), persistent=False)  # no part of checkpoints

    @classmethod
    def at_inference(cls, settings: Settings, tensors: Mapping[str, torch.Tensor]) -> Projection:
        return Projection(directions(tensors["basis"], settings.hard), normalise=settings.normalise)

    def directions(self) -> torch.Tensor:
        """U (d, rank)."""
        return directions(self.basis, self.settings.hard)

    def transform(self, features: torch.Tensor, batch: Batch, comm: Communicator) -> torch.Tensor:
        return (unit_vectors(features) if self.settings.normalise else features) @ self.directions()

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        basis = self.directions()
        reduction = "sum" if self.settings.reduction == "frobenius" else "mean"
        return {"orthogonality": functional.mse_loss(basis.T @ basis, self.identity, reduction=reduction)}


def directions(basis: torch.Tensor, hard: bool) -> torch.Tensor:
    """U (d, rank).

    hard: the orthonormal factor Q of basis = Q R, made unique, and so continuous, by a positive diagonal of R.
    torch's parametrizations.orthogonal would not do: its Householder map truncates a diagonal of ones to integers,
    and the first weight decay makes that zeros; its others work on d x d matrices, 25 times the time at d = 2048,
    rank = 256, and cast to fp64 are orthonormal to fp32 only.
    """
    if not hard:
        return basis
    q, r = torch.linalg.qr(basis)
    return q * r.diagonal().sign()
