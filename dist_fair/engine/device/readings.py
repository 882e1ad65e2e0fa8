"""The numbers of a step on their way to the host, which does not wait for them.

A host that reads a step's loss before it launches the next step leaves the device idle for as long as a launch takes:
10 to 40 ms for the two to ten thousand kernels of a step. So the numbers of step t are copied beside the work, and read
while the device is at step t + 1: the one wait of a step, and a late one.

What must not come late is a step that is not finite: it would be in the weights by then. That is decided on the device.
`Verdict.broken` is true from the first such step on, and no optimizer steps while it is (see Backend.step): when the
host reads of it, one step later, the weights are still those before. On the CPU all is the same but the waiting.
"""

from collections.abc import Sequence

import torch


class Reading:
    """Some scalars of a device, by name, as Python numbers once somebody asks."""

    def __init__(self, names: Sequence[str], row: torch.Tensor):
        """row: (number of names,); what it holds now is what will be read."""
        self.names, self._arrived = tuple(names), None
        if row.device.type != "cuda":
            self._row = row.detach().clone()
            return
        self._row = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
        self._row.copy_(row.detach(), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def numbers(self) -> dict[str, float]:
        """Waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self.names, self._row.tolist(), strict=True))


class Verdict:
    """Whether any step so far was not finite: `broken`, a bool scalar on the device."""

    def __init__(self):
        self.broken: torch.Tensor | None = None

    def judge(self, numbers: torch.Tensor) -> torch.Tensor:
        """Takes a step's watched numbers (k,) into account; returns `broken`, a new tensor."""
        found = numbers.isfinite().all().logical_not_()
        self.broken = found if self.broken is None else found | self.broken
        return self.broken


def mean_row(rows: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The mean over rows of scalars, (number of columns,) fp64 on their device; two kernels for one row of one type."""
    flat = [value.detach().reshape(()) for row in rows for value in row]
    if len({value.dtype for value in flat}) > 1:
        flat = [value.to(torch.float64) for value in flat]
    table = torch.stack(flat).to(torch.float64).view(len(rows), -1)
    return table[0] if len(rows) == 1 else table.mean(dim=0)
