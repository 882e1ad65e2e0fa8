"""How exactly and how repeatably a device computes: TF32, determinism, and the choice of kernels.

fp32 means fp32. Torch's own default lets convolutions round their inputs to TF32's 10 bits of mantissa on a GPU, and a
score is then off by 1e-3 from the CPU's. `train.tf32=true` allows it, to convolutions and matrix products alike; it is
nothing to bf16, which rounds to 7 bits.

Deterministic means that the same command gives the same bytes. Every objective here is deterministic by construction
(products with tables in place of atomic additions); what is not is cuDNN's choice of convolution, made anew by timing
in each run, some of its backward kernels, and cuBLAS's workspaces. `train.deterministic=true` fixes all three, and has
torch refuse every operation that it cannot do repeatably.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dist_fair.errors import DistFairError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_numerics(device: torch.device, tf32: bool = False, deterministic: bool = False) -> None:
    """Sets torch's switches, for this process. On the CPU they change nothing but what torch refuses.

    Call it before the first product on a GPU: cuBLAS reads its workspace's size once.
    """
    torch.use_deterministic_algorithms(deterministic)
    if device.type != "cuda":
        return
    if deterministic:
        os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # shapes are the same in every step: worth to be timed once


def seed(device: torch.device, number: int) -> None:
    """Seeds torch's generators of the CPU and of a device. torch.manual_seed does it for every maker's devices too, in
    0.7 to 1.7 ms a step, where this takes microseconds."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)


@contextmanager
def refusals_told() -> Iterator[None]:
    """What torch says within it of an operation that it cannot do repeatably becomes a DistFairError."""
    try:
        yield
    except RuntimeError as error:
        if torch.are_deterministic_algorithms_enabled() and "deterministic" in str(error):
            first = str(error).splitlines()[0].split(". ")[0]
            raise DistFairError(
                f"train.deterministic=true: torch has no repeatable way for what this recipe does: {first}; leave out "
                "what needs it, or train.deterministic=false"
            ) from error
        raise
