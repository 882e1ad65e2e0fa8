"""A sweep's command line becomes settings with names, by Hydra's grammar for lists of values.

    optimizer.lr=0.1,0.3    two values        detector=small,small_deep    two cards        seed=0,1,2    three seeds
    a=range(1,4)            1, 2 and 3        a=[1,2],[3]                  two lists        a='x,y'       one text

Every combination is a setting, trained with every seed. A setting is named by what varies: "lr=0.1"; its run with seed
0 is "lr=0.1,seed=0". The name depends on which keys vary and on the run's own values, not on the others: with a longer
list of values the runs that were there keep their names.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from dist_fair.errors import DistFairError
from dist_fair.studies.runs import Run

LONGEST = 100  # letters of a name; file systems allow 255, W&B 128
ROWS = "setting"  # the column of a sweep file's named settings


@dataclass(frozen=True, eq=False)
class Setting:
    """One point of a sweep. row: its name in a sweep file, or "". varied: key -> value, as texts, of what varies.

    short: key -> as names have it. arguments: of its runs, but for the seed.
    """

    row: str
    varied: Mapping[str, str]
    short: Mapping[str, str]
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """As tables have it: "L_attr", "lr=0.1, weight=0.3"; what varies nowhere else is called after the recipe."""
        recipe = next((text for text in self.arguments if text.startswith("recipe=")), "")
        return ", ".join([*filter(None, [self.row]), *self._values(str)]) or recipe.removeprefix("recipe=")

    def run(self, out: Path, seed: str | None) -> Run:
        """Its run with a seed (None: the recipe's), in OUT/NAME."""
        extra = () if seed is None else (f"seed={seed}",)
        parts = [*filter(None, [slug(self.row)]), *self._values(slug), *extra]
        plain = ",".join(parts) or "run"
        exact = repr((self.row, *self.varied.items(), extra))
        if len(plain) > LONGEST or any(slug(value) != value for value in self.varied.values()):
            digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
            plain = f"{plain[:LONGEST]}-{digest}"
        return Run(out / plain, (*self.arguments, *extra))

    def _values(self, shown) -> list[str]:
        return [f"{self.short[key]}={shown(value)}" for key, value in self.varied.items()]


def expand(
    overrides: Sequence[str], rows: Mapping[str, Sequence[str]], further: Sequence[str]
) -> tuple[list[Setting], list[str | None]]:
    """The settings of a sweep and its seeds ([None] if none are given).

    overrides: a sweep file's, for all settings. rows: its named settings and their own overrides, {"": []} without.
    further: the command line's; they take the place of the file's. Raises DistFairError for what is no sweep.
    """
    shared, own = [parse(text) for text in overrides], [parse(text) for text in further]
    named = {name: [parse(text) for text in texts] for name, texts in rows.items()}
    for name, texts in named.items():
        for one in texts:
            if one.key_or_group in ("seed", "recipe", *(given.key_or_group for given in own)):
                raise DistFairError(f"{one.input_line} of the sweep's setting '{name}': {one.key_or_group} is the same "
                                    "for all settings, or theirs alone: leave it out in one place")  # fmt: skip
    layered = {name: _latest([*shared, *texts, *own]) for name, texts in named.items()}
    seeds = next(iter(layered.values())).pop("seed", None)
    keys = [key for texts in layered.values() for key in texts if texts[key].is_sweep_override() and key != "seed"]
    short = shortest(keys)
    settings = [
        Setting(name, varied, {key: short[key] for key in varied}, arguments)
        for name, texts in layered.items()
        for varied, arguments in _product({key: text for key, text in texts.items() if key != "seed"})
    ]
    return settings, [None] if seeds is None else _values(seeds)


def parse(text: str) -> Override:
    """An override by Hydra's grammar, which may list several values. Raises DistFairError for anything else."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).partition("\n")[0]
        raise DistFairError(f"{text}: key=value, +key=value or ~key is expected ({reason})") from None
    if not override.key_or_group:
        raise DistFairError(f"{text}: key=value, +key=value or ~key is expected")
    kind = override.value_type
    if kind in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP) or (
        override.is_delete() and override.is_sweep_override()
    ):
        raise DistFairError(f"{text}: a sweep goes over values that are listed: key=a,b or key=range(1,4)")
    if kind == ValueType.RANGE_SWEEP and not isinstance(override.value().range(), range):
        # Hydra's range(0.1,0.4,0.1) is 0.1, 0.2, 0.30000000000000004 and 0.4.
        raise DistFairError(f"{text}: a range of whole numbers, since fractions gather rounding errors: list them")
    return override


def one_value(override: Override) -> str:
    """The value of a key of which a sweep has one, as text."""
    if override.is_sweep_override() or override.type.name != "CHANGE" or override.value() is None:
        raise DistFairError(f"{override.input_line}: one value a sweep; a text with commas is written 'a,b'")
    return str(override.value())


def slug(text: str) -> str:
    """A text as a part of a file name: letters, digits, dots, plus and minus; the rest becomes "_"."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")


def shortest(keys: Iterable[str]) -> dict[str, str]:
    """Key -> the fewest of its last words that no other key ends in: a.x.weight, a.y.weight -> x.weight, y.weight."""
    keys = [*dict.fromkeys(keys)]
    found = {}
    for key in keys:
        words = key.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        found[key] = next(
            (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in keys if other != key)), key
        )
    return found


def _latest(overrides: Iterable[Override]) -> dict[str, Override]:
    """By key, in the order in which they act; of values given for the same key the last one stays."""
    found: dict[str, Override] = {}
    for one in overrides:
        key = f"~{one.key_or_group}" if one.is_delete() else one.key_or_group
        found.pop(key, None)
        found[key] = one
    return found


def _values(override: Override) -> list[str]:
    """The values of a key, as Hydra's grammar writes them, each once."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    values = [*override.sweep_string_iterator()]
    if not values:
        raise DistFairError(f"{override.input_line}: lists no value")
    for value in values:
        if values.count(value) > 1:
            raise DistFairError(f"{override.input_line}: {value} is listed twice")
    return values


def _product(overrides: Mapping[str, Override]) -> Iterable[tuple[dict[str, str], tuple[str, ...]]]:
    """What varies, and the arguments, of every combination."""
    varying = {key: _values(one) for key, one in overrides.items() if one.is_sweep_override()}
    for values in itertools.product(*varying.values()):
        chosen = dict(zip(varying, values, strict=True))
        yield (
            chosen,
            tuple(
                f"{one.get_key_element()}={chosen[key]}" if key in chosen else str(one.input_line)
                for key, one in overrides.items()
            ),
        )
