"""What recipes may say in detector.arguments of pg_fdd, checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from dist_fair.errors import DistFairError, nearest

PLACE = "detector.arguments"
_Kind = TypeVar("_Kind")


def _argument(default: object, allowed: str, check: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"allowed": allowed, "check": check})


def _choice(default: str, *others: str) -> Any:
    choices = (default, *others)
    return _argument(default, " or ".join(choices), lambda value: isinstance(value, str) and value in choices)


def _rate(default: float) -> Any:
    return _argument(default, "a rate, at least 0 and below 1",
                     lambda value: type(value) in (int, float) and 0 <= value < 1)  # fmt: skip


@dataclass(frozen=True)
class HeadArguments:
    """Of all heads: dropout rate, what is dropped (the released code drops logits), width of the hidden layer."""

    dropout: float = _rate(0.2)
    dropout_on: str = _choice("features", "logits")
    hidden: int = _argument(512, "a number of channels", lambda value: type(value) is int and value > 0)


@dataclass(frozen=True)
class DecoderArguments:
    """dropout: rate, in each stage of the decoder."""

    dropout: float = _rate(0.3)


@dataclass(frozen=True)
class Arguments:
    """detector.arguments of pg_fdd. All that is not here goes to the backbone.

    backbone: a timm model, of each encoder. width: channels of F, C and D. fusion: none leaves f_share as it is.
    pooling: rectified, the mean over positions of the leaky ReLU; average, of the map itself, so that fusion cancels.
    """

    backbone: str = _argument("", "a timm model", lambda value: isinstance(value, str) and value != "")
    width: int = _argument(512, "a multiple of 8", lambda value: type(value) is int and value > 0 and value % 8 == 0)
    fusion: str = _choice("adain", "none")
    pooling: str = _choice("rectified", "average")
    heads: HeadArguments = field(default=HeadArguments())
    decoder: DecoderArguments = field(default=DecoderArguments())


def chosen_arguments(given: Mapping[str, object]) -> tuple[Arguments, dict[str, object]]:
    """The arguments among those given, and the others. Raises DistFairError for a value that they cannot have."""
    names = {entry.name for entry in fields(Arguments)}
    own = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    return _read(Arguments, {"backbone": None} | own, PLACE), others


def _read(kind: type[_Kind], given: object, place: str) -> _Kind:
    """A dataclass of arguments from a mapping, checked."""
    if not isinstance(given, Mapping):
        raise DistFairError(f"{place}={given}: a mapping of {', '.join(entry.name for entry in fields(kind))}")
    known = {entry.name: entry for entry in fields(kind)}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise DistFairError(f"{place}.{name}: no such argument: {nearest(str(name), [*known])}")
        checks = known[name].metadata
        if not checks:
            value = _read(known[name].type, value, f"{place}.{name}")
        elif not checks["check"](value):
            raise DistFairError(f"{place}.{name}={value}: {checks['allowed']}")
        values[name] = value
    return kind(**values)
