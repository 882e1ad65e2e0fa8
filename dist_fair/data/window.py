"""The micro-batches whose objectives are taken together, and how their rows lie.

A global batch of B samples and A micro-batches of B/A hold the same samples if data.lanes is the same: micro-batch a
takes the next B/(A C) positions of every lane. Only the order differs. Canonical order goes lane after lane, inside a
lane tape after tape, inside a tape by position; A micro-batches one after the other go by micro-batch first. `order`
puts this rank's rows of them into the places where one batch would have them, so that everything that looks at the
place of a row (ties, pairs, the order of a sum) sees one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dist_fair.data.batch import Batch
from dist_fair.data.plan import TrainingPlan


@dataclass(frozen=True)
class Window:
    """Micro-batches of one step; `order`: (rows of all of them,) int64, see `canonical_order`; None for just one."""

    batches: Sequence[Batch]
    order: torch.Tensor | None = None

    def arranged(self, columns: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor per micro-batch, each with a row per sample -> all rows in canonical order."""
        return columns[0] if self.order is None else torch.cat([*columns])[self.order.to(columns[0].device)]

    def merged(self) -> Batch:
        """The micro-batches as one batch, in all that a batch is: the one that a plan without accumulation gives."""
        if self.order is None:
            return self.batches[0]
        first = self.batches[0]
        rows = {name: self.arranged([getattr(batch, name) for batch in self.batches])
                for name in ("images", "labels", "manipulations", "samples", "valid", "keys")}  # fmt: skip
        attributes = {
            name: self.arranged([batch.attributes[name] for batch in self.batches]) for name in first.attributes
        }
        sizes = tuple(sum(parts) for parts in zip(*(batch.sizes for batch in self.batches), strict=True))
        position = first.position // len(self.batches)
        return replace(first, **rows, attributes=attributes, sizes=sizes, position=position)


def paired(plan: TrainingPlan) -> bool:
    """Whether every lane of a batch, and so every rank, has as many reals as fakes: tapes of one label each, 1:1."""
    tapes = list(zip(plan.specs, plan.parts, strict=True))
    return all(sum(part for tape, part in tapes if tape.label == label) * 2 == plan.batch_size for label in (0, 1))


def canonical_order(plan: TrainingPlan, count: int, world: int) -> torch.Tensor:
    """Which of the rows of `count` micro-batches of a rank, one after the other, comes at each place of the batch that
    they form: a permutation, int64."""
    per_lane = [part // plan.lanes for part in plan.parts]
    rows = np.arange(count * plan.batch_size // world).reshape(count, plan.lanes // world, sum(per_lane))
    tapes = np.split(rows, np.cumsum(per_lane)[:-1], axis=2)  # each (micro-batches, lanes, samples)
    lanes = [tape.swapaxes(0, 1).reshape(tape.shape[1], -1) for tape in tapes]
    return torch.from_numpy(np.concatenate(lanes, axis=1).reshape(-1))
