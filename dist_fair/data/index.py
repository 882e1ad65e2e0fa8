"""The index of a folder of shards: where every sample lies and what it is, known before anything is read.

An index is columnar (one NumPy array per field, strings dictionary-encoded), so a million samples load in about a
second and cost tens of megabytes. `dist_fair.data.indexing` makes it.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from dist_fair.data.storage import LocalStorage, Storage, replacing
from dist_fair.errors import DistFairError, nearest

INDEX_NAME = "index.parquet"
INDEX_FORMAT = 1
INDEX_COMMAND = "dist-fair shards index"
_METADATA = b"dist_fair"
_STRINGS = {"videos": "video", "identities": "identity", "manipulations": "manipulation"}
_NUMBERS = {
    "label": "labels",
    "shard": "shard",
    "image_offset": "image_offset",
    "image_size": "image_size",
    "image_crc": "image_crc",
    "width": "width",
    "height": "height",
}


@dataclass(frozen=True, eq=False)
class Column:
    """A column of strings: `values` are the distinct ones, `codes` (N,) int32 points into them, -1 for none."""

    values: tuple[str, ...]
    codes: np.ndarray

    @classmethod
    def of(cls, strings: Iterable[str | None] | pa.Array) -> "Column":
        """The column of N strings (None: no value), its values sorted by code point."""
        array = (
            strings if isinstance(strings, pa.DictionaryArray) else pa.array(strings, pa.string()).dictionary_encode()
        )
        order = pa.compute.sort_indices(array.dictionary).to_numpy()
        rank = np.empty(len(order) + 1, dtype=np.int32)
        rank[order], rank[-1] = np.arange(len(order)), -1
        codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return cls(tuple(array.dictionary.take(pa.array(order)).to_pylist()), rank[codes])

    def arrow(self) -> pa.DictionaryArray:
        """The same column for a Parquet table."""
        return pa.DictionaryArray.from_arrays(
            pa.array(self.codes, mask=self.codes < 0), pa.array(self.values, pa.string())
        )

    @classmethod
    def unknown(cls, count: int) -> "Column":
        """A column in which no sample has a value."""
        return cls((), np.full(count, -1, dtype=np.int32))

    @classmethod
    def concatenate(cls, columns: Sequence["Column"]) -> "Column":
        """The columns one below the other, over their merged values (sorted)."""
        values = tuple(sorted({value for column in columns for value in column.values}))
        code_of = {value: code for code, value in enumerate(values)}
        return cls(values, np.concatenate([column._recoded(code_of) for column in columns]))

    def recoded(self, values: Sequence[str]) -> np.ndarray:
        """The codes (N,) int32 under another list of values; a value that is not listed becomes -1."""
        return self._recoded({value: code for code, value in enumerate(values)})

    def _recoded(self, code_of: Mapping[str, int]) -> np.ndarray:
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

        names = dict.fromkeys(name for index in indexes for name in index.attributes)

        def attribute(name: str) -> Column:
            return Column.concatenate([index.attributes.get(name) or Column.unknown(len(index)) for index in indexes])

        plain = ("keys", "labels", "image_offset", "image_size", "image_crc", "width", "height")
        return cls(
            names=tuple(name for index in indexes for name in index.names),
            folders=tuple(folder for index in indexes for folder in index.folders),
            shards=tuple(shard for index in indexes for shard in index.shards),
            shard_folders=shifted("shard_folders", "folders"),
            shard=shifted("shard", "shards"),
            attributes={name: attribute(name) for name in names},
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


def write_index(index: Index, options: Sequence[str] = ()) -> Path:
    """Writes FOLDER/index.parquet of an index of one folder, atomically, and returns its path.

    One row per sample, strings dictionary-encoded; the file's metadata holds the format's version, the dataset's name,
    the shards and `options`, the command-line options that would make the same index again.
    """
    (folder,), (name,) = index.folders, index.names
    columns = {"key": pa.array(index.keys, pa.string())}
    columns |= {column: pa.array(getattr(index, field)) for column, field in _NUMBERS.items()}
    columns |= {column: getattr(index, field).arrow() for field, column in _STRINGS.items()}
    columns |= {f"attribute:{attribute}": column.arrow() for attribute, column in index.attributes.items()}
    about = {
        "format": INDEX_FORMAT,
        "name": name,
        "options": list(options),
        "shards": [asdict(s) for s in index.shards],
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about).encode()})
    path = Path(folder) / INDEX_NAME
    with replacing(path) as file:
        pa.parquet.write_table(table, file, compression="zstd")
    return path


def read_index(folder: str | Path, storage: Storage | None = None) -> Index:
    """The index of a folder of shards, checked against the shards that are there (their names and sizes).

    Raises DistFairError, naming the file and the command that mends it, for a missing or unreadable index, another
    format version, and a stale one: a shard that is gone, new, or of another size.
    """
    folder = Path(folder).absolute()
    mend = f"{INDEX_COMMAND} {shlex.quote(str(folder))}"
    path = folder / INDEX_NAME
    if not path.is_file():
        raise _no_index(folder, mend)
    try:
        table = pa.parquet.read_table(path, partitioning=None)
        about = json.loads((table.schema.metadata or {})[_METADATA])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DistFairError(
            f"{path} is not an index of shards, or is damaged ({error}); make it again: {mend}"
        ) from error
    if about.get("format") != INDEX_FORMAT:
        raise DistFairError(
            f"{path} has format {about.get('format')}, this version reads {INDEX_FORMAT}; make it again: {mend}"
        )
    mend = shlex.join([*INDEX_COMMAND.split(), str(folder), *about["options"]])
    shards = tuple(Shard(**shard) for shard in about["shards"])
    _check_shards(path, shards, storage or LocalStorage(folder), mend)
    return _from_table(table.unify_dictionaries().combine_chunks(), about["name"], folder, shards)


def _from_table(table: pa.Table, name: str, folder: Path, shards: tuple[Shard, ...]) -> Index:
    def column(name: str) -> Column:
        return Column.of(table[name].combine_chunks())

    prefix = "attribute:"
    attributes = [name for name in table.column_names if name.startswith(prefix)]
    return Index(
        names=(name,),
        folders=(str(folder),),
        shards=shards,
        shard_folders=np.zeros(len(shards), dtype=np.int32),
        keys=table["key"].to_numpy(),
        attributes={name.removeprefix(prefix): column(name) for name in attributes},
        **{field: column(name) for field, name in _STRINGS.items()},
        **{field: table[name].to_numpy() for name, field in _NUMBERS.items()},
    )


def _check_shards(path: Path, shards: Sequence[Shard], storage: Storage, mend: str) -> None:
    present, listed = set(storage.shards()), {shard.path for shard in shards}
    changes = [f"{name} is gone" for name in sorted(listed - present)]
    changes += [f"{name} is new" for name in sorted(present - listed)]
    for shard in shards:
        if shard.path in present and (size := storage.size(shard.path)) != shard.size:
            changes.append(f"{shard.path} has {size} bytes, not {shard.size}")
    if changes:
        more = f" and {len(changes) - 3} more changes" if len(changes) > 3 else ""
        raise DistFairError(f"{path} is stale: {', '.join(changes[:3])}{more}; index the folder again: {mend}")


def _no_index(folder: Path, mend: str) -> DistFairError:
    if not folder.is_dir():
        return DistFairError(f"{folder} is no folder; give the folder that holds the shards (00000.tar, ...)")
    inner = sorted(entry.name for entry in folder.iterdir() if (entry / INDEX_NAME).is_file())
    if inner:
        return DistFairError(
            f"{folder} has no {INDEX_NAME}, but these folders in it have: {', '.join(inner)}; name one"
        )
    return DistFairError(f"{folder} has no {INDEX_NAME}; make it: {mend}")
