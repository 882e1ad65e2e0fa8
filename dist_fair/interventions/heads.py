"""What the losses of a detector's further heads share: mean cross-entropies of samples that have a label."""

import torch
from torch.nn import functional

from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.errors import DistFairError


def lifted(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def loss_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of logits (B, K) with labels (B,), and their number, (2,); label -1 is left out."""
    losses = functional.cross_entropy(lifted(logits), labels, ignore_index=-1, reduction="sum")
    return torch.stack([losses, (labels >= 0).sum().to(losses)])


def loss_mean(sums: torch.Tensor) -> torch.Tensor:
    """The mean loss from `loss_sums` of all samples; 0 without any."""
    losses, number = sums
    return losses / number.clamp_min(1)


def forgery_classes(index: Index, switch_off: str) -> int:
    """1 + M: real, and each of the M manipulations of the data.

    Raises DistFairError if no sample has one. switch_off: the setting that does without, for the error text.
    """
    if not (index.manipulations.codes >= 0).any():
        raise DistFairError(f"the training data name no manipulation, so fakes are of one kind: set {switch_off}, or "
                            "index data that say how a fake was made")  # fmt: skip
    return 1 + len(index.manipulations.values)


def forgery_labels(batch: Batch) -> torch.Tensor:
    """Per sample, (B,): 0 real, 1 + manipulation code of a fake, -1 for a fake of unknown manipulation."""
    fakes = torch.where(batch.manipulations < 0, -1, batch.manipulations + 1)
    return torch.where(batch.labels == 0, 0, fakes)
