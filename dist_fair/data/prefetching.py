"""Batches on the device they train on, copied there while the ones before them are trained on.

    loading process  reads, augments, packs                          (dist_fair.data.loading)
    pinning thread   moves both tensors of a batch to page-locked memory          (torch's DataLoader)
    side stream      copies batch t + 1 to the GPU, while the main stream trains on batch t
    main stream      waits for the copies of its batch, then normalises it

The host waits for none of this. What the streams could do to each other, and why they do not:

    the main stream reads a batch that is not there yet: it waits for the event behind the copies of that batch, not for
        the whole stream, which may be copying the next one
    a copy lands in memory that the main stream still reads: memory of the side stream that is given back is used again
        once the main stream has passed that point, by record_stream
    the pinning thread writes into what is still being copied: torch puts an event behind every copy from page-locked
        memory that does not block, and uses that memory again once it has passed

Normalising is the main stream's, although it could be done ahead as well: then what waits for its turn would be four
times as large (float32), and held back by record_stream; it is three kernels on a batch of bytes.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch

from dist_fair.data.batch import Batch, Packed

AHEAD = 1  # batches that are copied before they are asked for; each takes its bytes of the GPU's memory


def prefetched(
    batches: Iterable[Packed], device: torch.device | str, mean: Sequence[float], std: Sequence[float]
) -> Iterator[Batch]:
    """The batches in order, on `device`, their images normalised: (B, 3, S, S) float32, channels_last.

    On a GPU they should be pinned; take and use them on one stream. Raises what `batches` raises, at the same place.
    """
    device = torch.device(device)
    there = _copied_ahead(batches, device) if device.type == "cuda" else (packed.to(device) for packed in batches)

    def ready(packed: Packed) -> Batch:
        return packed.batch().normalised(mean, std)

    return map(ready, there)  # not a loop, whose variable would keep the bytes of a batch until the next


def _copied_ahead(batches: Iterable[Packed], device: torch.device) -> Iterator[Packed]:
    side, copying = _side_stream(device), deque()

    def first() -> Packed:
        """The batch that was copied first, for the caller's stream to use."""
        packed, copied = copying.popleft()
        main = torch.cuda.current_stream(device)
        main.wait_event(copied)
        for tensor in (packed.images, packed.columns):
            tensor.record_stream(main)
        return packed

    try:
        for packed in batches:
            with torch.cuda.stream(side):
                copying.append((packed.to(device), side.record_event()))
            if len(copying) > AHEAD:
                yield first()
    except Exception:  # of a batch that nobody has asked for yet: those before it come first
        while copying:
            yield first()
        raise
    while copying:
        yield first()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: torch keeps freed memory by stream, so a new one each time would ask the driver for new memory."""
    return torch.cuda.Stream(device)
