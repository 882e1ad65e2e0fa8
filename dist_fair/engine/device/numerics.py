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

import torch

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
