"""The sections of benchmarks/gpu.py that need no files. Each is a function of (scale, tell); see `Tell`."""

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from gpu_ways import Scale, Taken, Window, bare, measured, networks, trained, wait
from torch.profiler import ProfilerActivity, profile

from dist_fair.engine.device.numerics import set_numerics

Tell = Callable[..., None]  # tell("row", measure, goal, measured) | tell("way", ...) | tell("note", text)
AT_ONCE = "interventions.distribution_alignment.delay=0"
RECIPES = {
    "erm": ("recipe=erm",),
    "daid": ("recipe=daid_xception",),
    "sfd_gda": ("recipe=sfd_gda_xception", AT_ONCE),
    "daw_fdd": ("recipe=daw_fdd_xception",),
}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
PAGEABLE = "Memcpy HtoD (Pageable -> Device)"  # a copy that the host waits for, if it is large
PROFILED = 2  # steps, and as many again
TRADED = {  # of a setting: what it allows, over fp32 as it is
    "train.tf32=true": ("train.tf32=true",),
    "train.deterministic=true": ("train.deterministic=true",),
}


def step(scale: Scale, tell: Tell) -> None:
    """A step of erm against the bare loop, eager, model by model."""
    for role, (card, name, pixels) in scale.models.items():
        arguments = ("recipe=erm", f"detector={card}", f"train.precision={scale.precision}")
        taken = measured(
            {
                "dist_fair": partial(trained, arguments, pixels, scale.batch),
                "bare, channels_last": partial(bare, name, pixels, scale.batch, scale),
                "bare, NCHW": partial(bare, name, pixels, scale.batch, scale, channels_last=False),
            },
            scale,
        )
        place = f"{role}, {pixels} px, batch {scale.batch}, {scale.precision}"
        told(tell, place, taken)
        pace = {name: np.median(one.seconds) for name, one in taken.items() if name != "dist_fair"}
        best = min(pace, key=pace.get)
        tell("row", f"erm over the best bare timm loop ({best}), {place}", "<= 1.02", over(taken, "dist_fair", best))
        tell("row", f"peak memory over the bare loop's, {place}", "<= 1.05",
             f"{taken['dist_fair'].memory / taken['bare, channels_last'].memory:.3f}")  # fmt: skip
        del taken
        gc.collect()
        torch.cuda.empty_cache()


def compiled(scale: Scale, tell: Tell) -> None:
    """The same of the first model, compiled against compiled."""
    role, (card, name, pixels) = next(iter(scale.models.items()))
    arguments = ("recipe=erm", f"detector={card}", f"train.precision={scale.precision}", "train.compile=all")
    bench = partial(bare, name, pixels, scale.batch, scale, compiled=True)
    taken = measured({"dist_fair, train.compile=all": partial(trained, arguments, pixels, scale.batch),
                      "bare, channels_last, torch.compile": bench}, scale)  # fmt: skip
    place = f"{role}, {pixels} px, batch {scale.batch}, {scale.precision}"
    told(tell, place, taken)
    tell("row", f"erm over the bare timm loop, both compiled, {place}", "<= 1.02", over(taken, *taken))
    ours, theirs = (one.memory for one in taken.values())
    tell("row", f"peak memory over the bare loop's, both compiled, {place}", "<= 1.05", f"{ours / theirs:.3f}")


def objectives(scale: Scale, tell: Tell) -> None:
    """What the objectives add to erm, in time, kernels and waits; eager."""
    _objectives(scale, tell, "none", "eager")


def compiled_objectives(scale: Scale, tell: Tell) -> None:
    """The same with train.compile=objectives."""
    _objectives(scale, tell, "objectives", "train.compile=objectives")


def _objectives(scale: Scale, tell: Tell, what: str, way: str) -> None:
    role, (card, _, pixels) = next(iter(scale.models.items()))
    place = f"{role}, {pixels} px, batch {scale.batch}, {scale.precision}, {way}"
    windows: dict[str, Window] = {}

    def made(name: str) -> Window:
        arguments = (*RECIPES[name], f"detector={card}", f"train.precision={scale.precision}", f"train.compile={what}")
        windows[name] = trained(arguments, pixels, scale.batch)
        return windows[name]

    taken = measured({name: partial(made, name) for name in RECIPES}, scale)
    told(tell, place, taken)
    for name in [*RECIPES][1:]:
        tell("row", f"{name} over erm, {place}", "<= 1.02", over(taken, name, "erm"))
    counts = {name: calls(window, scale) for name, window in windows.items()}
    kernels = {name: total(count, LAUNCHES) for name, count in counts.items()}
    for name in [*RECIPES][1:]:
        tell(
            "row", f"kernels that {name} adds to a step of erm, {way}", "<= 40", f"{kernels[name] - kernels['erm']:.0f}"
        )
    for name, count in counts.items():
        waits = {one: count[one] for one in (*WAITS, PAGEABLE) if count[one]}
        tell("row", f"host waits a step, {name}, {way}", "1, late", f"{total(count, WAITS):.1f}")
        tell("note", f"{name}, {way}: {kernels[name]:.0f} launches a step; waits: {waits or 'none'}")


def calls(window: Window, scale: Scale) -> Counter:
    """How often a step makes each call of the CUDA runtime and driver: what twice as many steps make more of."""
    few, many = (_profiled(window, scale, steps) for steps in (PROFILED, 2 * PROFILED))
    if scale.device == "cuda" and not total(many, LAUNCHES):
        raise RuntimeError("torch's profiler sees no launches here (CUPTI is missing or may not be used)")
    return Counter({name: (many[name] - few[name]) / PROFILED for name in many})


def _profiled(window: Window, scale: Scale, steps: int) -> Counter:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if scale.device == "cuda" else [])]
    with profile(activities=activities) as trace:
        window(steps)
        wait(scale.device)
    return Counter({event.key: event.count for event in trace.key_averages()})


def total(count: Counter, names: Sequence[str]) -> float:
    return sum(count[name] for name in names)


def pg_fdd(scale: Scale, tell: Tell) -> None:
    """PG-FDD without SAM over its networks alone."""
    recipe, pixels, batch = scale.pg_fdd
    arguments = (f"recipe={recipe}", f"train.precision={scale.precision}")
    taken = measured({"pg_fdd without SAM": partial(trained, arguments, pixels, batch),
                      "its encoders and decoder alone": partial(networks, arguments, pixels, batch, scale)},
                     scale)  # fmt: skip
    place = f"{recipe}, {pixels} px, batch {batch}, {scale.precision}"
    told(tell, place, taken)
    tell("row", f"pg_fdd without SAM over its encoders and decoder alone, {place}", "<= 1.02", over(taken, *taken))


def numerics(scale: Scale, tell: Tell) -> None:
    """What train.tf32 and train.deterministic cost in fp32. Both are a process's, and are set before each window."""
    role, (card, _, pixels) = next(iter(scale.models.items()))
    ways = {"fp32": (), **TRADED}
    device = torch.device(scale.device)

    def made(extra: Sequence[str]) -> Window:
        run = trained(("recipe=erm", f"detector={card}", *extra), pixels, scale.batch)

        def switched(steps: int) -> None:
            set_numerics(device, "train.tf32=true" in extra, "train.deterministic=true" in extra)
            run(steps)

        return switched

    # The one that reads cuBLAS's environment comes first.
    taken = measured({name: partial(made, ways[name]) for name in [*ways][::-1]}, scale)
    place = f"{role}, {pixels} px, batch {scale.batch}, fp32"
    told(tell, place, taken)
    for name in TRADED:
        tell("row", f"erm with {name} over erm without, {place}", "-", over(taken, name, "fp32"))


def told(tell: Tell, place: str, taken: Mapping[str, Taken]) -> None:
    """The ways themselves, for whoever wants more than ratios."""
    for name, one in taken.items():
        low, middle, high = np.percentile(one.seconds * 1e3, (20, 50, 80))
        tell("way", place, name, f"{middle:,.2f}", f"{low:,.2f} to {high:,.2f}", f"{one.memory:.2f}", f"{one.warm:.0f}")


def over(taken: Mapping[str, Taken], one: str, other: str) -> str:
    """The ratio of two ways, a median over rounds, and its spread."""
    low, middle, high = np.percentile(taken[one].seconds / taken[other].seconds, (20, 50, 80))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
