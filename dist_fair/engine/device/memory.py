"""What steps take of their device's memory, and how many rows there would be room for.

    held    what lies there between two steps: weights, buffers, moments
    peak    the most that lies there at any moment of a step
    room    what this rank could fill: what is free, and what it has already

Torch counts what it gives out on a GPU. On the CPU it is the memory of the process as the system sees it, looked at
whenever the step comes to another stretch: at the end of a forward pass all activations are there. What a CPU's
allocator has been given it mostly keeps, so that there all steps count, from before the first one.

The estimate takes all that is not held for proportional to the rows. Gradients are not, nor what the device's libraries
ask for once, so it errs to the side of fewer rows: on one GPU by the size of the gradients in that of the activations.
"""

import os
from dataclasses import dataclass

import psutil
import torch

SAFE = 0.9  # of the room: the rest is for what lies scattered, and for other shapes in evaluation


@dataclass(frozen=True)
class Use:
    """Bytes. total: of the whole card, or of this node's memory."""

    held: int
    peak: int
    room: int
    total: int

    def rows(self, taken: int) -> int | None:
        """How many rows there would be room for, by estimate, given that `taken` rows took this; None: it took none."""
        each = (self.peak - self.held) / taken
        return int((SAFE * self.room - self.held) / each) if each > 0 else None


class Memory:
    """Of a device, from now on."""

    def __init__(self, device: torch.device):
        self.device = device
        self._held = self._peak = self._now()

    def begin(self) -> None:
        """What lies there now is held; the peak is that of what follows. On the CPU it goes on as before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = self._now()

    def look(self) -> None:
        """Is this the peak? Torch knows by itself."""
        if self.device.type != "cuda":
            self._peak = max(self._peak, self._now())

    def use(self) -> Use:
        """What there was until now."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            room = free + torch.cuda.memory_reserved(self.device)
            return Use(self._held, torch.cuda.max_memory_allocated(self.device), room, total)
        memory, ranks = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return Use(self._held, self._peak, self._now() + memory.available // ranks, memory.total)

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss
