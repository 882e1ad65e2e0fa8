"""A profile for people: where a step goes, what takes it there, and what to change. On the screen and as Markdown."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_fair.engine.device.profiling import READ, Operator, Profile
from dist_fair.engine.device.stopwatch import STRETCHES
from dist_fair.engine.device.trial import card, gigabytes
from dist_fair.recipe.schema import Recipe
from dist_fair.reporting.tables import markdown

LISTED = 10  # operators
WIDTH = 60  # characters of an operator's name
ADVICE = 2  # sentences
Rows = list[list[str]]


@dataclass(frozen=True)
class Setting:
    """What a profile was taken of: a recipe on `world` ranks, each with such a device.

    peak: of the device, TFLOP/s, None where not known. cores: of this node, for each of its ranks.
    """

    recipe: Recipe
    world: int
    device: torch.device
    peak: float | None
    cores: int

    def heading(self, profile: Profile) -> str:
        """One line."""
        chosen = self.recipe
        return (f"{chosen.recipe}: {chosen.detector.name}, {chosen.data.image_size} px, {profile.rows} samples a step, "
                f"{chosen.train.precision}, {self.world} rank(s), {card(self.device)}")  # fmt: skip


def cores_per_rank() -> int:
    """Cores that this process may use, over the ranks of its node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def tables(profile: Profile, setting: Setting) -> list[tuple[list[str], Rows]]:
    """Header and rows of each table: the pace, the stretches of a step, the operators that take most."""
    return [
        (["what", "found"], _facts(profile, setting)),
        (["where a step goes", "ms", "part"], _stretches(profile)),
        (["operators that take most", "ms", "part", "calls"], [_operator(one, profile) for one in _most(profile)]),
    ]


def profile_markdown(profile: Profile, setting: Setting) -> str:
    """All of it, for a file."""
    parts = [f"# {setting.heading(profile)}\n"]
    parts += [markdown(header, rows, left=(header[0], "found")) for header, rows in tables(profile, setting)]
    return "\n".join([*parts, *(f"- {sentence}" for sentence in advice(profile, setting)), ""])


def drawn(profile: Profile, setting: Setting) -> list:
    """The same for `say`, one thing after the other."""
    from rich import box
    from rich.table import Table

    parts = [setting.heading(profile)]
    for header, rows in tables(profile, setting):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for name in header:
            left = name in (header[0], "found")
            table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in rows:
            table.add_row(*row)
        parts += ["", table]
    return [*parts, "", *advice(profile, setting)]


def advice(profile: Profile, setting: Setting) -> list[str]:
    """At most two sentences on what to change, the rule with the most to win first."""
    rules = (_loading, _launching, _rounding, _talking, _filling)
    found = [sentence for rule in rules if (sentence := rule(profile, setting))]
    return found[:ADVICE] or ["Nothing stands out: the time goes into the detector's own arithmetic."]


# Rules: a sentence, or None where there is nothing to win ------------------------------------------------------------


def _loading(profile: Profile, setting: Setting) -> str | None:
    """Where a step waits for data in 5 % of its time and is 5 % faster with a batch at hand: one alone may be noise."""
    if profile.headspace < 1.05 or profile.stretches["data"] < 0.05 * profile.seconds:
        return None
    workers, cores = setting.recipe.data.workers, setting.cores
    held = f"The loader holds training back: with a batch at hand the pace is {profile.headspace:.2f} times this one;"
    spare = cores if setting.device.type == "cuda" else cores - 1  # on the CPU training itself needs one
    if workers < spare:
        return f"{held} data.workers={min(spare, max(2, 2 * workers))} (now {workers}, of {cores} cores for this rank)."
    return (f"{held} data.workers={workers} have all {cores} cores of this rank: store smaller images in the shards, "
            "augment less, or give each rank more cores.")  # fmt: skip


def _launching(profile: Profile, setting: Setting) -> str | None:
    """Where a GPU is idle in a fifth of a step for which it has its batch: the host launches too slowly."""
    busy = profile.busy / profile.cached
    if setting.device.type != "cuda" or busy == 0 or busy > 0.8:
        return None
    ways = [] if setting.recipe.train.compile == "all" else ["train.compile=all"]
    ways.append("a larger train.batch_size")
    return f"The GPU is busy {busy:.0%} of a step and waits for launches otherwise: {', or '.join(ways)}."


def _rounding(profile: Profile, setting: Setting) -> str | None:
    """A GPU that works in fp32."""
    train = setting.recipe.train
    if setting.device.type != "cuda" or train.precision != "fp32":
        return None
    less = "" if train.tf32 else "; train.tf32=true is the smaller step"
    return f"The detector runs in fp32: train.precision=bf16 is several times as fast in matrix products{less}."


def _talking(profile: Profile, setting: Setting) -> str | None:
    """Where our own collectives take a tenth of a step."""
    part = profile.stretches["collectives"] / profile.seconds
    if part < 0.1:
        return None
    return (f"Collectives take {part:.0%} of a step, in which ranks also wait for the slowest one: more samples for "
            "each rank, or fewer ranks.")  # fmt: skip


def _filling(profile: Profile, setting: Setting) -> str | None:
    """Where twice the batch would fit on a GPU."""
    if setting.device.type != "cuda" or profile.largest is None or profile.largest < 2 * profile.rows:
        return None
    return f"There is room for train.batch_size={profile.largest}, by estimate; the learning rate may have to follow."


# Rows -----------------------------------------------------------------------------------------------------------------


def _facts(profile: Profile, setting: Setting) -> Rows:
    pace = f"{profile.rows / profile.seconds:.4g} samples/s, {_ms(profile.seconds)} ms a step"
    facts = [
        ["pace", pace],
        ["with one batch at hand", f"{profile.rows / profile.cached:.4g} samples/s, {_ms(profile.cached)} ms a step: "
                                   f"headspace {profile.headspace:.2f}"],
    ]  # fmt: skip
    if profile.flops is not None:
        speed = profile.flops * profile.rows / profile.seconds / setting.world / 1e12
        part = f", {speed / setting.peak:.0%} of the {setting.peak:g} it could do" if setting.peak else ""
        facts.append(["arithmetic", f"{profile.flops / 1e9:.3g} GFLOP a sample, {speed:.3g} TFLOP/s a rank{part}"])
    facts.append(["memory", f"{gigabytes(profile.use.peak)} at most, of {gigabytes(profile.use.total)}"])
    if setting.device.type == "cuda":
        waits = ", ".join(f"{name} {count}" for name, count in profile.waits.items()) or "none"
        facts += [
            ["kernel launches a step", f"{profile.launches:.0f}; the GPU is busy {_ms(profile.busy)} ms"],
            ["waits of the host a step", f"{waits}; of these {profile.reads:.3g} for a number ({READ})"],
        ]
    return facts


def _stretches(profile: Profile) -> Rows:
    rows = [[name, profile.stretches[name]] for name in STRETCHES]
    rows += [["of these, collectives", profile.stretches["collectives"]]]
    return [[name, _ms(seconds), f"{seconds / profile.seconds:.0%}"] for name, seconds in rows]


def _most(profile: Profile) -> Sequence[Operator]:
    return profile.operators[:LISTED]


def _operator(operator: Operator, profile: Profile) -> list[str]:
    name = operator.name if len(operator.name) <= WIDTH else f"{operator.name[: WIDTH - 3]}..."
    calls = f"{operator.calls:.0f}" if operator.calls >= 1 else f"{operator.calls:.2g}"
    return [name, _ms(operator.seconds), f"{operator.seconds / profile.busy:.0%}", calls]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"
