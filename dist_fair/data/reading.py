"""From rows of the index to images: read, checked, decoded, resized; and what happens to samples that are bad.

Only jpg, png and webp are decoded, by their first bytes, and only within a cap on pixels that the index knows before
anything is read. Bytes whose checksum differs from the index's are never a bad sample but always an error: the shard
is damaged or the index stale, and no policy may hide that.
"""

import io
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_fair import keyed
from dist_fair.data.index import INDEX_COMMAND, Index
from dist_fair.data.opencv import opencv
from dist_fair.data.storage import LocalStorage, Storage
from dist_fair.demographics import UNKNOWN
from dist_fair.errors import DistFairError, nearest

POLICIES = ("fail", "substitute")
MAX_PIXELS = 50_000_000
ATTEMPTS = 64  # substitutes tried for one bad sample: if so many are bad in a row, the data is
JPEG, PNG, JPEG_END, PNG_END = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\xff\xd9", b"IEND\xaeB`\x82"


class BadSample(NamedTuple):
    """A sample that could not be used: index row, epoch, the row used instead (-1: none), and why."""

    sample: int
    epoch: int
    replacement: int
    reason: str


class Images(NamedTuple):
    """images: (B, S, S, 3) uint8 RGB. samples: (B,) the rows they show, -1 for none. bad: what was wrong."""

    images: np.ndarray
    samples: np.ndarray
    bad: list[BadSample]


class Reader:
    """Reads samples of an index as square RGB images.

    image_size: S, pixels. policy: of bad samples, `fail` or `substitute`. max_pixels: larger images are bad samples.
    seed: of substitutes. May be forked and pickled: files are opened by whichever process reads.
    """

    def __init__(
        self, index: Index, image_size: int, policy: str = "fail", max_pixels: int = MAX_PIXELS, seed: int = 0
    ):
        if policy not in POLICIES:
            raise DistFairError(f"data.bad_samples={policy}: {nearest(policy, [*POLICIES])}")
        self.index, self.image_size, self.policy = index, image_size, policy
        self.max_pixels, self.seed = max_pixels, seed
        self._storages: list[Storage] = [LocalStorage(folder) for folder in index.folders]
        self._files = [(self._storages[folder], shard.path)
                       for folder, shard in zip(index.shard_folders.tolist(), index.shards, strict=True)]  # fmt: skip
        self._kinds: np.ndarray | None = None

    def check(self, rows: np.ndarray | None = None) -> np.ndarray:
        """The rows (of all, or of `rows`) that the index already knows to be bad. DistFairError under policy fail."""
        rows = np.arange(len(self.index)) if rows is None else rows
        pixels = self.index.width[rows].astype(np.int64) * self.index.height[rows]
        bad = rows[(pixels == 0) | (pixels > self.max_pixels)]
        if len(bad) and self.policy == "fail":
            listed = "\n".join(f"  {self._known_fault(row)}: {self.index.place(row)}" for row in bad[:5].tolist())
            more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise DistFairError(f"{len(bad)} of {len(rows)} samples are bad:\n{listed}{more}\n{_MEND}")
        return bad

    def read(self, samples: np.ndarray, epochs: np.ndarray, replace: bool = True) -> Images:
        """The images of some rows; -1 is padding and stays black.

        Under policy substitute a bad sample gives way to another one, or, with replace=False (evaluation, where no
        image may answer for another), is left out: black, row -1. Raises DistFairError under policy fail.
        """
        size = self.image_size
        images = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        shown, bad = np.array(samples, dtype=np.int64), []
        for row, sample in enumerate(shown.tolist()):
            if sample < 0:
                images[row] = 0
                continue
            fault = self._read_into(sample, images[row])
            if fault is not None:
                bad.append(self._give_way(sample, int(epochs[row]), fault, images[row], replace))
                shown[row] = bad[-1].replacement
        return Images(images, shown, bad)

    def _read_into(self, sample: int, out: np.ndarray) -> str | None:
        """Fills `out` (S, S, 3), or says what is wrong with the sample."""
        index = self.index
        fault = self._known_fault(sample)
        if fault is not None:
            return fault
        storage, path = self._files[index.shard[sample]]
        data = storage.read(path, int(index.image_offset[sample]), int(index.image_size[sample]))
        if zlib.crc32(data) != index.image_crc[sample]:
            folder = index.folders[index.shard_folders[index.shard[sample]]]
            raise DistFairError(
                f"{index.place(sample)}: the bytes are not those that were indexed: the shard was changed or damaged; "
                f"restore it, or if the change is meant: {INDEX_COMMAND} {folder}"
            )
        return decode_into(data, out)

    def _known_fault(self, sample: int) -> str | None:
        width, height = int(self.index.width[sample]), int(self.index.height[sample])
        if width * height == 0:
            return "the image's header cannot be read"
        if width * height > self.max_pixels:
            return f"{width} x {height} pixels are more than data.max_pixels={self.max_pixels}"
        return None

    def _give_way(self, sample: int, epoch: int, fault: str, out: np.ndarray, replace: bool) -> BadSample:
        if self.policy == "fail":
            raise DistFairError(f"bad sample {self.index.place(sample)}: {fault}.\n{_MEND}")
        if not replace:
            out[...] = 0
            return BadSample(sample, epoch, -1, fault)
        for pool in self._pools(sample):
            for attempt in range(ATTEMPTS if len(pool) else 0):
                chosen = int(pool[keyed.integer(self.seed, "substitute", epoch, sample, attempt) % len(pool)])
                if self._read_into(chosen, out) is None:
                    return BadSample(sample, epoch, chosen, fault)
        raise DistFairError(
            f"bad sample {self.index.place(sample)}: {fault}; and none of {ATTEMPTS} others of its label can be read "
            "to stand in for it: the data set is damaged; make its shards again"
        )

    def _pools(self, sample: int) -> Iterable[np.ndarray]:
        """Rows that may stand in for a sample: those of its label and all its attribute values, then of its label."""
        if self._kinds is None:  # one number per combination of label and attribute values, unknown being one of them
            kinds = self.index.labels.astype(np.int64)
            for column in self.index.attributes.values():
                kinds = kinds * (len(column.values) + 1) + column.codes + 1
            self._kinds = kinds
        for kinds in (self._kinds, self.index.labels):
            alike = np.flatnonzero(kinds == kinds[sample])
            yield alike[alike != sample]


def file_into(path: str | Path, out: np.ndarray, max_pixels: int = MAX_PIXELS) -> str | None:
    """Fills `out` (S, S, 3) uint8 with the image of a file as training would see it; or says what is wrong with it."""
    from dist_fair.data.indexing import image_size  # here, since a reader has the sizes in its index

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return f"the file cannot be read ({error.strerror})"
    width, height = image_size(data)
    if width * height > max_pixels:
        return f"{width} x {height} pixels are more than {max_pixels:,}"
    return decode_into(data, out)


def decode_into(data: bytes, out: np.ndarray) -> str | None:
    """Fills `out` (S, S, 3) uint8 with an encoded image in RGB, upright; or says what is wrong with it."""
    cv2, fault = opencv(), _fault(data)
    if fault is not None:
        return fault
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        return f"the image cannot be decoded ({error.err})"
    if image is None:
        return "the image cannot be decoded"
    resize_into(image, out)
    return None


def resize_into(image: np.ndarray, out: np.ndarray) -> None:
    """Fills `out` (S, S, 3) with an image (H, W, 3) uint8, its sides stretched or shrunk to S."""
    cv2, side = opencv(), len(out)
    height, width = image.shape[:2]
    if height == width == side:
        out[...] = image
        return
    way = cv2.INTER_AREA if min(height, width) >= side else cv2.INTER_LINEAR
    cv2.resize(image, (side, side), dst=out, interpolation=way)


def counts_by_group(index: Index, bad: Iterable[BadSample]) -> dict[str, int]:
    """How many bad samples each group has, by names such as "fake, gender=female, race=unknown"."""

    def group(sample: int) -> str:
        parts = [("real", "fake")[index.labels[sample]]]
        for name, column in index.attributes.items():
            code = column.codes[sample]
            parts.append(f"{name}={column.values[code] if code >= 0 else UNKNOWN}")
        return ", ".join(parts)

    return dict(sorted(Counter(group(one.sample) for one in bad).items()))


def _fault(data: bytes) -> str | None:
    """What is wrong with an encoded image, as far as its ends tell: decoders fill what is missing with grey.

    Damage inside a JPEG that leaves both ends whole is not seen: libjpeg repairs it with no more than a warning.
    """
    if data.startswith(JPEG):
        return None if data.endswith(JPEG_END) else _jpeg_fault(data)  # some cameras write bytes after the end
    if data.startswith(PNG):
        return None if PNG_END in data else "the image is truncated (no IEND)"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        whole = int.from_bytes(data[4:8], "little") + 8
        return None if whole <= len(data) else f"the image is truncated ({len(data)} of {whole} bytes)"
    return "not a jpg, png or webp image"


def _jpeg_fault(data: bytes) -> str | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"the image is damaged ({error})"
    return None


_MEND = (
    "Repair or remove them and index the shards again; or set data.bad_samples=substitute to use others of the same "
    "label and attributes instead (counted and reported), or raise data.max_pixels if they are merely large."
)
