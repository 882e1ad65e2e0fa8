"""Cosines of pairs of samples: the mean over all pairs without forming one, and the hardest partners of each sample.

Two samples form a pair if their *match codes* are equal and their *contrast codes* differ. A sample that can be in no
pair has the code -1 in both: it differs from itself in nothing and from all others in the match code.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dist_fair.interventions.known_gradient import with_gradient

SHORTEST = 1e-12  # norm below which a feature vector has no direction
DECIMALS = 9  # to which two cosines are tied
CHUNK = 2**22  # cosines in memory at once: 32 MiB in fp64, and four times that with keys, masks and the choice


def unit_vectors(features: torch.Tensor) -> torch.Tensor:
    """Features (B, d) scaled to norm 1; one of norm below SHORTEST becomes 0 and has no gradient.

    To that end such a norm counts as infinite. Clamped to SHORTEST it would give a zero vector gradients of 1e12.
    """
    return _UnitVectors.apply(features)


class _UnitVectors(torch.autograd.Function):
    """u = h / |h| and dh = (du - (du . u) u) / |h|: three kernels and four, where autograd's way back has 14."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        norms = functional.threshold(norms, SHORTEST, torch.inf)
        units = features / norms
        ctx.save_for_backward(units, norms)
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        units, norms = ctx.saved_tensors
        along = (gradient * units).sum(1, keepdim=True)
        return torch.addcmul(gradient, units, along, value=-1) / norms


def sums_by_code(units: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Sum and number of the unit vectors (B, d) of each code, (K, d + 1), additive; members: (B, K), ones and zeros.

    A product, since index_add on a GPU adds in another order each time.
    """
    return torch.cat([members.T @ units, members.sum(0)[:, None]], dim=1)


def mean_of_all(sums: torch.Tensor, balanced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine over all pairs and the number of (ordered) pairs; 0 and 0 without any.

    sums: (G, M, d + 1), of `sums_by_code`, by contrast and match code. With sums S_gc and counts n_gc of unit vectors
    u, the cosines of all pairs with match code c add up to

        sum over a != b of S_ac . S_bc  =  sum_a S_ac . (S_c - S_ac),      S_c = sum_b S_bc

    and the gradient of that is 2 (S_c - S_ac). With n in place of S it is the number of pairs.
    balanced: the mean over all (c, a, b) with members on both sides of their mean cosine. That is S_ac . S_bc / (n_ac
    n_bc), the same formula with means in place of sums and ones in place of counts.
    """
    with torch.no_grad():
        sizes = sums[..., -1:].clamp_min(1) if balanced else None
        own = sums / sizes if balanced else sums
        others = own.sum(0) - own
        totals = (own * others).sum((0, 1))
        number = totals[-1]
        divisor = number.clamp_min(1)
        mean, gradient = totals[:-1].sum() / divisor, others / (divisor / 2)
    return with_gradient(mean, sums, gradient / sizes if balanced else gradient), number


@torch.no_grad()
def hardest_partners(
    units: torch.Tensor, contrast: torch.Tensor, match: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k partners of smallest cosine of every row: row numbers (B, k), and where there is one, (B, k) bool.

    Cosines that agree to DECIMALS decimals are tied, and the lower row number goes first: a matmul may round equal
    products differently from column to column, and top-k promises no order among equals. So both make up one integer,
    and no two partners of a row are equal. Of all B x B cosines, CHUNK are in memory at once.
    """
    size = len(units)
    own, none, k = torch.arange(size, device=units.device), torch.iinfo(torch.int64).max, min(k, size)
    keys = []
    for rows in own.split(max(1, CHUNK // size)):
        cosines = units[rows] @ units.T
        key = cosines.mul_(10.0**DECIMALS).round_().long().mul_(size).add_(own)
        paired = (match[rows, None] == match) & (contrast[rows, None] != contrast)
        keys.append(key.masked_fill_(~paired, none).topk(k, largest=False).values)
    chosen = torch.cat(keys)
    return chosen % size, chosen < none


def mean_of_chosen(
    units: torch.Tensor, partners: torch.Tensor, there: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine of the (ordered) pairs that `hardest_partners` gave and their number; 0 and 0 without any.

    Both ends of a pair get their gradient. With ones in C (B, B) where a row has chosen a column, that is

        <U, C U> / n,      and its gradient (C U + C^T U) / n

    CHUNK numbers of C are in memory at once. Products, since sums by index are in no order on a GPU.
    """
    with torch.no_grad():
        size, (back, forth) = len(units), (torch.zeros_like(units), [])
        partners = torch.where(there, partners, size)
        for rows, columns in zip(*(part.split(max(1, CHUNK // size)) for part in (units, partners)), strict=True):
            chosen = units.new_zeros(len(rows), size + 1).scatter_(1, columns, 1.0)[:, :size]
            forth.append(chosen @ units)
            back.addmm_(chosen.T, rows)
        number = there.sum(dtype=units.dtype)
        together, divisor = torch.cat(forth), number.clamp_min(1)
        mean, gradient = (units * together).sum() / divisor, (together + back) / divisor
    return with_gradient(mean, units, gradient), number
