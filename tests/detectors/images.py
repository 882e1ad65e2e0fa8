"""Images as detectors get them: bytes in the loader's order, normalised."""

import numpy as np
import pytest
import torch

from dist_fair.data.batch import normalised

LAYOUTS = ("contiguous", "channels_last")
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def loaded(count, side, layout="channels_last", seed=1):
    """Noise (B, 3, S, S) in [-1, 1], float32. channels_last: the loader's (B, S, S, 3), seen with the colours first."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    made = normalised(torch.from_numpy(pixels), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert not made.is_contiguous()
    assert made.is_contiguous(memory_format=torch.channels_last)
    return made if layout == "channels_last" else made.contiguous()
