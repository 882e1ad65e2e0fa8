"""A recipe as it came out: typed, with where each value came from, printable, comparable."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dist_fair.recipe.schema import FREE, Recipe

# Mappings whose order is part of the experiment: interventions act, and tapes fill a batch, in the order of the recipe.
_ORDERED = ("interventions", "data.tapes", "data.attributes")


@dataclass(frozen=True)
class Resolved:
    """A whole recipe.

    recipe: typed. values: the same as plain nested dicts. provenance: dotted key -> "default", a file, "command line".
    """

    recipe: Recipe
    values: dict[str, Any]
    provenance: dict[str, str]

    def yaml(self) -> str:
        """The recipe as YAML, each value with where it came from as a comment: what a run keeps as recipe.yaml."""
        return "\n".join(
            ["# The resolved recipe, and where each value came from.", *self._lines(self.values, "", 0), ""]
        )

    def _lines(self, values: Mapping[str, Any], prefix: str, depth: int) -> list[str]:
        lines = []
        for name, value in values.items():
            key, start = f"{prefix}{name}", f"{'  ' * depth}{inline(name)}:"
            if isinstance(value, dict) and value:
                lines += [start, *self._lines(value, f"{key}.", depth + 1)]
            else:
                source = " ".join(self.provenance.get(key, "default").split())
                lines.append(f"{start} {inline(value)}  # {source}")
        return lines

    def trajectory(self) -> dict[str, Any]:
        """Dotted key -> value of all that shapes the trained detector, which `schema.FREE` and `inference` do not."""
        idle = (*FREE, *self.inference())
        kept = {key: value for key, value in flatten(self.values).items()
                if not any(key == free or key.startswith(f"{free}.") for free in idle)}  # fmt: skip
        for key in _ORDERED:
            section: Any = self.values
            for name in key.split("."):
                section = section[name]
            kept[key] = list(section)
        return kept

    def inference(self) -> dict[str, Any]:
        """Dotted key -> value of the interventions' settings that only matter in evaluation, marked in their fields."""
        return {
            f"interventions.{name}.{field.name}": getattr(settings, field.name)
            for name, settings in self.recipe.interventions.items()
            for field in dataclasses.fields(settings)
            if field.metadata.get("inference")
        }

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of trajectory and inference: with the same one two runs give the same scores."""
        return hashlib.sha256(json.dumps(self.trajectory() | self.inference(), sort_keys=True).encode()).hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {dotted key: value}. Lists and empty dicts are values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat.update(flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value})
    return flat


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two trajectories, as "key: value of the first, value of the second", in key order."""
    absent = object()
    found = []
    for key in sorted({*first, *second}):
        one, other = first.get(key, absent), second.get(key, absent)
        if one != other:
            found.append(
                f"{key}: {', '.join('absent' if value is absent else inline(value) for value in (one, other))}"
            )
    return found


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
