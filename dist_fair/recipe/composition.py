"""From a command line to a recipe: Hydra composes files and parses overrides, the typed schema takes what comes out.

    recipe=sfd_gda data=demo      choices: the data card, the detector card, then the recipe, over the schema's defaults
    a.b=c +a.b=c ~a.b             overrides, in order: change a setting, add an entry, remove an entry

A recipe may build on others by Hydra's defaults list: `defaults: [sfd_gda, {override /detector: resnet50}]`. In a
file, `interventions: {NAME: null}` leaves out one that it would inherit.
"""

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_fair.errors import DistFairError
from dist_fair.recipe import cards
from dist_fair.recipe.cards import Card
from dist_fair.recipe.checks import check
from dist_fair.recipe.resolved import Resolved, differences, flatten, inline
from dist_fair.recipe.schema import FREE
from dist_fair.recipe.typed import Schema


def load(arguments: Sequence[str], interventions: Mapping[str, type]) -> Resolved:
    """The recipe of a command line. interventions: name -> dataclass of its settings.

    train.steps or train.epochs on the command line replaces the other one if that came from a file; a detector.name
    outside the chosen card drops the card's detector.arguments.
    Raises DistFairError for unknown names and keys, wrong types and values, and settings without effect.
    """
    choices, overrides = _parse(arguments)
    schema = _schema(tuple(interventions.items()))
    library, chosen = _library(choices)
    composed, origins = _composed(library, chosen)
    try:
        config = schema.typed(composed)
    except (OmegaConfBaseException, DistFairError) as error:
        for card in library:
            if card.source in origins.values():
                schema.check(card.content, card.source)
        raise DistFairError(f"{' '.join(chosen)}: the files do not fit together: {error}") from None
    for override in overrides:
        origins.update(schema.apply(override, config))
    _replace_length(config, origins)
    _drop_arguments(config, origins, library)
    resolved = _resolve(config, origins)
    _check_wandb(resolved)
    return resolved


def read(path: str | Path, interventions: Mapping[str, type], arguments: Sequence[str] = ()) -> Resolved:
    """A recipe.yaml that a run has left. Nothing in it is interpolated, looked up or executed.

    arguments: overrides that leave the trained detector as it is, such as data.eval; others raise DistFairError.
    """
    path = Path(path)
    content = cards.read_yaml(path, str(path))
    schema = _schema(tuple(interventions.items()))
    for key, value in flatten(content).items():
        if "${" in f"{key}{value}":
            raise DistFairError(f"{path}: {key}={value}: stored recipes are resolved; this file was changed by hand")
    schema.check(content, str(path))
    config, origins = schema.typed(content), dict.fromkeys(flatten(content), str(path))
    stored = _resolve(config, origins)
    choices, overrides = _parse(arguments)
    if choices:
        raise DistFairError(f"{' '.join(f'{key}={value}' for key, value in choices.items())}: {path} has its own; "
                            "name settings instead, such as data.root=... data.eval=[...]")  # fmt: skip
    for override in overrides:
        origins.update(schema.apply(override, config))
    changed = _resolve(config, origins)
    if different := differences(stored.trajectory(), changed.trajectory()):
        raise DistFairError(f"{'; '.join(different)}: part of how {path.parent} was trained; only settings beside that "
                            f"may change: {', '.join([*FREE, *stored.inference()])}")  # fmt: skip
    return changed


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[Override]]:
    """Choices of files, and overrides of settings, by Hydra's grammar."""
    choices: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            reason = str(error).partition("\n")[0]
            raise DistFairError(f"{argument}: key=value, +key=value or ~key is expected ({reason})") from None
        if not override.key_or_group:
            raise DistFairError(f"{argument}: key=value, +key=value or ~key is expected")
        if override.is_sweep_override():
            raise DistFairError(f"{argument}: one value a run; a list is written [a,b], a text with commas 'a,b'")
        if override.package is not None:
            raise DistFairError(f"{argument}: @package has no use here; write key=value")
        if override.key_or_group not in cards.GROUPS:
            overrides.append(override)
            continue
        group, choice = override.key_or_group, override.value()
        if override.is_delete() or override.is_add() or not isinstance(choice, str | int) or group in choices:
            raise DistFairError(f"{argument}: {group}=NAME or {group}=path/to/file.yaml, once")
        choices[group] = str(choice)
    return choices, overrides


def _library(choices: Mapping[str, str]) -> tuple[list[Card], list[str]]:
    """All files that may take part, and the choices as Hydra overrides."""
    if "recipe" not in choices:
        known = ", ".join(cards.names("recipe"))
        raise DistFairError(f"recipe=NAME is missing; known: {known}; your own: recipe=path/to/file.yaml")
    library, chosen = [*cards.shipped_cards()], []
    for group, choice in choices.items():
        own = cards.own_card(group, choice)
        library += [own] if own else []
        chosen.append(f"{group}={own.name if own else choice}")
    return library, chosen


@functools.lru_cache(maxsize=4)
def _schema(interventions: tuple[tuple[str, type], ...]) -> Schema:
    return Schema(dict(interventions))


_COMPOSITIONS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}


def _composed(library: Sequence[Card], chosen: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`_compose`, once for the same files and choices: the runs of a sweep share them, and it is half of `load`."""
    own = library[len(cards.shipped_cards()) :]
    key = repr((own, chosen))
    if key not in _COMPOSITIONS:
        _COMPOSITIONS[key] = _compose(library, chosen)
    values, origins = _COMPOSITIONS[key]
    return values, dict(origins)


def _compose(library: Iterable[Card], chosen: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Hydra's merge of the chosen files and those they build on, and dotted key -> the file that set it.

    In place of every value Hydra merges its number in a list of (value, file): the one that wins tells both.
    Leaves Hydra's global state as it was.
    """
    entries: list[tuple[Any, str]] = []

    def number(value: Any, source: str) -> Any:
        if isinstance(value, dict):
            return {name: number(item, source) for name, item in value.items()}
        entries.append((value, source))
        return len(entries) - 1

    def value_of(merged: Any) -> Any:
        return {key: value_of(item) for key, item in merged.items()} if isinstance(merged, dict) else entries[merged][0]

    nodes = [number(card.content, card.source) for card in library]
    before = Singleton.get_state()
    try:
        GlobalHydra.instance().clear()
        store = ConfigStore.instance()
        store.store("dist_fair", {"defaults": [{"data": "demo"}, {"detector": "small"}, {"recipe": "???"}]})
        for card, node in zip(library, nodes, strict=True):
            defaults = {"defaults": [*card.defaults, "_self_"]} if card.defaults else {}
            store.store(card.name, node | defaults, group=card.group, package="_global_")
        with initialize(version_base="1.3", config_path=None):
            merged = OmegaConf.to_container(compose("dist_fair", chosen))
    except (HydraException, OmegaConfBaseException) as error:
        raise DistFairError(f"{' '.join(chosen)}: the files do not compose: {' '.join(str(error).split())}") from None
    finally:
        Singleton.set_state(before)
    origins = {key: entries[item][1] for key, item in flatten(merged).items() if isinstance(item, int)}
    return value_of(merged), origins | {"recipe": "command line"}


def _replace_length(config: DictConfig, origins: dict[str, str]) -> None:
    """steps or epochs from the command line takes the place of the other from a file."""
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        asked = origins.get(f"train.{given}") == "command line" and config.train[given] is not None
        if asked and origins.get(f"train.{other}") != "command line":
            config.train[other] = None
            origins[f"train.{other}"] = f"command line, by train.{given}"
            return


def _drop_arguments(config: DictConfig, origins: Mapping[str, str], library: Iterable[Card]) -> None:
    """The arguments of a detector card belong to its detector: another detector.name does not inherit them."""
    detectors = {card.source for card in library if card.group == "detector"}
    if origins.get("detector.name") in detectors:
        return
    for name in [*config.detector.arguments]:
        key = f"detector.arguments.{name}"
        sources = {source for known, source in origins.items() if known == key or known.startswith(f"{key}.")}
        if sources <= detectors:
            del config.detector.arguments[name]


def _resolve(config: DictConfig, origins: Mapping[str, str]) -> Resolved:
    """Interpolations resolved, settings of interventions built, values checked; `config` stays as it is."""
    config = copy.deepcopy(config)
    try:
        OmegaConf.resolve(config)
        values = OmegaConf.to_container(config)
    except OmegaConfBaseException as error:
        raw = flatten(OmegaConf.to_container(config, resolve=False))
        texts = [f"{key}={value} ({origins.get(key, 'default')})" for key, value in raw.items() if "${" in str(value)]
        reason = str(error).partition("\n")[0]
        raise DistFairError(f"{'; '.join(texts)}: cannot be resolved: {reason}") from None
    flat = flatten(values)
    if unresolved := [key for key, value in flat.items() if "${" in str(value)]:
        raise DistFairError(f"{unresolved[0]}={flat[unresolved[0]]}: '${{' cannot be part of a value")
    provenance = {key: origins.get(key, "default") for key in flat}
    built = {name: _build(name, node) for name, node in config.interventions.items()}
    config.interventions = {}
    recipe = OmegaConf.to_object(config)
    recipe.interventions = built
    check(recipe, lambda key: f"{key}={inline(flat[key])} ({provenance[key]})")
    return Resolved(recipe, values, provenance)


def _build(name: str, node: DictConfig) -> Any:
    """The settings of one intervention, checked by its own dataclass."""
    try:
        return OmegaConf.to_object(node)
    except DistFairError as error:
        raise DistFairError(f"interventions.{name}: {str(error).removeprefix(f'{name}: ')}") from None


def _check_wandb(resolved: Resolved) -> None:
    """W&B settings asked for on the command line of a run that does not use W&B."""
    for key in ("wandb.project", "wandb.name", "wandb.tags"):
        if resolved.recipe.wandb.mode == "disabled" and resolved.provenance[key] == "command line":
            raise DistFairError(f"{key} has no effect with wandb.mode=disabled ({resolved.provenance['wandb.mode']})")
