"""The only file that talks to torch.distributed, and the only one that knows the factor W.

W ranks hold disjoint parts of one global batch. Every rank computes the same global loss L. DDP, FSDP and ZeRO all
*average* parameter gradients over the W ranks. A parameter's averaged gradient is therefore the true one if and only if

    the gradient that reaches any local activation is W times the true dL/d(activation).      (the one gradient rule)

Then (1/W) sum_r W dL/dx_r dx_r/dtheta = dL/dtheta for what lies before the collective, and for parameters behind it
(a projection, a temperature), which see the same replicated numbers on each rank, the mean of W equal gradients is
the gradient. So the factor W belongs into the backward of the collective, and nowhere else. Two verbs:

  replicated   What follows is the same computation on every rank (all objectives). Forward: all-reduce or all-gather.
               Backward: each rank already holds the full dL/dS, so it multiplies (its own part of) it by W.
               Nothing crosses the wire in backward.
  shared       What follows differs per rank (normalising own samples with global moments). Forward: all-reduce.
               Backward: all-reduce. The gradients that come in from the local parts already carry W by the rule;
               their sum is W times the true one. No factor.

                    forward wire          backward wire     factor in backward
  replicated_sum    all-reduce of S       none              W
  replicated_gather all-gather of rows    none              W, own rows only
  shared_sum        all-reduce of S       all-reduce of dS  none

Canonical order: rank r holds rows [r B/W, (r+1) B/W) of the global batch, so a gather in rank order *is* the global
batch, on any W. Every call is made on every rank in every step, also by a rank that has no member of a group; half
precision is refused (a sum over 8,192 samples in bf16 keeps 3 digits). Calls and bytes are counted by name; the last
name entered is what a hung rank is waiting in, and `place` says where in the run. One rank takes the same path; its
wire is a copy.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_fair.errors import DistFairError


@dataclass
class Count:
    """How often a named collective ran, and how many bytes this rank put into it."""

    calls: int = 0
    bytes: int = 0


class Communicator:
    """The ranks of a run as seen from one of them.

    Without an initialised process group this is a world of one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        connected = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if connected else 0
        self.world = dist.get_world_size(group) if connected else 1
        self.counts: dict[str, Count] = defaultdict(Count)
        self.last, self.place = "none", "starting"
        self.watch: Callable[[], AbstractContextManager] = nullcontext  # entered around what crosses the wire

    def __str__(self) -> str:
        """Which rank this is and where: "rank 1 of 4, step 12, collective 'gradients'"."""
        return f"rank {self.rank} of {self.world}, {self.place}, collective '{self.last}'"

    def alone(self) -> "Communicator":
        """This rank as a world of one. Its calls are counted here, until the counts are next drained."""
        one = copy.copy(self)
        one.rank, one.world = 0, 1
        return one

    # Verbs with a gradient -------------------------------------------------------------------------------------------

    def replicated_sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum of `tensor` (any shape) over ranks, for a computation that every rank then repeats."""
        return _ReplicatedSum.apply(tensor, self, name)

    def replicated_gather(self, rows: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """All ranks' rows (n_r, ...) in rank order, (sum n_r, ...), for a computation that every rank then repeats.

        sizes: rows per rank, known to all of them from the plan; None means as many everywhere as here.
        """
        return _ReplicatedGather.apply(rows, self, name, self._sizes(rows, sizes))

    def shared_sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum of `tensor` over ranks, for computations that then differ per rank."""
        return _SharedSum.apply(tensor, self, name)

    # Verbs without a gradient ----------------------------------------------------------------------------------------

    def sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum over ranks of a detached copy."""
        return self._reduce(tensor.detach(), name, dist.ReduceOp.SUM)

    def maximum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Elementwise maximum over ranks of a detached copy."""
        return self._reduce(tensor.detach(), name, dist.ReduceOp.MAX)

    def gather(self, rows: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """All ranks' rows in rank order, detached."""
        return self._gather(rows.detach(), name, self._sizes(rows, sizes))

    def exchange_columns(self, rows: torch.Tensor, name: str, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """From split by rows to split by columns: rows (n_r, C, ...) of this rank become (sum n_r, C/W, ...).

        Rank r receives columns [r C/W, (r+1) C/W) of every rank's rows, in rank order; C must be a multiple of W.
        By all-to-all, or where the backend lacks it by a gather of which the own columns are kept. No gradient.
        """
        sizes, width = self._sizes(rows, sizes), rows.shape[1] // self.world
        if width * self.world != rows.shape[1]:
            raise ValueError(f"{name}: {rows.shape[1]} columns do not split over {self.world} ranks; pad them")
        rows = rows.detach()
        if self.world == 1:
            self._enter(name, rows)
            return rows.clone()
        if not _has_all_to_all(self.group):
            return self._gather(rows, name, sizes)[:, self.rank * width : (self.rank + 1) * width].contiguous()
        self._enter(name, rows)
        send = torch.cat(rows.split(width, dim=1))
        receive = rows.new_empty((sum(sizes), width, *rows.shape[2:]))
        with self.watch():
            dist.all_to_all_single(receive, send, sizes, [len(rows)] * self.world, group=self.group)
        return receive

    def agree(self, value: bytes, name: str) -> None:
        """Raises DistFairError, on every rank, unless all ranks hold the same 16 bytes."""
        mine = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self.device, torch.int32)
        everyone = self.gather(mine.unsqueeze(0), name)
        if not bool((everyone == everyone[0]).all()):
            odd = [rank for rank, row in enumerate(everyone) if not torch.equal(row, everyone[0])]
            raise DistFairError(f"{name}: ranks {odd} disagree with rank 0: the run is no longer one run; stopped")

    def any(self, flag: bool, name: str) -> bool:
        """True on every rank if true on one of them."""
        return bool(self.maximum(torch.tensor([int(flag)], device=self.device), name).item())

    def barrier(self, name: str) -> None:
        """Waits for all ranks."""
        self.any(False, name)

    def objects(self, value: object, name: str) -> list:
        """Every rank's JSON-like value, in rank order. As JSON: torch's object gather would unpickle."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = self.gather(torch.tensor([len(text)], device=text.device), f"{name}/sizes").tolist()
        texts = self._gather(text, name, sizes).cpu().numpy().tobytes()
        ends = [sum(sizes[: rank + 1]) for rank in range(self.world)]
        return [json.loads(texts[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    # The wire ---------------------------------------------------------------------------------------------------------

    def drain(self) -> dict[str, Count]:
        """The counts since the last call, by name."""
        counts, self.counts = dict(self.counts), defaultdict(Count)
        return counts

    def _enter(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"collective '{name}' got {tensor.dtype}: sums over ranks need fp32 or more")
        self.last = name
        self.counts[name].calls += 1
        self.counts[name].bytes += tensor.numel() * tensor.element_size()

    def _reduce(self, tensor: torch.Tensor, name: str, operation: dist.ReduceOp) -> torch.Tensor:
        self._enter(name, tensor)
        result = tensor.clone(memory_format=torch.contiguous_format)
        if self.world > 1:
            with self.watch():
                dist.all_reduce(result, operation, group=self.group)
        return result

    def _gather(self, rows: torch.Tensor, name: str, sizes: list[int]) -> torch.Tensor:
        self._enter(name, rows)
        if self.world == 1:
            return rows.clone()
        # One padded all-gather: gloo's needs equal shapes, and NCCL's uneven one is a broadcast per rank.
        longest = max(sizes)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in sizes]
        with self.watch():
            dist.all_gather(everyone, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])

    def _sizes(self, rows: torch.Tensor, sizes: Sequence[int] | None) -> list[int]:
        sizes = [len(rows)] * self.world if sizes is None else list(sizes)
        if len(sizes) != self.world or sizes[self.rank] != len(rows):
            raise ValueError(f"rank {self.rank} of {self.world} has {len(rows)} rows, the plan says {sizes}")
        return sizes

    @property
    def device(self) -> torch.device:
        """Where a tensor of no other home lies: on the CPU, if the group speaks there too, so that no host has to wait
        for its device to learn what other hosts say."""
        if self.world == 1 or "cpu:" in str(dist.get_backend_config(self.group)):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


class _ReplicatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Communicator, name: str) -> torch.Tensor:
        ctx.world = comm.world
        return comm._reduce(tensor, name, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient * ctx.world, None, None


class _ReplicatedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, comm: Communicator, name: str, sizes: list[int]) -> torch.Tensor:
        ctx.world, ctx.start, ctx.stop = comm.world, sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1])
        return comm._gather(rows, name, sizes)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient[ctx.start : ctx.stop] * ctx.world, None, None, None


class _SharedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, comm: Communicator, name: str) -> torch.Tensor:
        ctx.comm, ctx.name = comm, name
        return comm._reduce(tensor, name, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        around = ctx.comm.last  # "gradients": what a backward without us waits in, and this one again after this call
        result = ctx.comm._reduce(gradient.contiguous(), f"{ctx.name}/backward", dist.ReduceOp.SUM)
        ctx.comm.last = around
        return result, None, None


def _has_all_to_all(group: dist.ProcessGroup | None) -> bool:
    if dist.get_backend(group) != "gloo":
        return True
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 15)
