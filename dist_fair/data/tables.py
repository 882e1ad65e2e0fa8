"""Tables that say what the images of a folder are, and the layouts they come in."""

import csv
import io
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_fair.data.values import Fields, Record, record_of, text_of
from dist_fair.errors import DistFairError, nearest

COLUMNS = ("path", "label", "video", "identity", "manipulation", "split")


@dataclass(frozen=True)
class Entry:
    """One image of a table: its path under the images' folder, what it is, its split, and its row for error texts."""

    path: str
    record: Record
    split: str | None
    place: str


@dataclass(frozen=True)
class TableOptions:
    """How a table is read. attributes: columns that are attributes (None: all that have no other meaning).

    rename: column in the file -> its name here. video_pattern: a regular expression whose first group (or whole match)
    in the path is the video, for tables without such a column.
    """

    attributes: tuple[str, ...] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    video_pattern: str | None = None


Layout = Callable[[Sequence[Path], TableOptions], list[Entry]]


def plain(paths: Sequence[Path], options: TableOptions) -> list[Entry]:
    """CSV or Parquet tables with columns path, label and, where known, video, identity, manipulation, split, others."""
    return [entry for path in paths for entry in _plain_table(path, options)]


def _plain_table(path: Path, options: TableOptions) -> Iterator[Entry]:
    columns, rows = read_table(path, options.rename)
    require(path, columns, ("path", "label", *(options.attributes or ())))
    others = tuple(column for column in columns if column not in COLUMNS)
    fields = Fields(attributes=others if options.attributes is None else options.attributes)
    for place, row in rows:
        image = image_path(row["path"], place)
        split = text_of(row.get("split"), place)
        if "split" in columns and split is None:
            raise DistFairError(f"{place}: no split; name one in every row, or leave the column out")
        record = record_of(row, None, fields, place)
        yield Entry(image, with_video(record, image, options, place), split, place)


def read_table(path: Path, rename: Mapping[str, str]) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    """The columns of a CSV or Parquet file, renamed, and its rows, each with its place for error texts.

    CSV values stay text, so that a video named 007 keeps its zeros.
    """
    if not path.is_file():
        raise DistFairError(f"{path} is no file; give a CSV or Parquet table")
    columns, rows = (_read_parquet if path.suffix.lower() in (".parquet", ".pq") else _read_csv)(path)
    for column in rename:
        if column not in columns:
            raise DistFairError(f"{path} has no column '{column}' to rename: {nearest(column, columns)}")
    columns = [rename.get(column, column) for column in columns]
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DistFairError(f"{path} has two columns '{twice[0]}': rename or remove one")
    return columns, ((place, dict(zip(columns, values, strict=True))) for place, values in rows)


def require(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """DistFairError for the first of the wanted columns that a table lacks."""
    for column in wanted:
        if column not in columns:
            raise DistFairError(
                f"{path} has no column '{column}' (it has {', '.join(columns)}): {nearest(column, list(columns))} "
                f"Rename it in the file, or by --rename THEIRS={column}"
            )


def image_path(value: Any, place: str) -> str:
    """A table's path, normalised; DistFairError for none, and for one that leads out of the images' folder."""
    text = text_of(value, place)
    if text is None:
        raise DistFairError(f"{place}: no path; name the image, relative to the images' folder")
    path = posixpath.normpath(text)
    if path.startswith(("/", "../")) or path in (".", ".."):
        raise DistFairError(f"{place}: path '{text}' leaves the images' folder; give it relative to that folder")
    return path


def with_video(record: Record, image: str, options: TableOptions, place: str) -> Record:
    """The record with the video that the pattern finds in the path, where there is a pattern and no video yet."""
    if options.video_pattern is None or record.video is not None:
        return record
    match = re.search(options.video_pattern, image)
    if match is None:
        raise DistFairError(f"{place}: the video pattern '{options.video_pattern}' does not occur in '{image}'")
    return replace(record, video=match.group(1) if match.re.groups else match.group(0))


Rows = Iterator[tuple[str, Sequence[Any]]]


def _read_csv(path: Path) -> tuple[list[str], Rows]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistFairError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = [column.strip() for column in next(reader, [])]

    def rows() -> Rows:
        try:
            for values in reader:
                if not values:
                    continue
                place = f"{path} line {reader.line_num}"
                if len(values) != len(columns):
                    raise DistFairError(f"{place} has {len(values)} values, the header {len(columns)} (quote commas)")
                yield place, values
        except csv.Error as error:
            raise DistFairError(f"{path} line {reader.line_num} is not CSV: {error}") from error

    return columns, rows()


def _read_parquet(path: Path) -> tuple[list[str], Rows]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pa.parquet.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DistFairError(f"{path} is not a Parquet table, or is damaged: {error}") from error
    columns = [column.to_pylist() for column in table.columns]
    return table.column_names, ((f"{path} row {n}", values) for n, values in enumerate(zip(*columns, strict=True)))
