"""Cosines of pairs of samples: the mean over all pairs without forming one, and the hardest partners of each sample.

Two samples form a pair if their *match codes* are equal and their *contrast codes* differ. A sample that can be in no
pair has the code -1 in both: it differs from itself in nothing and from all others in the match code.
"""

import torch
from torch.nn import functional

SHORTEST = 1e-12  # norm below which a feature vector has no direction
DECIMALS = 9  # to which two cosines are tied
CHUNK = 2**22  # cosines in memory at once: 32 MiB in fp64, and four times that with keys, masks and the choice


def unit_vectors(features: torch.Tensor) -> torch.Tensor:
    """Features (B, d) scaled to norm 1; one of norm below SHORTEST becomes 0 and has no gradient.

    To that end such a norm counts as infinite. Clamped to SHORTEST it would give a zero vector gradients of 1e12.
    """
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / torch.where(norms < SHORTEST, torch.inf, norms)


def sums_by_code(
    units: torch.Tensor, contrast: torch.Tensor, match: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """Sum and number of the unit vectors (B, d) of each contrast code and match code, (G, M, d + 1), additive."""
    codes = torch.where(match < 0, shape[0] * shape[1], contrast * shape[1] + match)
    rows = functional.pad(units, (0, 1), value=1.0)
    return rows.new_zeros(shape[0] * shape[1] + 1, rows.shape[1]).index_add(0, codes, rows)[:-1].view(*shape, -1)


def mean_of_all(sums: torch.Tensor, balanced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine over all pairs and the number of (ordered) pairs, from `sums_by_code`; 0 and 0 without any.

    With sums S_gc and counts n_gc of unit vectors u, the cosines of all pairs with match code c add up to

        sum over a != b of S_ac . S_bc  =  sum_a S_ac . (S_c - S_ac),      S_c = sum_b S_bc

    balanced: the mean over all (c, a, b) with members on both sides of their mean cosine. That is S_ac . S_bc / (n_ac
    n_bc), the same formula with means in place of sums and ones in place of counts.
    """
    sums, counts = sums[..., :-1], sums[..., -1]
    if balanced:
        sums, counts = sums / counts.clamp_min(1).unsqueeze(-1), (counts > 0).to(counts)
    number = (counts * (counts.sum(0) - counts)).sum()
    return (sums * (sums.sum(0) - sums)).sum() / number.clamp_min(1), number


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

    Both ends of a pair get their gradient. The partners' unit vectors are added up to (B, d) without being held as
    (B, k, d).
    """
    together = functional.embedding_bag(partners, units, mode="sum", per_sample_weights=there.to(units))
    number = there.sum()
    return (units * together).sum() / number.clamp_min(1), number
