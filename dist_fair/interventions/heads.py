"""What the losses of a detector's further heads share: mean cross-entropies of samples that have a label."""

import torch

from dist_fair.data.batch import Batch
from dist_fair.data.index import Index
from dist_fair.errors import DistFairError


def lifted(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def loss_sums(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Minus the sum of the cross-entropies of logits (B, K), and their number, (2,).

    own: (B, K), ones at the labels; zeros for a sample that has none and is left out.
    """
    return torch.stack([own * lifted(logits).log_softmax(1), own]).sum((1, 2))


def loss_mean(sums: torch.Tensor) -> torch.Tensor:
    """The mean loss from `loss_sums` of all samples; 0 without any."""
    losses, number = sums
    return losses / -number.detach().clamp_min(1)


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
    codes = batch.manipulations
    return torch.where(codes < 0, codes, codes + 1) * batch.labels
