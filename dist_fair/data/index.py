"""The index of a folder of shards: where every sample lies and what it is, known before anything is read.

An index is columnar (one NumPy array per field, strings dictionary-encoded), so a million samples load in about a
second and cost tens of megabytes. `dist_fair.data.indexing` makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_fair.errors import DistFairError, nearest

INDEX_COMMAND = "dist-fair shards index"


@dataclass(frozen=True, eq=False)
class Column:
    """A column of strings: `values` are the distinct ones, `codes` (N,) int32 points into them, -1 for none."""

    values: tuple[str, ...]
    codes: np.ndarray

    @classmethod
    def unknown(cls, count: int) -> "Column":
        """A column in which no sample has a value."""
        return cls((), np.full(count, -1, dtype=np.int32))

    @classmethod
    def concatenate(cls, columns: Sequence["Column"]) -> "Column":
        """The columns one below the other, over their merged values (sorted)."""
        values = tuple(sorted({value for column in columns for value in column.values}))
        return cls(values, np.concatenate([column.recoded(values) for column in columns]))

    def recoded(self, values: Sequence[str]) -> np.ndarray:
        """The codes (N,) int32 under another list of values; a value that is not listed becomes -1."""
        code_of = {value: code for code, value in enumerate(values)}
        table = np.array([*(code_of.get(value, -1) for value in self.values), -1], dtype=np.int32)
        return table[self.codes]  # code -1 picks the last entry, which is -1

    def compacted(self) -> "Column":
        """The same column with the values that occur, sorted."""
        used = np.unique(self.codes[self.codes >= 0])
        values = tuple(sorted(self.values[code] for code in used))
        return Column(values, self.recoded(values))


@dataclass(frozen=True)
class Shard:
    """One tar file: path relative to its folder, size in bytes, BLAKE2b-128 of the whole file in hex."""

    path: str
    size: int
    checksum: str


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one folder of shards, or of several concatenated; N samples in S shards.

    Samples are in canonical order: folder after folder, shards by name, samples as they lie in the tar.

    names, folders: dataset name and absolute path of each folder. shard_folders: (S,) int32 into folders.
    keys: (N,) str, unique in a folder. labels: (N,) int8, 0 real, 1 fake. attributes: name -> Column.
    videos: "MANIPULATION/VIDEO" for fakes, "fake/VIDEO" for those without manipulation, "real/VIDEO" for reals, where
    VIDEO is the key if no video was given. identities: as given. manipulations: of fakes, -1 where none was given.
    Names of videos and identities mean the same thing in all folders of one index.
    shard: (N,) int32 into shards. image_offset, image_size: (N,) int64 bytes. image_crc: (N,) uint32, zlib's crc32.
    width, height: (N,) int32 pixels, 0 where the image's header cannot be read.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    shards: tuple[Shard, ...]
    shard_folders: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    attributes: Mapping[str, Column]
    videos: Column
    identities: Column
    manipulations: Column
    shard: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    image_crc: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def concatenate(cls, indexes: Sequence["Index"]) -> "Index":
        """One index over several, samples in the order given; an attribute that a folder lacks is unknown there."""
        if not indexes:
            raise DistFairError("no dataset to read: name at least one folder of shards")
        if len(indexes) == 1:
            return indexes[0]

        def stacked(name: str) -> np.ndarray:
            return np.concatenate([getattr(index, name) for index in indexes])

        def column(name: str) -> Column:
            return Column.concatenate([getattr(index, name) for index in indexes])

        def shifted(name: str, target: str) -> np.ndarray:
            starts = np.cumsum([0, *(len(getattr(index, target)) for index in indexes)])
            parts = [getattr(index, name) + start for index, start in zip(indexes, starts[:-1], strict=True)]
            return np.concatenate(parts).astype(np.int32)

        def attribute(name: str) -> Column:
            return Column.concatenate([index.attributes.get(name) or Column.unknown(len(index)) for index in indexes])

        plain = ("keys", "labels", "image_offset", "image_size", "image_crc", "width", "height")
        return cls(
            names=tuple(name for index in indexes for name in index.names),
            folders=tuple(folder for index in indexes for folder in index.folders),
            shards=tuple(shard for index in indexes for shard in index.shards),
            shard_folders=shifted("shard_folders", "folders"),
            shard=shifted("shard", "shards"),
            attributes={name: attribute(name) for index in indexes for name in index.attributes},
            **{name: column(name) for name in ("videos", "identities", "manipulations")},
            **{name: stacked(name) for name in plain},
        )

    def place(self, sample: int) -> str:
        """Where a sample lies, for error texts: "KEY in FOLDER/00003.tar at byte 1536"."""
        shard = self.shard[sample]
        folder = self.folders[self.shard_folders[shard]]
        return f"{self.keys[sample]} in {folder}/{self.shards[shard].path} at byte {self.image_offset[sample]}"

    def with_values(self, attributes: Mapping[str, Sequence[str]]) -> "Index":
        """The index with only the declared attributes, their values in the declared order.

        A value that is not declared becomes unknown (-1); an empty list declares every value found, sorted. Raises
        DistFairError where a folder has no known value of a declared attribute.
        """
        columns = {}
        for name, values in attributes.items():
            column = self._attribute(name)
            kept = tuple(values) or column.compacted().values
            columns[name] = Column(kept, column.recoded(kept))
        return replace(self, attributes=columns)

    def _attribute(self, name: str) -> Column:
        column = self.attributes.get(name)
        known = np.zeros(len(self.folders), dtype=bool)
        if column is not None:
            known[self.shard_folders[self.shard[column.codes >= 0]]] = True
        if not known.all():
            folder = self.folders[int(np.argmin(known))]
            others = [other for other in self.attributes if other != name]
            raise DistFairError(
                f"no sample of {folder} has attribute '{name}': {nearest(name, others)} "
                f"(or index it with that field: {INDEX_COMMAND} {folder} --attributes {name},...)"
            )
        return column
