"""Triplets of a batch: for each anchor another sample of its class, and one of the other half. Random, no host waits.

Which ones is a matter of the samples' own random draws, so it depends on the samples that the batch has, and neither on
their order (equal draws aside) nor on who holds them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Arranged:
    """Rows one class after the other, in each by ascending draw, and of equal draws the first row first.

    order: (n,) row numbers. places: (n,) of each row in its class, from 0. starts, counts: (K,) of each class.
    """

    order: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def by(cls, codes: torch.Tensor, draws: torch.Tensor, classes: int) -> "Arranged":
        """codes: (n,) in 0 ... classes - 1. draws: (n,)."""
        order = draws.argsort(stable=True)
        order = order[codes[order].argsort(stable=True)]
        counts = (codes == torch.arange(classes, device=codes.device)[:, None]).sum(1)
        starts = counts.cumsum(0) - counts
        return cls(order, order.argsort() - starts[codes], starts, counts)

    def members(self, codes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The rows at these places, (n,), of classes with these codes, counted round; any row of an empty class."""
        places = self.starts[codes] + places % self.counts[codes].clamp_min(1)
        return self.order[places.clamp_max(len(self.order) - 1)]


def triplets(
    labels: torch.Tensor, codes: torch.Tensor, draws: torch.Tensor, classes: int, self_pairs: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positive and negative of every row, (n,) row numbers each, and whether it has both, (n,) bool.

    labels: (n,) 0 or 1, the halves. codes: (n,) class of each row, below `classes`, -1 for a row that is no anchor and
    no positive, but may be a negative. draws: (n, 2) random numbers.

    positive: the first draws put the members of a class in a circle; it is the next one. A lone member has none.
              self_pairs: the first draws put the class in a row, the second ones too; it stands in the same place in
              the other row. That may be the sample itself, and of a lone member it is.
    negative: the first draws put the half in a row, the second ones the other half; it stands in the same place there,
              counted round where that half is smaller. None if it is empty.
    """
    inside, half, other = torch.where(codes < 0, classes, codes), labels, 1 - labels
    circle = Arranged.by(inside, draws[:, 0], classes + 1)
    halves, shuffled = (Arranged.by(half, draws[:, column], 2) for column in (0, 1))
    if self_pairs:
        positives = Arranged.by(inside, draws[:, 1], classes + 1).members(inside, circle.places)
    else:
        positives = circle.members(inside, circle.places + 1)
    enough = circle.counts[inside] >= (1 if self_pairs else 2)
    there = (codes >= 0) & enough & (shuffled.counts[other] > 0)
    return positives, shuffled.members(other, halves.places), there
