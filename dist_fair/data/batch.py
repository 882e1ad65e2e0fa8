"""A batch: this rank's part of one global batch, and what every rank knows about the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """This rank's rows of a global batch, in canonical order (rank order is global order).

    images: (B, H, W, 3) uint8 RGB as decoded, or (B, 3, H, W) float after `normalised`.
    labels: (B,) int64, 0 real, 1 fake. attributes: name -> (B,) int64 codes, -1 unknown.
    manipulations: (B,) int64 codes into the index's manipulations, -1 none. samples: (B,) int64 index rows.
    valid: (B,) bool; False marks padding, which only evaluation has.
    keys: (B,) int64, of (seed, epoch, sample): what is random about a row on the device is drawn from its key
    (dist_fair.keyed_rows), so that ranks, steps and restarts do not change it.
    sizes: rows per rank of the global batch. position: number of the micro-batch since the start of training.
    """

    images: torch.Tensor
    labels: torch.Tensor
    attributes: Mapping[str, torch.Tensor]
    manipulations: torch.Tensor
    samples: torch.Tensor
    valid: torch.Tensor
    keys: torch.Tensor
    sizes: tuple[int, ...]
    position: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; copies from pinned memory do not block."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            images=move(self.images),
            labels=move(self.labels),
            attributes={name: move(codes) for name, codes in self.attributes.items()},
            manipulations=move(self.manipulations),
            samples=move(self.samples),
            valid=move(self.valid),
            keys=move(self.keys),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return replace(self, images=self.images.pin_memory())

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> "Batch":
        """Images as float (B, 3, H, W), scaled to [0, 1], then (x - mean) / std per channel."""
        return replace(self, images=normalised(self.images, mean, std))

    def rows(self, chosen: slice | torch.Tensor | np.ndarray, sizes: tuple[int, ...]) -> "Batch":
        """Some of the rows, with the sizes that the new global batch has on each rank."""
        return replace(
            self,
            images=self.images[chosen],
            labels=self.labels[chosen],
            attributes={name: codes[chosen] for name, codes in self.attributes.items()},
            manipulations=self.manipulations[chosen],
            samples=self.samples[chosen],
            valid=self.valid[chosen],
            keys=self.keys[chosen],
            sizes=sizes,
        )


def normalised(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W), scaled to [0, 1], then (x - mean) / std per channel."""
    images = images.permute(0, 3, 1, 2).float().div_(255)
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (images - shift) / scale
