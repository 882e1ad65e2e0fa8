"""What a sample's metadata says (label, video, identity, manipulation, attributes), read the same way everywhere."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_fair.errors import DistFairError

# What counts as no value, in lower case. "unknown" as in dist_fair.demographics; the others are how tables are written.
MISSING = ("", "unknown", "nan", "none", "null")


@dataclass(frozen=True)
class Fields:
    """The names of the metadata's fields. attributes: None takes what the object "attributes" holds.

    A named attribute is looked up in the object "attributes" first, then beside it.
    """

    label: str = "label"
    video: str = "video"
    identity: str = "identity"
    manipulation: str = "manipulation"
    attributes: tuple[str, ...] | None = None

    def options(self) -> list[str]:
        """The command-line options that say the same."""
        given = [(name, getattr(self, name)) for name in ("label", "video", "identity", "manipulation")]
        options = [word for name, value in given if value != name for word in (f"--{name}-field", value)]
        return [*options, "--attributes", ",".join(self.attributes)] if self.attributes is not None else options


@dataclass(frozen=True)
class Record:
    """One sample's metadata, checked. manipulation is None for real samples."""

    label: int
    video: str | None
    identity: str | None
    manipulation: str | None
    attributes: Mapping[str, str]

    def metadata(self) -> dict[str, Any]:
        """The object for a shard's .json: what is known, and the label."""
        named = {"video": self.video, "identity": self.identity, "manipulation": self.manipulation}
        known = {name: value for name, value in named.items() if value is not None}
        return {"label": self.label, **known, "attributes": dict(self.attributes)}

    def video_name(self, key: str) -> str:
        """The unique name of the sample's video: a fake and the real video that it was made from differ."""
        return f"{(self.manipulation or 'fake') if self.label else 'real'}/{self.video or key}"


def text_of(value: Any, place: str) -> str | None:
    """A metadata value as a string; None for a missing one (None, NaN, and the texts of MISSING in any case).

    A whole float is written without its point: tables turn a column of whole numbers with gaps into floats.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise DistFairError(f"{place}: {value!r} is no plain value; give a string or a number")
    text = str(value).strip()
    return None if text.lower() in MISSING else text


def label_of(value: Any, place: str) -> int:
    """0 (real) or 1 (fake) from a number or its text; DistFairError for everything else."""
    text = text_of(value, place)
    if text is None:
        raise DistFairError(f"{place}: no label; give 0 (real) or 1 (fake)")
    if isinstance(value, bool) or text not in ("0", "1"):
        raise DistFairError(f"{place}: label {value!r}; it must be 0 (real) or 1 (fake)")
    return int(text)


def record_of(found: Mapping[str, Any], cls: bytes | None, fields: Fields, place: str) -> Record:
    """A sample's record from its .json (empty where it has none) and, for a label that is not there, its .cls."""
    value = found.get(fields.label)
    if value is None and cls is not None:
        value = cls.decode("ascii", errors="replace").strip()
    nested = found.get("attributes")
    nested = nested if isinstance(nested, dict) else {}
    label = label_of(value, f"{place}, field '{fields.label}'")

    def text(name: str, source: Mapping[str, Any]) -> str | None:
        return text_of(source.get(name), f"{place}, field '{name}'")

    manipulation = text(fields.manipulation, found) if label else None
    if manipulation is not None and manipulation.lower() == "real":
        raise DistFairError(f"{place}: label 1 (fake), but manipulation '{manipulation}': one of them is wrong")
    names = tuple(nested) if fields.attributes is None else fields.attributes
    values = {name: text(name, nested if name in nested else found) for name in names}
    return Record(
        label=label,
        video=text(fields.video, found),
        identity=text(fields.identity, found),
        manipulation=manipulation,
        attributes={name: value for name, value in values.items() if value is not None},
    )
