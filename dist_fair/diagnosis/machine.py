"""Checks of a node: GPUs, cores, limits, memory that processes share, temporary files."""

import os
import resource
import shutil
import tempfile
from glob import glob
from pathlib import Path

from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, ok, problem, warning

SHM = Path("/dev/shm")
PREFETCHED = 3  # batches of a loading process that are in shared memory: two waiting, one in use
GIGABYTE = 10**9


def gpus(site: Site) -> Verdict:
    """Are there as many as ranks, all usable, alike, with bf16?"""
    import torch

    count, cuda = torch.cuda.device_count(), torch.version.cuda
    if count == 0:
        if glob("/dev/nvidia[0-9]*") and site.environment.get("CUDA_VISIBLE_DEVICES") != "":
            return problem(
                "GPUs", f"this node has NVIDIA devices, torch {torch.__version__} sees none", _driver_fix(cuda)
            )
        return ok("GPUs", "none: the CPU and gloo are used")
    if count < site.local_world:
        return problem("GPUs", f"{count} for {site.local_world} ranks of this node",
                       "one rank per GPU; each rank sees all GPUs of its node: no --gpus-per-task")  # fmt: skip
    device = site.local_rank if count > 1 else 0
    try:
        torch.ones(1, device=f"cuda:{device}").sum().item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return problem("GPUs", f"GPU {device} cannot be used: {reason}", _driver_fix(cuda))
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found = f"{count} x {about.name}, {total / GIGABYTE:.0f} GB, bf16 {'yes' if bf16 else 'no'}, driver {_driver()}"
    if free < 0.9 * total:
        return warning("GPUs", f"{found}; of GPU {device} {free / GIGABYTE:.0f} GB are free",
                       "another process uses it: nvidia-smi names it", alike=False)  # fmt: skip
    if site.resolved and site.resolved.recipe.train.precision == "bf16" and not bf16:
        return warning("GPUs", found, "train.precision=bf16 is emulated here, slowly: fp32, or GPUs from Ampere on")
    return ok("GPUs", found, alike=True)


def threads(site: Site) -> Verdict:
    """Do the threads of this node's ranks and loading processes fit its cores?"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    set_to = site.environment.get("OMP_NUM_THREADS")
    found = f"{cores} cores seen by this rank, {site.local_world} ranks, OMP_NUM_THREADS {set_to or 'unset'}"
    own = int(set_to) if set_to and set_to.isdigit() else max(1, cores // site.local_world)
    shared = cores >= (os.cpu_count() or 1)  # a rank that is bound to some cores has them for itself
    wanted = (own + site.workers) * (site.local_world if shared else 1)
    if site.workers:
        found += f", data.workers={site.workers}"
    if wanted > 1.5 * cores and wanted > 2:
        return warning("threads", f"{found}: {wanted} threads on {cores} cores",
                       "runs get several times slower: fewer data.workers, OMP_NUM_THREADS=1, or more cores "
                       "(--cpus-per-task)")  # fmt: skip
    return ok("threads", found)


def open_files(site: Site) -> Verdict:
    """Shards, workers and sockets need descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 1024:
        return problem("open files", f"a process may have {soft}", f"ulimit -n {max(4096, min(hard, 65536))}")
    return ok("open files", f"a process may have {soft if soft >= 0 else 'any number'}")


def shared_memory(site: Site) -> Verdict | None:
    """Loading processes hand over batches in /dev/shm; containers give it 64 MB."""
    if not SHM.is_dir():
        return None
    free, needed = shutil.disk_usage(SHM).free, _batches(site)
    found = f"{free / GIGABYTE:.2f} GB free, loading takes about {needed / GIGABYTE:.2f} GB"
    fix = "docker run --shm-size=16g or --ipc=host; or smaller data.workers; stale files of dead jobs lie there too"
    if free < needed:
        return problem("/dev/shm", found, fix)
    if free < max(2 * needed, GIGABYTE // 4):
        return warning("/dev/shm", found, fix)
    return ok("/dev/shm", f"{free / GIGABYTE:.2f} GB free")


def temporary_files(site: Site) -> Verdict:
    """Compilers and libraries write there."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"dist_fair")
    except OSError as error:
        return problem(
            "temporary files", f"{folder} cannot be written: {error.strerror}", "set TMPDIR to a local folder"
        )
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / GIGABYTE:.1f} GB free"
    return (
        ok("temporary files", found)
        if free > GIGABYTE
        else warning("temporary files", found, "clear it, or set TMPDIR")
    )


def _batches(site: Site) -> int:
    """Bytes of images in shared memory, over the ranks of this node."""
    if not site.resolved:
        return 0
    recipe = site.resolved.recipe
    rows = max(recipe.train.batch_size // recipe.train.accumulate, recipe.evaluation.batch_size) / site.ranks.world
    return int(PREFETCHED * recipe.data.workers * site.local_world * rows * recipe.data.image_size**2 * 3)


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), "unknown")


def _driver_fix(cuda: str | None) -> str:
    if cuda is None:
        return "this torch was built for the CPU: pip install torch torchvision, from PyPI"
    return f"the driver must be new enough for CUDA {cuda}: does nvidia-smi work on this node?"
