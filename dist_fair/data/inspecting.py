"""What people want to see of a data set before they train on it: counts per group, sizes, one image, checksums."""

import zlib
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_fair.data.index import INDEX_COMMAND, Column, Index
from dist_fair.data.indexing import checksum
from dist_fair.data.parallel import Progress, no_progress
from dist_fair.data.storage import LocalStorage, replacing
from dist_fair.demographics import UNKNOWN, Groups, attribute_sets
from dist_fair.errors import DistFairError, nearest


def show(index: Index, console: Console | None = None) -> None:
    """Prints the summary of an index and its samples per attribute value, intersection and manipulation."""
    console = console or Console(markup=False, highlight=False)  # names of folders and groups are no markup
    if not console.is_terminal:
        console.width = 120
    console.print(f"{', '.join(index.names)}: {', '.join(index.folders)}", soft_wrap=True)
    console.print(_summary(index))
    if index.attributes:
        console.print(_groups(index))
    if index.manipulations.values:
        console.print(_manipulations(index))


def verify(index: Index, progress: Progress = no_progress) -> None:
    """Reads all shards of a one-folder index; DistFairError naming those whose checksum differs."""
    storage, wrong = LocalStorage(index.folders[0]), []
    progress(0, len(index.shards))
    for done, shard in enumerate(index.shards, start=1):
        if checksum(storage, shard.path) != shard.checksum:
            wrong.append(shard.path)
        progress(done, len(index.shards))
    if wrong:
        raise DistFairError(
            f"{len(wrong)} of {len(index.shards)} shards in {index.folders[0]} are not as they were indexed: "
            f"{', '.join(wrong[:10])}; copy them again, or, if the change is meant, {INDEX_COMMAND} {index.folders[0]}"
        )


def save_image(index: Index, key: str, file: Path) -> str:
    """Writes the stored bytes of a sample's image to a file and returns what the index knows of the sample."""
    found = np.flatnonzero(index.keys == key)
    if not len(found):
        raise DistFairError(f"no sample '{key}' in {', '.join(index.folders)}: {nearest(key, _some(index.keys))}")
    sample = int(found[0])
    shard = index.shard[sample]
    storage = LocalStorage(index.folders[index.shard_folders[shard]])
    data = storage.read(index.shards[shard].path, int(index.image_offset[sample]), int(index.image_size[sample]))
    if zlib.crc32(data) != index.image_crc[sample]:
        raise DistFairError(f"{index.place(sample)} is not the image that was indexed; index the folder again")
    with replacing(file.absolute()) as target:
        target.write(data)
    facts = {"label": ("real", "fake")[index.labels[sample]], "video": _value(index.videos, sample)}
    facts |= {"identity": _value(index.identities, sample), "manipulation": _value(index.manipulations, sample)}
    facts |= {name: _value(column, sample) for name, column in index.attributes.items()}
    known = ", ".join(f"{name} {value}" for name, value in facts.items() if value != UNKNOWN)
    size = f"{index.width[sample]} x {index.height[sample]} pixels, {len(data)} bytes"
    return f"{index.place(sample)}: {known}; {size}; saved as {file}"


def _summary(index: Index) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    fakes = int(index.labels.sum())
    unreadable = int((index.width == 0).sum())
    table.add_row("samples", f"{len(index):,}")
    table.add_row("real / fake", f"{len(index) - fakes:,} / {fakes:,}")
    table.add_row("videos", f"{len(index.videos.values):,}")
    table.add_row("identities", f"{len(index.identities.values):,}" if index.identities.values else "not given")
    table.add_row("image sizes", _sizes(index))
    table.add_row("unreadable images", Text(f"{unreadable:,}", style="bold red") if unreadable else "none")
    table.add_row("shards", f"{len(index.shards):,} ({sum(shard.size for shard in index.shards) / 1e6:,.1f} MB)")
    return table


def _groups(index: Index) -> Table:
    table = _counts_table("group")
    vocabulary = {name: column.values for name, column in index.attributes.items() if column.values}
    codes = {name: column.codes for name, column in index.attributes.items()}
    for names in attribute_sets([*vocabulary]) if vocabulary else []:
        groups = Groups.of(names, vocabulary)
        members = groups.codes(codes)
        for code, group in [*enumerate(groups.names), (-1, UNKNOWN)]:
            if code >= 0 or (members == code).any():
                _add_counts(table, (groups.label, group), index, members == code)
        table.add_section()
    return table


def _manipulations(index: Index) -> Table:
    table = _counts_table("manipulation")
    for code, name in [*enumerate(index.manipulations.values), (-1, UNKNOWN)]:
        members = (index.manipulations.codes == code) & (index.labels == 1)
        if members.any():
            _add_counts(table, ("manipulation", name), index, members)
    return table


def _counts_table(what: str) -> Table:
    table = Table("by", what)
    for column in ("real", "fake", "videos", "% of samples"):
        table.add_column(column, justify="right")
    return table


def _add_counts(table: Table, head: tuple[str, str], index: Index, members: np.ndarray) -> None:
    fakes = int(index.labels[members].sum())
    count = int(members.sum())
    videos = len(np.unique(index.videos.codes[members]))
    table.add_row(*head, f"{count - fakes:,}", f"{fakes:,}", f"{videos:,}", f"{100 * count / len(index):.1f}")


def _sizes(index: Index) -> str:
    sizes, counts = np.unique(np.stack([index.width, index.height]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:3]
    shown = [f"{sizes[0, i]} x {sizes[1, i]} ({counts[i]:,})" for i in order if sizes[0, i]]
    more = len(counts) - int((sizes[0] == 0).any()) - len(shown)
    return ", ".join([*shown, *([f"{more:,} others"] if more else [])]) or "unknown"


def _value(column: Column, sample: int) -> str:
    code = column.codes[sample]
    return column.values[code] if code >= 0 else UNKNOWN


def _some(keys: np.ndarray) -> list[str]:
    return [str(key) for key in keys[:5]]
