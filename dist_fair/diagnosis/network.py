"""Checks between ranks: interfaces, clocks, and a collective that is really run."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, names, ok, problem, warning

if TYPE_CHECKING:
    from dist_fair.collectives import Communicator

HUNG = (
    "the ranks met, but data do not flow: set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that joins "
    "the nodes (`ip -brief address`), have the firewall let all ports through between them, and see NCCL_DEBUG=INFO"
)
SKEW, WRONG = 1.0, 60.0  # seconds: logs get out of order; Slurm's and other tickets are refused
GROUP_TIMEOUT = timedelta(minutes=10)  # far above the check's own time: NCCL's watchdog would end the process


def interface(site: Site) -> Verdict:
    """Do the interfaces that were named exist? If none was, would gloo take one that others can reach?"""
    present = [name for _, name in socket.if_nameindex()]
    told = {name: site.environment[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
            if site.environment.get(name)}  # fmt: skip
    for variable, value in told.items():
        if not _exists(variable, value, present):
            return problem("network interface", f"{variable}={value}, but this node has {', '.join(present)}",
                           f"set {variable} to one of them, or unset it")  # fmt: skip
    found = ", ".join(f"{variable}={value}" for variable, value in told.items())
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = None
    nodes = site.ranks.world > site.local_world
    if nodes and "GLOO_SOCKET_IFNAME" not in told and (address is None or address.startswith("127.")):
        return warning("network interface", f"{host} is {address or 'unknown'} to itself, which no other node reaches",
                       "if all-reduce fails: GLOO_SOCKET_IFNAME=the interface that joins the nodes, of "
                       f"{', '.join(present)}; or mend /etc/hosts")  # fmt: skip
    return ok("network interface", found or f"chosen by gloo and NCCL; {host} is {address or 'unknown'}")


def clocks(site: Site) -> Verdict | None:
    """How far the ranks' clocks are from rank 0's."""
    found = site.ranks.pairwise("clock")
    if site.ranks.rank > 0 or site.ranks.world == 1:
        return None
    if not found:
        return problem("clocks", "no rank answered", "see `ranks`")
    off = {rank: max(0.0, abs(ahead) - trip / 2) for rank, (ahead, trip) in found.items()}
    rank = max(off, key=off.get)
    if off[rank] < SKEW:
        return ok("clocks", f"at most {max(off[rank], 0.001):.3f} s apart")
    far = f"{names([rank], site.hosts)} is {abs(found[rank][0]):.1f} s {'ahead' if found[rank][0] > 0 else 'behind'}"
    judge = problem if off[rank] > WRONG else warning
    return judge("clocks", far, "have the administrator start NTP (chronyd) on that node")


def all_reduce(site: Site) -> Verdict:
    """A sum over all ranks, of a size that fills the network: is it right, and how fast?"""
    import torch

    ranks = site.ranks
    if ranks.world == 1:
        return ok("all-reduce", "one rank: nothing crosses the network")
    if lost := ranks.tell("lost", sorted(ranks.lost)):
        return problem("all-reduce", f"not run without ranks {', '.join(map(str, lost))}", "see `ranks`")
    with connected(site) as (comm, backend):
        values = torch.full(((64 if backend == "nccl" else 2) << 20,), ranks.rank + 1.0, device=comm.device)
        expected, seconds = ranks.world * (ranks.world + 1) / 2, []
        for _ in range(4):  # the first one connects
            began = time.perf_counter()
            right = bool((comm.sum(values, "doctor") == expected).all())  # waits for the GPU
            seconds.append(time.perf_counter() - began)
            if not right:
                return problem("all-reduce", f"{backend} gives wrong sums", "report it with the versions above")
    size, best = values.numel() * values.element_size(), min(seconds[1:])
    speed = 2 * (ranks.world - 1) / ranks.world * size / best / 1e9
    found = f"{backend}: {size >> 20} MiB in {best * 1e3:.0f} ms, {speed:.2f} GB/s; connecting took {seconds[0]:.1f} s"
    if backend == "nccl" and speed < 1:
        return warning("all-reduce", found, "slow for GPUs: does NCCL_DEBUG=INFO say NET/Socket where there is "
                       "InfiniBand, or name a slow interface?")  # fmt: skip
    return ok("all-reduce", found)


@contextmanager
def connected(site: Site, name: str = "group", on_gpu: str = "nccl") -> Iterator[tuple["Communicator", str]]:
    """The process group that training would have, and the name of its backend.

    name: another one for each group. on_gpu: the backend where each rank has a GPU.
    """
    import torch
    import torch.distributed as dist

    from dist_fair.collectives import Communicator

    made = not dist.is_initialized()
    if made:
        site.stuck, gpus = True, torch.cuda.device_count()
        on_gpus = site.ranks.tell(f"{name}/backend", gpus >= site.local_world and dist.is_nccl_available())
        if on_gpus:
            torch.cuda.set_device(site.local_rank % max(1, gpus))
        dist.init_process_group(on_gpu if on_gpus else "gloo", store=dist.PrefixStore(name, site.ranks.store),
                                rank=site.ranks.rank, world_size=site.ranks.world, timeout=GROUP_TIMEOUT)  # fmt: skip
    yield Communicator(), str(dist.get_backend())
    if made:  # not after an error: leaving a group that does not work would wait for it
        dist.destroy_process_group()
        site.stuck = False


def _exists(variable: str, value: str, present: list[str]) -> bool:
    """gloo takes names, NCCL beginnings of names; NCCL's ^ leaves out, its = takes names whole."""
    wanted = value.lstrip("^=").split(",")
    if variable.startswith("NCCL") and value.startswith("^"):
        return True
    if variable.startswith("NCCL") and not value.startswith("="):
        return any(name.startswith(one) for one in wanted for name in present)
    return any(one in present for one in wanted)
