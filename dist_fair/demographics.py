"""Attributes (gender, race, ...) and the groups they form.

An attribute value is a string; -1 is the code of an unknown one. Groups are the product of the values of one or more
attributes, the last attribute running fastest: ("gender", "race") gives female/Asian, female/Black, ..., male/White.
A sample with any unknown value belongs to no group (code -1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from dist_fair.errors import DistFairError, nearest

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Groups:
    """The groups of one or several attributes.

    attributes: their names, e.g. ("gender", "race"); values: the known values of each, in code order.
    """

    attributes: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, attributes: Sequence[str], vocabulary: Mapping[str, Sequence[str]]) -> "Groups":
        """Groups of `attributes`; `vocabulary` lists the values of every attribute the data has.

        Raises DistFairError for an attribute that the data lacks or that is named twice, or for none at all.
        """
        if not attributes or len(set(attributes)) != len(attributes):
            raise DistFairError(f"attributes={list(attributes)}: name at least one attribute, each once")
        for attribute in attributes:
            if attribute not in vocabulary:
                raise DistFairError(f"attribute '{attribute}' is not in the data: {nearest(attribute, [*vocabulary])}")
        return cls(tuple(attributes), tuple(tuple(vocabulary[attribute]) for attribute in attributes))

    @property
    def names(self) -> tuple[str, ...]:
        """One name per group code, values joined by '/'."""
        return tuple("/".join(combination) for combination in product(*self.values))

    @property
    def label(self) -> str:
        """The name of the attribute set: 'gender', or 'gender x race'."""
        return " x ".join(self.attributes)

    def __len__(self) -> int:
        return math.prod([len(values) for values in self.values])

    def codes(self, columns: Mapping[str, np.ndarray] | Mapping[str, torch.Tensor]):
        """Group code of each sample, (B,), from the attribute codes (B,); -1 where any attribute is unknown.

        Works on NumPy arrays and on tensors of any device. Of a single attribute it is that column itself.
        """
        codes, *others = self.columns(columns)
        if not others:
            return codes
        library, lowest = torch if isinstance(codes, torch.Tensor) else np, codes
        for column, values in zip(others, self.values[1:], strict=True):
            codes = codes * len(values) + column
            lowest = library.minimum(lowest, column)
        return library.where(lowest < 0, lowest, codes)

    def columns(self, columns: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Those of the columns that are of its attributes, in their order: the place of each sample in a `table`."""
        return tuple(columns[attribute] for attribute in self.attributes)

    def table(self, rows: np.ndarray) -> np.ndarray:
        """Rows (G + 1, ...), one for each group and a last one for samples of none, by the codes of all attributes.

        (V_1 + 1, ..., V_K + 1, ...): indexed with `columns` it gives the row of every sample at once. On a GPU that is
        one kernel, where the group codes alone take several.
        """
        codes = combinations([len(values) for values in self.values])
        return rows[self.codes(dict(zip(self.attributes, codes, strict=True)))]


def combinations(sizes: Sequence[int]) -> list[np.ndarray]:
    """Every combination of the codes of some columns that have so many values, each (V_1 + 1, ..., V_K + 1) int64.

    Along axis k column k runs through its codes, and at last through -1, the unknown: where an index of -1 looks.
    """
    return list(np.meshgrid(*(np.append(np.arange(size), -1) for size in sizes), indexing="ij"))


def attribute_sets(attributes: Sequence[str]) -> list[tuple[str, ...]]:
    """What fairness is reported over: each attribute alone, then, if there are several, their intersection."""
    singles = [(attribute,) for attribute in attributes]
    return [*singles, tuple(attributes)] if len(attributes) > 1 else singles
