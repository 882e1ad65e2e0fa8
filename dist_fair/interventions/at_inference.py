"""What interventions leave between features and classifier of a deployed detector: nothing here reads a demographic.

A step knows how to do without input columns that are constant because their channels are masked: it takes what they
did into account once and for all.
"""

import torch
from torch import nn

from dist_fair.interventions.pairs import unit_vectors


class Step(nn.Module):
    """Features (B, d) -> (B, width). Made of its tensors, by their names in a file; it trains no more.

    features, width: d, and what leaves. options: what its tensors do not tell, JSON-like.
    """

    features: int
    width: int

    @property
    def options(self) -> dict[str, bool]:
        """The arguments that are not tensors."""
        return {}

    def without(self, kept: torch.Tensor, constants: torch.Tensor) -> tuple["Step", torch.Tensor | None]:
        """The same step on the columns `kept` (k,), ascending, of the features.

        constants: (d - k,) fp64, what the left-out columns always hold. Returned with the step: what they hold behind
        it, fp64; None if no column of it is constant.
        """
        raise NotImplementedError


class Standardisation(Step):
    """(h - mean) * scale, mean and scale (d,) fp64, computed in fp64; in the type of h or fp32."""

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        (self.features,) = (self.width,) = mean.shape
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        standardised = (features.double() - self.mean) * self.scale
        return standardised.to(torch.promote_types(features.dtype, torch.float32))

    def without(self, kept: torch.Tensor, constants: torch.Tensor) -> tuple[Step, torch.Tensor | None]:
        left_out = others(kept, self.features)
        constants = (constants - self.mean[left_out]) * self.scale[left_out]
        return Standardisation(self.mean[kept], self.scale[kept]), constants


class Projection(Step):
    """basis^T h, basis (d, rank); normalise: of each h scaled to norm 1, see `unit_vectors`.

    constant: (1,), or None. A column that always holds this number is put behind those of h; basis has d + 1 rows then.
    """

    def __init__(self, basis: torch.Tensor, constant: torch.Tensor | None = None, normalise: bool = False):
        super().__init__()
        rows, self.width = basis.shape
        self.features, self.normalise = rows - (constant is not None), normalise
        self.register_buffer("basis", basis)
        self.register_buffer("constant", constant)

    @property
    def options(self) -> dict[str, bool]:
        return {"normalise": self.normalise}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.constant is not None:
            features = torch.cat([features, self.constant.to(features).expand(len(features), 1)], dim=1)
        return (unit_vectors(features) if self.normalise else features) @ self.basis

    def without(self, kept: torch.Tensor, constants: torch.Tensor) -> tuple[Step, torch.Tensor | None]:
        """Together, the columns left out are one along their direction: their norm, at the row it projects to."""
        norm = torch.linalg.vector_norm(constants)
        if norm == 0:
            return Projection(self.basis[kept], None, self.normalise), None
        row = (constants / norm) @ self.basis[others(kept, self.features)].double()
        basis = torch.cat([self.basis[kept], row[None].to(self.basis)])
        return Projection(basis, norm[None].to(self.basis), self.normalise), None


STEPS: dict[str, type[Step]] = {"standardisation": Standardisation, "projection": Projection}


def others(kept: torch.Tensor, count: int) -> torch.Tensor:
    """The numbers below `count` that are not among `kept`, ascending."""
    chosen = torch.ones(count, dtype=torch.bool)
    chosen[kept] = False
    return chosen.nonzero()[:, 0]
