"""The YAML files that people write: recipes, cards of data sets (shards/), cards of detectors (recipes/detector/)."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_fair.errors import DistFairError, nearest

# Group of the command line -> where its shipped files lie.
GROUPS = {"recipe": "recipes", "data": "shards", "detector": "recipes/detector"}


@dataclass(frozen=True)
class Card:
    """One file.

    name: under which Hydra knows it. source: as people know it, "recipes/erm.yaml" or the path they gave.
    defaults: Hydra's list of the files it builds on. content: the settings, from the root of the recipe.
    """

    group: str
    name: str
    source: str
    defaults: list[Any]
    content: dict[str, Any]


def shipped(folder: str) -> Path:
    """A folder that travels with the package: inside it where installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_shipped" / folder
    return inside if inside.is_dir() else package.parent / folder


def names(group: str) -> list[str]:
    """Names of the shipped files of a group."""
    return sorted(path.stem for path in shipped(GROUPS[group]).glob("*.yaml"))


@functools.cache
def shipped_cards() -> tuple[Card, ...]:
    """All shipped files of all groups."""
    return tuple(read_card(group, shipped(folder) / f"{name}.yaml", f"{folder}/{name}.yaml", name)
            for group, folder in GROUPS.items() for name in names(group))  # fmt: skip


def own_card(group: str, choice: str) -> Card | None:
    """The user's own file behind `group=path/to/file.yaml`; None if `choice` is a shipped name."""
    if "/" in choice or choice.endswith((".yaml", ".yml")):
        return read_card(group, Path(choice), choice, "own_" + re.sub(r"\W", "_", Path(choice).stem))
    if choice not in names(group):
        kind = group if group == "recipe" else f"{group} card"
        hint = {
            "recipe": "your own: recipe=path/to/file.yaml",
            "data": "your own: data=path/to/card.yaml",
            "detector": "any timm model: detector.name=NAME; your own card: detector=path/to/card.yaml",
        }[group]
        raise DistFairError(f"{group}={choice}: no such {kind}: {nearest(choice, names(group))} ({hint})")
    return None


def read_card(group: str, path: Path, source: str, name: str) -> Card:
    """Reads a file; keys and types are checked against the schema by dist_fair.recipe.typed."""
    content = read_yaml(path, source)
    defaults = content.pop("defaults", [])
    if not isinstance(defaults, list):
        raise DistFairError(f"{source}: defaults={defaults}: a list, such as [sfd_gda, override /detector: small]")
    if group == "recipe" and "recipe" in content:
        raise DistFairError(
            f"{source}: recipe={content['recipe']}: a recipe is named by its file; remove this line "
            "(a run's recipe.yaml is what came out: start from the recipe it names)"
        )
    content = {**content, "recipe": path.stem} if group == "recipe" else {group: content}
    return Card(group, name, source, defaults, content)


def read_yaml(path: Path, source: str) -> dict[str, Any]:
    """A YAML mapping as plain dicts and lists. Interpolations stay text; tags that would make objects are refused."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise DistFairError(f"{source} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise DistFairError(f"{source} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise DistFairError(f"{source}: a mapping of settings is expected, such as `seed: 1`")
    refuse_targets(content, source)
    return content


def refuse_targets(content: Any, source: str, prefix: str = "") -> None:
    """Recipes hold settings: nothing in them names code to run."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        if str(name) == "_target_":
            raise DistFairError(f"{source}: {prefix}{name}: recipes hold settings and name no code; remove it")
        refuse_targets(value, source, f"{prefix}{name}.")
