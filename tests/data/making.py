"""Small indexes and shards for tests."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from dist_fair.data.index import Column, Index, Shard
from dist_fair.data.indexing import index_folder
from dist_fair.data.writing import Sample, write_shard

GENDERS = ("female", "male")


def bare_index(shard_sizes: Sequence[int], labels: Sequence[int] | None = None) -> Index:
    """An index without files behind it: shards of the given sizes, genders in turn, labels 0 1 0 1 ... by default."""
    count = sum(shard_sizes)
    none, numbers = Column.unknown(count), np.arange(count)
    return Index(
        names=("made",), folders=("/made",), shards=tuple(Shard(f"{i:05}.tar", 1, "") for i in range(len(shard_sizes))),
        shard_folders=np.zeros(len(shard_sizes), np.int32), keys=numbers.astype(str),
        labels=(numbers % 2 if labels is None else np.asarray(labels)).astype(np.int8),
        attributes={"gender": Column(GENDERS, (numbers // 2 % 2).astype(np.int32))},
        videos=none, identities=none, manipulations=none,
        shard=np.repeat(np.arange(len(shard_sizes)), shard_sizes).astype(np.int32),
        image_offset=numbers * 0, image_size=numbers * 0, image_crc=np.zeros(count, np.uint32),
        width=np.full(count, 8, np.int32), height=np.full(count, 8, np.int32),
    )  # fmt: skip


def picture(number: int, side: int = 24) -> np.ndarray:
    """An RGB image (side, side, 3) that no other number has, smooth enough to survive JPEG."""
    coarse = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_LINEAR)


def encoded(image: np.ndarray, extension: str = "jpg") -> bytes:
    """An RGB image as a file; JPEG at quality 95."""
    return cv2.imencode(f".{extension}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def made_index(folder: Path, images: Sequence[bytes], shards: int = 2, extension: str = "jpg") -> Index:
    """Shards with these images in `folder`, indexed. Labels 0 1 0 1 ..., genders female female male male ..."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        Sample(f"{i:04}", image, extension, {"label": i % 2, "attributes": {"gender": GENDERS[i // 2 % 2]}})
        for i, image in enumerate(images)
    ]
    for shard, rows in enumerate(np.array_split(np.arange(len(samples)), shards)):
        write_shard(folder / f"{shard:05}.tar", [samples[row] for row in rows])
    return index_folder(folder)
