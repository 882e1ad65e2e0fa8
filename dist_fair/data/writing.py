"""Writing WebDataset shards: the same samples give the same bytes, and a shard is there whole or not at all."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dist_fair.data.storage import replacing

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SHARD_NAME = "{:05d}.tar"


@dataclass(frozen=True)
class Sample:
    """What becomes KEY.EXTENSION and KEY.json in a shard.

    image: the encoded bytes, stored as they are. extension: one of IMAGE_EXTENSIONS. metadata: "label" 0 or 1 and,
    where known, "video", "identity", "manipulation" (strings) and "attributes" (name -> string).
    """

    key: str
    image: bytes
    extension: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_shard(path: str | Path, samples: Iterable[Sample]) -> int:
    """Writes one tar file and returns the number of its samples.

    The bytes depend on the samples alone: fixed time, owner and mode, JSON with sorted keys. Written aside and renamed.
    """
    from webdataset import TarWriter  # imports torch: not for whoever only reads shards

    count = 0
    with replacing(Path(path)) as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        for sample in samples:
            text = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
            writer.write({"__key__": sample.key, sample.extension: sample.image, "json": text.encode()})
            count += 1
    return count


def write_shards(samples: Iterable[Sample], folder: str | Path, samples_per_shard: int = 1000) -> int:
    """Writes FOLDER/00000.tar, 00001.tar, ... one after another, in the order given; returns the number of shards.

    For several processes, give each a shard of its own: `run_jobs` over a function that calls `write_shard`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stream = iter(samples)
    number = 0
    for number, part in enumerate(_parts(stream, samples_per_shard), start=1):
        write_shard(folder / SHARD_NAME.format(number - 1), part)
    return number


def _parts(stream: Iterator[Sample], size: int) -> Iterator[Iterator[Sample]]:
    for first in stream:
        yield chain([first], islice(stream, size - 1))
