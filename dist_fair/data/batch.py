"""A batch: this rank's part of one global batch, and what every rank knows about the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch

from dist_fair.demographics import Groups


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
    _codes: dict[Groups, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def codes(self, groups: Groups) -> torch.Tensor:
        """The group of each row, (B,) int64, -1 for none: made once, whoever asks, and not to be changed in place."""
        if groups not in self._codes:
            self._codes[groups] = groups.codes(self.attributes)
        return self._codes[groups]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; copies from pinned memory do not block."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self._each(torch.Tensor.pin_memory)

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> "Batch":
        """Images as float (B, 3, H, W), scaled to [0, 1], then (x - mean) / std per channel."""
        return replace(self, images=normalised(self.images, mean, std))

    def rows(self, chosen: slice | torch.Tensor | np.ndarray, sizes: tuple[int, ...]) -> "Batch":
        """Some of the rows, with the sizes that the new global batch has on each rank."""
        return replace(self._each(lambda tensor: tensor[chosen]), sizes=sizes)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            attributes={name: change(codes) for name, codes in self.attributes.items()},
            manipulations=change(self.manipulations),
            samples=change(self.samples),
            valid=change(self.valid),
            keys=change(self.keys),
        )


@dataclass(frozen=True)
class Packed:
    """A batch as it travels: all that is small lies in one tensor, so that two copies bring it to a device.

    images: (B, S, S, 3) uint8. columns: (k, B) int64, a row each for labels, manipulations, samples, valid (0 or 1),
    keys and every name in `attributes`. sizes, position: of the `Batch`.
    """

    images: torch.Tensor
    columns: torch.Tensor
    attributes: tuple[str, ...]
    sizes: tuple[int, ...]
    position: int

    def pin_memory(self) -> "Packed":
        """The same in page-locked memory (called by torch's DataLoader): from there a copy does not block."""
        return replace(self, images=self.images.pin_memory(), columns=self.columns.pin_memory())

    def to(self, device: torch.device | str) -> "Packed":
        """The same on a device, by two copies that the host does not wait for if this is pinned."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            columns=self.columns.to(device, non_blocking=True),
        )

    def batch(self) -> Batch:
        """The batch, whose columns are views of the packed ones."""
        labels, manipulations, samples, valid, keys, *codes = self.columns.unbind()
        attributes = dict(zip(self.attributes, codes, strict=True))
        return Batch(
            self.images, labels, attributes, manipulations, samples, valid != 0, keys, self.sizes, self.position
        )

    def __reduce__(self) -> tuple:
        """Between processes the columns travel as bytes: a file of shared memory for a few kilobytes costs the
        receiver 0.4 ms a batch."""
        return _received, (self.images, self.columns.numpy(), self.attributes, self.sizes, self.position)


def _received(images: torch.Tensor, columns: np.ndarray, *others: object) -> Packed:
    return Packed(images, torch.from_numpy(columns), *others)


def normalised(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), scaled to [0, 1], then (x - mean) / std per channel.

    Three kernels, all rounding as IEEE 754 wants, since none divides by a number of the host, which torch would turn
    into a product on a GPU: the same bits on every device. The bytes stay where they are: the result is channels_last.
    """
    full, shift, scale = _constants(tuple(mean), tuple(std), images.device)
    return images.permute(0, 3, 1, 2).div(full).sub_(shift).div_(scale)


@cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """255, mean and std as `normalised` wants them, on the device: made each time, they would be three copies that the
    host waits for."""
    full = torch.tensor(255.0, dtype=torch.float32, device=device)
    return full, *(torch.tensor(row, dtype=torch.float32, device=device).view(1, 3, 1, 1) for row in (mean, std))
