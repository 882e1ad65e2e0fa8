"""Triplets of a batch: for each anchor another sample of its class, and one of the other half. Random, no host waits.

Which ones is a matter of the samples' own random draws, so it depends on the samples that the batch has, and neither on
their order (equal draws aside) nor on who holds them.

Positives and negatives are found alike: an anchor has a place in one arrangement, and looks up who has that place in
another. An arrangement is one class after the other, in each by ascending draw, and of equal draws the first row first.
So all of them, for positives and negatives and in all spaces, are sorted and looked up together.
"""

import torch


def triplets(
    labels: torch.Tensor, codes: torch.Tensor, draws: torch.Tensor, classes: int, self_pairs: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positive and negative of every row, (..., n) row numbers each, and whether it has both, (..., n) bool.

    labels: (..., n) 0 or 1, the halves. codes: (..., n) class of each row, below `classes`, -1 for a row that is no
    anchor and no positive, but may be a negative. draws: (..., n, 2) random numbers in [0, 1].

    positive: the first draws put the members of a class in a circle; it is the next one. A lone member has none.
              self_pairs: the first draws put the class in a row, the second ones too; it stands in the same place in
              the other row. That may be the sample itself, and of a lone member it is.
    negative: the first draws put the half in a row, the second ones the other half; it stands in the same place there,
              counted round where that half is smaller. None if it is empty.
    """
    inside = codes.remainder(classes + 1)  # rows without a class are one of their own
    own, wanted = torch.stack([inside, labels]), torch.stack([inside, 1 - labels])
    first, second = draws.unbind(-1)
    asked, asks = torch.stack([second if self_pairs else first, second]), torch.stack([first, first])
    order = torch.stack([asks, asked]).double().add_(own, alpha=2).argsort(dim=-1, stable=True)

    counts = (own[..., None] == torch.arange(classes + 1, device=codes.device)).sum(-2)
    starts = counts.cumsum(-1) - counts
    places = order[0].argsort(dim=-1) - starts.gather(-1, own)
    if not self_pairs:
        places[0].add_(1)
    number = counts.gather(-1, wanted)
    places = starts.gather(-1, wanted) + places % number.clamp_min(1)
    positives, negatives = order[1].gather(-1, places.clamp_max(codes.shape[-1] - 1))
    there = (codes >= 0) & (number[0] >= (1 if self_pairs else 2)) & (number[1] > 0)
    return positives, negatives, there
