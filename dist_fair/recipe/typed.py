"""The schema of a recipe as OmegaConf: files and overrides are merged into it one by one, so that errors name them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dist_fair.errors import DistFairError, nearest
from dist_fair.recipe.cards import refuse_targets
from dist_fair.recipe.resolved import flatten, inline
from dist_fair.recipe.schema import Recipe, Tape


class Schema:
    """The keys of a recipe and their types. interventions: name -> dataclass of its settings."""

    def __init__(self, interventions: Mapping[str, type]):
        self._interventions = dict(interventions)
        self._recipe = OmegaConf.structured(Recipe)  # takes 30 ms; merging copies it
        self.keys = dict(_keys(Recipe, ""))
        for name, kind in interventions.items():
            self.keys.update(_keys(kind, f"interventions.{name}."))

    def typed(self, content: Mapping[str, Any]) -> DictConfig:
        """Defaults overlaid with `content`, typed throughout. Interventions that are null are left out."""
        rest = {name: value for name, value in content.items() if name != "interventions"}
        config = OmegaConf.merge(self._recipe, rest)
        chosen = content.get("interventions", {})
        if not isinstance(chosen, Mapping):
            raise DistFairError(f"interventions={inline(chosen)}: expected NAME: settings, a mapping")
        for name, settings in chosen.items():
            if settings is None:
                continue
            if not isinstance(settings, Mapping):
                raise DistFairError(f"interventions.{name}={inline(settings)}: expected a mapping of settings")
            config.interventions[name] = OmegaConf.merge(self.intervention(name), settings)
        return config

    def intervention(self, name: str) -> DictConfig:
        """The default settings of an intervention."""
        if name not in self._interventions:
            raise DistFairError(f"interventions.{name}: no such intervention: {nearest(name, [*self._interventions])}")
        return OmegaConf.structured(self._interventions[name])

    def check(self, content: Mapping[str, Any], source: str) -> None:
        """Raises DistFairError for an unknown key or a value of the wrong type in `content`, found in `source`."""
        try:
            self.typed(content)
        except (OmegaConfBaseException, DistFairError) as error:
            for key, value in flatten(content).items():
                self._check_one(key, value, source)
            raise DistFairError(f"{source}: {error}") from None

    def _check_one(self, key: str, value: Any, source: str) -> None:
        try:
            self.typed(nest(key, value))
        except ConfigKeyError:
            raise DistFairError(f"{source}: unknown key {key}: {self.suggestion(key)}") from None
        except OmegaConfBaseException:
            raise DistFairError(f"{source}: {key}={inline(value)}: expected {self.expected(key)}") from None
        except DistFairError as error:
            raise DistFairError(f"{source}: {error}") from None

    def describe(self) -> Iterator[tuple[str, str]]:
        """("key=default", meaning and type) of every key."""
        for key, field in self.keys.items():
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            choices = [inline(choice) for choice in field.metadata.get("choices", ())]
            kind = " | ".join(choices) if choices else in_words(field.type)
            yield f"{key}={inline(default)}", f"{field.metadata.get('meaning', '')} ({kind})".strip()

    def expected(self, key: str) -> str:
        """What a key takes, in words of YAML."""
        key = re.sub(r"^data\.tapes\.[^.]+", "data.tapes.NAME", key)
        if key in self.keys:
            return in_words(self.keys[key].type)
        parent = key.rpartition(".")[0]
        if parent in self.keys and get_origin(self.keys[parent].type) is dict:
            return in_words(get_args(self.keys[parent].type)[1])
        return "settings under it: a mapping" if parent not in self.keys else in_words(self.keys[parent].type)

    def suggestion(self, key: str) -> str:
        """What an unknown key may have meant: the same last word elsewhere, or the nearest spelling."""
        section, _, last = key.rpartition(".")
        if same := [known for known in self.keys if known.rpartition(".")[2] == last]:
            return f"did you mean {' or '.join(same)}?"
        siblings = [known for known in self.keys if known.rpartition(".")[0] == section]
        close = nearest(key, [*self.keys])
        if close.startswith("known"):
            close = nearest(key, siblings) if section and siblings else "`dist-fair recipes keys` lists all keys"
        return close

    def apply(self, override: Override, config: DictConfig) -> dict[str, str]:
        """Carries out `a.b=c`, `+a.b=c` or `~a.b` on `config`; returns the origins of what it set."""
        key, value, text = override.key_or_group, override.value(), override.input_line
        parent, _, name = key.rpartition(".")
        if override.is_delete():
            _remove(config, parent, name, text, self)
            return {}
        refuse_targets(nest(key, value), "command line")
        self.check(nest(key, value), "command line")
        adds = override.is_add() or override.is_force_add()
        if parent == "interventions" and value is None:
            config.interventions.pop(name, None)
            return {}
        if key.startswith("interventions.") and adds and (named := key.split(".")[1]) not in config.interventions:
            config.interventions[named] = self.intervention(named)
        if not adds and not _present(config, key):
            raise DistFairError(f"{text}: this recipe has no {key}; to add it: +{text}")
        config.merge_with(nest(key, value))
        return dict.fromkeys(flatten(nest(key, value)), "command line")


def nest(key: str, value: Any) -> dict[str, Any]:
    """ "a.b" and value -> {"a": {"b": value}}."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def in_words(kind: Any) -> str:
    """A type in words of YAML: "int or null", "[float, ...]", "{name: [str, ...]}"."""
    if get_origin(kind) is list:
        return f"[{in_words(get_args(kind)[0])}, ...]"
    if get_origin(kind) is dict:
        return f"{{name: {in_words(get_args(kind)[1])}}}"
    if get_args(kind):
        return " or ".join(in_words(one) for one in get_args(kind))
    if dataclasses.is_dataclass(kind):
        return f"{{{', '.join(field.name for field in dataclasses.fields(kind))}}}"
    return {Any: "value", type(None): "null"}.get(kind) or kind.__name__


def _keys(kind: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted key, field) of every setting of a dataclass; entries of data.tapes go by the name NAME."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _keys(field.type, f"{prefix}{field.name}.")
            continue
        yield f"{prefix}{field.name}", field
        if field.type == dict[str, Tape]:
            yield from _keys(Tape, f"{prefix}{field.name}.NAME.")


def _present(config: DictConfig, key: str) -> bool:
    node: Any = config
    for name in key.split("."):
        if not OmegaConf.is_dict(node) or name not in node.keys():  # noqa: SIM118  (`in node` hides null values)
            return False
        node = node._get_node(name)
    return True


def _remove(config: DictConfig, parent: str, name: str, text: str, schema: Schema) -> None:
    """Removes an entry of a free mapping: an intervention, an attribute, a tape, an argument."""
    key = f"{parent}.{name}".removeprefix(".")
    if not _present(config, key):
        raise DistFairError(f"{text}: this recipe has no {key}")
    section = OmegaConf.select(config, parent) if parent else config
    if OmegaConf.get_type(section) is not dict:
        raise DistFairError(f"{text}: {key} is part of every recipe and cannot be removed; set it: {key}=...")
    del section[name]
