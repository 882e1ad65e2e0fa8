"""The schema of a recipe as OmegaConf: files and overrides are merged into it one by one, so that errors name them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dist_fair.errors import DistFairError, nearest
from dist_fair.recipe import Recipe, Tape
from dist_fair.resolved import flatten, inline


class Schema:
    """The keys of a recipe and their types. interventions: name -> dataclass of its settings."""

    def __init__(self, interventions: Mapping[str, type]):
        self._interventions = dict(interventions)
        self.keys = dict(_keys(Recipe, ""))
        for name, kind in interventions.items():
            self.keys.update(_keys(kind, f"interventions.{name}."))

    def typed(self, content: Mapping[str, Any]) -> DictConfig:
        """Defaults overlaid with `content`, typed throughout. Interventions that are null are left out."""
        rest = {name: value for name, value in content.items() if name != "interventions"}
        config = OmegaConf.merge(OmegaConf.structured(Recipe), rest)
        for name, settings in (content.get("interventions") or {}).items():
            if settings is not None:
                config.interventions[name] = OmegaConf.merge(self.intervention(name), settings)
        return config

    def intervention(self, name: str) -> DictConfig:
        """The default settings of an intervention."""
        if name not in self._interventions:
            raise DistFairError(f"interventions.{name}: no such intervention: {nearest(name, [*self._interventions])}")
        return OmegaConf.structured(self._interventions[name])

    def check(self, content: Mapping[str, Any], source: str) -> None:
        """Raises DistFairError for an unknown key or a value of the wrong type in `content`, found in `source`."""
        for key, value in flatten(content).items():
            try:
                self.typed(nest(key, value))
            except ConfigKeyError:
                raise DistFairError(f"{source}: unknown key {key}: {self.suggestion(key)}") from None
            except OmegaConfBaseException:
                raise DistFairError(f"{source}: {key}={inline(value)}: expected {self.expected(key)}") from None
            except DistFairError as error:
                raise DistFairError(f"{source}: {error}") from None

    def expected(self, key: str) -> str:
        """The type of a key, or of the section that it lies in, in words of YAML."""
        while key not in self.keys and "." in key:
            key = key.rpartition(".")[0]
        field = self.keys.get(key)
        return describe(field) if field else "a section: settings under it have their own keys"

    def suggestion(self, key: str) -> str:
        """What an unknown key may have meant: the same last word elsewhere, or the nearest spelling."""
        last = key.rpartition(".")[2]
        same = [known for known in self.keys if known.rpartition(".")[2] == last]
        if same:
            return f"did you mean {' or '.join(same)}?"
        section = key.rpartition(".")[0]
        siblings = [known for known in self.keys if known.rpartition(".")[0] == section]
        return nearest(key, siblings or [*self.keys])

    def apply(self, override: Override, config: DictConfig) -> dict[str, str]:
        """Carries out `a.b=c`, `+a.b=c` or `~a.b` on `config`; returns the origins of what it set."""
        key, value, text = override.key_or_group, override.value(), override.input_line
        parent, _, name = key.rpartition(".")
        if override.is_delete():
            _remove(config, parent, name, text, self)
            return {}
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


def describe(field: dataclasses.Field) -> str:
    """The type of a field in words of YAML: "int or null"."""
    kind = field.type
    text = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", ()) else str(kind)
    return text.replace("typing.", "").replace("None", "null").replace(" | ", " or ")


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
