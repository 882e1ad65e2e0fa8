"""How much arithmetic a sample takes, and which part of what its device could do a run does.

Counted is what convolutions and matrix products of the detector multiply and add, and those of its decoder as often as
the recipe's objectives ask for it: what a sample costs in whatever batch. Norms, activations and objectives are left
out, and so is what runs again to save memory, as is customary (PaLM, Chowdhery et al. 2022, appendix B). A backward
pass counts as two forward passes: it makes gradients of inputs and of weights.

Torch counts while two rows pass forward through a copy of the module, on the device of the run: 1 % of a step of 64
rows. Without numbers, on torch's "meta" device, that takes five times as long for a small detector, since there the
shape of each result is found in Python; bf16 and PG-FDD's heads do not run there at all.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_fair.data.batch import Batch
from dist_fair.data.window import Window
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.engine.module import TrainingModule

ROWS = 2  # a real and a fake: some objectives pair them
FORWARD_AND_BACKWARD = 3  # forward passes

# TFLOP/s of dense matrix products by NVIDIA's data sheets: bf16, TF32, fp32; None: it has no unit for that. Names as
# torch.cuda.get_device_name gives them; variants with other clocks do not match.
PEAKS: dict[str, tuple[float | None, float | None, float]] = {
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": (312, 156, 19.5),
    r"H100 PCIe": (756, 378, 51),
    r"H100 NVL": (835, 417, 60),
    r"H100 80GB HBM3": (989, 494, 67),
    r"H200 NVL": (835, 417, 60),
    r"\bH200$": (989, 494, 67),
    r"\bB200$": (2250, 1125, 75),
    r"V100-SXM2": (None, None, 15.7),
    r"V100-PCIE": (None, None, 14.0),
    r"L40S$": (362, 183, 91.6),
    r"A10$": (125, 62.5, 31.2),
    r"RTX 4090$": (165, 82.6, 82.6),
}


def flops_per_sample(module: TrainingModule, image_size: int, attributes: Iterable[str]) -> float | None:
    """Floating-point operations for each sample of a training step, forward and backward; SAM takes them twice.

    module: on its device, neither compiled nor sharded yet. It stays as it is, and nothing crosses the wire.
    attributes: the names of those that batches have. None where the detector cannot take two rows.
    """
    twin = _twin(module)
    counted = _count(twin.detector)
    device = next(chain(module.buffers(), module.parameters())).device
    try:
        with torch.no_grad(), _untimed_kernels():
            twin(Window([_rows(image_size, attributes, device)]), math.nextafter(1.0, 0.0))
    except Exception:  # a number for the log; what is wrong is for the first step to say
        return None
    return FORWARD_AND_BACKWARD * sum(counted) / ROWS


def peak_tflops(device: torch.device, precision: str, tf32: bool) -> float | None:
    """What the device could do at train.precision, in TFLOP/s; None where that is not known."""
    return known_peak(torch.cuda.get_device_name(device), precision, tf32) if device.type == "cuda" else None


def known_peak(card: str, precision: str, tf32: bool) -> float | None:
    """Of a card by name."""
    for pattern, (half, rounded, single) in PEAKS.items():
        if re.search(pattern, card) and "MIG" not in card:
            return {"bf16": half, "fp32": rounded if tf32 else single}.get(precision)
    return None


@contextmanager
def _untimed_kernels() -> Iterator[None]:
    """Within it cuDNN does not try all its kernels, for shapes that never come again. Not by torch's own
    cudnn.flags: that sets, and restores, the precision of matrix products too."""
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _twin(module: TrainingModule) -> TrainingModule:
    """A copy with the same parameters, buffers of its own, and no other ranks."""
    alone = module.comm.alone()
    alone.drain()  # counts of its own from here on
    return copy.deepcopy(module, {id(one): one for one in module.parameters()} | {id(module.comm): alone}).train()


def _count(detector: Detector) -> list[int]:
    """Has a detector count what it does from now on: a list that grows with each of its steps."""
    counted: list[int] = []

    def counting(function: Callable) -> Callable:
        def run(*arguments):
            with FlopCounterMode(display=False) as counter:
                result = function(*arguments)
            counted.append(counter.get_total_flops())
            return result

        return run

    extract = counting(detector.extract)

    def extracted(*arguments) -> Outputs:
        outputs = extract(*arguments)
        outputs.decode = outputs.decode and counting(outputs.decode)
        return outputs

    detector.extract, detector.classify = extracted, counting(detector.classify)
    return counted


def _rows(image_size: int, attributes: Iterable[str], device: torch.device) -> Batch:
    """Black images of a real and a fake in the first of all groups."""
    none = torch.zeros(ROWS, dtype=torch.int64, device=device)
    numbers = torch.arange(ROWS, device=device)
    images = torch.zeros(ROWS, 3, image_size, image_size, device=device)
    return Batch(images, numbers, dict.fromkeys(attributes, none), none, numbers, none == 0, numbers, (ROWS,), 0)
