"""Time and memory of several ways to do one thing, measured side by side."""

import ctypes
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

Way = Callable[[], object]


def measured(ways: Mapping[str, Way], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of each way in each round, (rounds,), after one round on a CPU or five on a GPU to warm up.

    A round measures each way once, in random order. Ratios are best taken within rounds: a drift of the machine then
    hits both alike. device: "cuda", by the clock and after waiting for it; "cpu", in this process's CPU time, which
    with one thread is what the clock would say if nothing else ran.
    """
    warmup, clock = (5, time.perf_counter) if device == "cuda" else (1, time.process_time)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warmup + rounds):
        for name in order.sample([*ways], len(ways)):
            _wait_for(device)
            start = clock()
            ways[name]()
            _wait_for(device)
            seconds[name].append(clock() - start)
    return {name: np.array(taken[warmup:]) for name, taken in seconds.items()}


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ratio_cells(ratios: np.ndarray, digits: int) -> list[str]:
    """Median and spread of the rounds' ratios."""
    low, median, high = np.percentile(ratios, (20, 50, 80))
    return [f"{median:,.{digits}f}", f"{low:,.{digits}f} to {high:,.{digits}f}"]


def peak_memory(way: Way, device: str) -> str:
    """MiB that a way needs beyond what is there before; "-" where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew
        before = _status("VmRSS")
        way()
        return f"{(_status('VmHWM') - before) / 2**10:,.0f}"
    except (OSError, AttributeError):
        return "-"


def _status(name: str) -> int:
    """KiB, from Linux's account of this process."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
