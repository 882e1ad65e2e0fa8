"""Making the index of a folder of WebDataset shards, ours or those that others wrote."""

import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_fair.data import tar
from dist_fair.data.index import Column, Index, Shard
from dist_fair.data.parallel import Progress, no_progress, run_jobs
from dist_fair.data.storage import LocalStorage, Storage, chunks
from dist_fair.data.values import Fields, Record, record_of
from dist_fair.errors import DistFairError, nearest

JSON_LIMIT = 16 << 20  # bytes; metadata of one sample takes some hundred


class Row(NamedTuple):
    """One sample as the index keeps it."""

    key: str
    record: Record
    offset: int
    size: int
    crc: int
    width: int
    height: int


def index_folder(
    folder: str | Path,
    fields: Fields | None = None,
    name: str | None = None,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Index:
    """Reads every shard of a folder once and returns its index; the result does not depend on `workers`.

    `name` is the dataset's, by default the folder's. An image whose header cannot be read has width and height 0.
    Raises DistFairError naming file, key and byte for whatever breaks the format: a truncated tar, members of a sample
    apart, a sample without image or label, a label other than 0 and 1, a key that comes twice, an attribute nobody has.
    """
    folder, fields = Path(folder).absolute(), fields or Fields()
    paths = LocalStorage(folder).shards()
    if not paths:
        raise _no_shards(folder)
    index = Index.concatenate(run_jobs(partial(index_shard, folder, fields), paths, workers, progress))
    shard_folders = np.zeros(len(paths), dtype=np.int32)
    index = replace(index, names=(name or folder.name,), folders=(str(folder),), shard_folders=shard_folders)
    if not len(index):
        raise DistFairError(f"the shards of {folder} hold no sample: KEY.jpg (or png, webp) with KEY.json or KEY.cls")
    _check_unique(index)
    _check_attributes(index, fields)
    return index


def index_shard(folder: Path, fields: Fields, path: str) -> Index:
    """The index of one shard, samples in tar order."""
    storage, where = LocalStorage(folder), str(folder / path)
    found = [
        _row(storage, path, where, fields, sample) for sample in tar.samples(storage, path, where) if sample.members
    ]
    rows = Row(*zip(*found, strict=True)) if found else Row(*[()] * len(Row._fields))  # by column
    records: Sequence[Record] = rows.record
    names = sorted({name for record in records for name in record.attributes} | {*(fields.attributes or ())})
    return Index(
        names=(folder.name,),
        folders=(str(folder),),
        shards=(Shard(path, storage.size(path), checksum(storage, path)),),
        shard_folders=np.zeros(1, dtype=np.int32),
        keys=np.array(rows.key, dtype=object),
        labels=np.array([record.label for record in records], dtype=np.int8),
        attributes={name: Column.of([record.attributes.get(name) for record in records]) for name in names},
        videos=Column.of([record.video_name(key) for key, record in zip(rows.key, records, strict=True)]),
        identities=Column.of([record.identity for record in records]),
        manipulations=Column.of([record.manipulation for record in records]),
        shard=np.zeros(len(found), dtype=np.int32),
        image_offset=np.array(rows.offset, dtype=np.int64),
        image_size=np.array(rows.size, dtype=np.int64),
        image_crc=np.array(rows.crc, dtype=np.uint32),
        width=np.array(rows.width, dtype=np.int32),
        height=np.array(rows.height, dtype=np.int32),
    )


def checksum(storage: Storage, path: str) -> str:
    """BLAKE2b of the whole file, 16 bytes in hex."""
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks(storage, path):
        digest.update(chunk)
    return digest.hexdigest()


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header of a JPEG, PNG or WebP, without decoding it; (0, 0) if unreadable.

    Pillow's parsers are called one by one, since Image.open refuses huge images instead of saying how huge they are.
    """
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    if data[:2] == b"\xff\xd8":
        parser = JpegImageFile
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        parser = PngImageFile
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        parser = WebPImageFile
    else:
        return 0, 0
    try:
        with parser(io.BytesIO(data)) as image:
            return image.size
    except Exception:  # parsers meet damaged headers with half a dozen exception types; none is a fault of ours
        return 0, 0


def _row(storage: Storage, path: str, where: str, fields: Fields, sample: tar.TarSample) -> Row:
    place = f"{where}: sample '{sample.key}' at byte {sample.offset}"
    try:
        sample.key.encode()
    except UnicodeEncodeError as error:
        raise DistFairError(f"{place}: the name is not UTF-8; rename the file and write the shard again") from error
    image = sample.image
    if image is None:
        raise DistFairError(f"{place} has no image: expected one of .{', .'.join(tar.IMAGES)}")
    texts = {
        extension: storage.read(path, member.offset, member.size)
        for extension, member in sample.members.items()
        if extension in ("json", "cls") and _small(member, place)
    }
    record = record_of(_parsed(texts.get("json"), place), texts.get("cls"), fields, place)
    data = storage.read(path, image.offset, image.size)
    return Row(sample.key, record, image.offset, image.size, zlib.crc32(data), *image_size(data))


def _small(member: tar.Member, place: str) -> bool:
    if member.size > JSON_LIMIT:
        raise DistFairError(f"{place}: '{member.name}' has {member.size} bytes; metadata may have {JSON_LIMIT}")
    return True


def _parsed(text: bytes | None, place: str) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DistFairError(f"{place}: its .json cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise DistFairError(f'{place}: its .json holds {type(record).__name__}, not an object such as {{"label": 1}}')
    return record


def _check_unique(index: Index) -> None:
    first: dict[str, int] = {}
    for sample, key in enumerate(index.keys):
        if (other := first.setdefault(key, sample)) != sample:
            raise DistFairError(
                f"key '{key}' comes twice: {index.place(other)}, and {index.place(sample)}; keys name the samples in "
                "every output: write the shards with unique keys"
            )


def _check_attributes(index: Index, fields: Fields) -> None:
    missing = [name for name in fields.attributes or () if not index.attributes[name].values]
    if missing:
        known = _field_names(LocalStorage(index.folders[0]), index.shards[0].path, index.folders[0])
        raise DistFairError(
            f"no sample of {index.folders[0]} has a value of attribute '{missing[0]}': {nearest(missing[0], known)}"
        )


def _field_names(storage: Storage, path: str, where: str) -> list[str]:
    """The fields of the first .json of a shard, for an error's hint."""
    for sample in tar.samples(storage, path, where):
        if member := sample.members.get("json"):
            found = _parsed(storage.read(path, member.offset, member.size), where)
            nested = found.get("attributes")
            return [*found, *(nested if isinstance(nested, dict) else ())]
    return []


def _no_shards(folder: Path) -> DistFairError:
    inner = sorted({path.parent.name for path in folder.glob("*/*.tar")})
    if inner:
        return DistFairError(f"no .tar file in {folder}, but in its folders {', '.join(inner)}: index each of them")
    if any(folder.glob("*.tar.*")) or any(folder.glob("*.tgz")):
        return DistFairError(
            f"the shards of {folder} are compressed, which rules out reading in byte ranges: decompress them"
        )
    return DistFairError(f"no .tar file in {folder}: make shards with dist-fair shards build")
