"""Which ranks there are: checked against what was asked for, and started where asked to."""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_fair.engine.preemption import passed_on
from dist_fair.errors import DistFairError, Exit, on_all_ranks

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

HOW = (
    "launch with `dist-fair {verb} --ranks N ...`, `torchrun --nproc_per_node N -m dist_fair.{verb} ...`, or "
    "`accelerate launch --multi_gpu --num_processes N -m dist_fair.{verb} ...` (without GPUs too: without --multi_gpu "
    "accelerate starts one process)"
)


def launch_ranks(verb: str, ranks: int, arguments: Sequence[str]) -> int:
    """Runs `ranks` local ranks of `dist_fair.VERB` under torchrun; the exit code of the first that failed, or 0.

    Signals that ask a run to stop are passed on to the ranks, which then end as they do: torchrun would give them 30 s.
    """
    if ranks < 1:
        raise DistFairError(f"--ranks {ranks}: at least 1")
    if "RANK" in os.environ:
        world = os.environ.get("WORLD_SIZE")
        raise DistFairError(f"--ranks {ranks}: this is one of {world} launched ranks; leave it out")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = ["--standalone", "--nproc_per_node", str(ranks), "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    try:
        with passed_on(lambda words: f"dist_fair.{verb}" in words):
            torchrun([*command, "-m", f"dist_fair.{verb}", *arguments])
    except ChildFailedError as error:  # the rank has said why; torch's own account of it says only that it did
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else Exit.RANK_LOST  # negative: the number of the signal that killed it
    except SignalException:
        raise KeyboardInterrupt from None
    return Exit.DONE


def check_world(verb: str, expected: int | None) -> None:
    """Raises DistFairError if this process is not one of as many ranks as were asked for.

    accelerate's simple launcher starts one process whatever --num_processes says, but then sets MASTER_ADDR without
    WORLD_SIZE: that is how it is recognised.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    with on_all_ranks():
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
            raise DistFairError(
                "accelerate launch was asked for several processes and started one: " + HOW.format(verb=verb)
            )
        if expected is not None and expected != world:
            raise DistFairError(f"train.ranks={expected}, but there are {world} ranks: " + HOW.format(verb=verb))


EVERYWHERE = "cpu:gloo,cuda:nccl"  # what hosts ask each other travels beside what devices do, and waits for none


def accelerator() -> "Accelerator":
    """The process group and device of this rank: GPUs if this node has any, else the CPU and gloo.

    Buffers are not broadcast: synced norm keeps them equal, and a broadcast would hide it if it did not.
    """
    import torch  # here, so that a process that only launches others starts at once
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if 0 < gpus < local:
        raise DistFairError(f"{local} ranks on this node and {gpus} GPUs: one rank per GPU, or CUDA_VISIBLE_DEVICES= "
                            "to train on the CPU")  # fmt: skip
    if gpus == 0 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if gpus and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(EVERYWHERE)  # accelerate would make one of NCCL alone
    # The name that torch 2.11 knows; and 1x1 kernels have two equal layouts, of which DDP expects the other.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=gpus == 0, mixed_precision="no", kwargs_handlers=[ddp])


def join_alone(device: "torch.device") -> None:
    """A process group of this rank, where there is none: of one rank accelerate makes none, and sharding needs one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = EVERYWHERE if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
