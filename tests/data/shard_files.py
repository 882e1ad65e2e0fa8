"""Small shards and image folders for the tests of the index and of building."""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from dist_fair.data.index import Index
from dist_fair.data.storage import LocalStorage


def image(number: int = 0, extension: str = "jpg", height: int = 12, width: int = 10) -> bytes:
    """An encoded image that differs for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(f".{extension}", pixels)[1].tobytes()


def members_of(key: str, number: int = 0, **metadata: object) -> list[tuple[str, bytes]]:
    """The .jpg and .json members of one sample; label 0 unless given."""
    return [(f"{key}.jpg", image(number)), (f"{key}.json", json.dumps({"label": 0, **metadata}).encode())]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of plain tarfile, as others write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A CSV table with the columns of the first row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def faces(folder: Path, count: int = 12, **columns: object) -> tuple[Path, list[dict[str, object]]]:
    """A folder of images in two sub-folders, and the rows of a table that describes them."""
    rows = []
    for number in range(count):
        name = f"v{number // 3:03d}/{number:02d}.{('jpg', 'png', 'webp')[number % 3]}"
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image(number, name.rpartition(".")[2]))
        gender, race = ("male", "female", "")[number % 3], ("Asian", "Black", "White")[number // 3 % 3]
        row = {"path": name, "label": number % 2, "video": f"{number // 3:03d}", "gender": gender, "race": race}
        rows.append({**row, **columns})
    return folder / "images", rows


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tar under a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.tar"))
    }


def stored(index: Index, sample: int) -> bytes:
    """The bytes of an image where the index says they lie."""
    storage = LocalStorage(index.folders[0])
    path = index.shards[index.shard[sample]].path
    return storage.read(path, int(index.image_offset[sample]), int(index.image_size[sample]))
