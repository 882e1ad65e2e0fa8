"""Where the members of a tar file lie, and how WebDataset groups them into samples. Only headers are read here."""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from dist_fair.data.storage import Storage
from dist_fair.errors import DistFairError

IMAGES = ("jpg", "jpeg", "png", "webp")
BLOCK = tarfile.BLOCKSIZE
HEADER_BUFFER = 2048  # a header is 512 bytes; with a long name or pax records, a few blocks more

# WebDataset's rule: the key is the path up to the first dot of the base name. Names without one, hidden files (such as
# the "._*" that macOS adds) and WebDataset's own "__*__" entries belong to no sample.
_KEY = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its header's offset (that of its first extended header), its data's offset and size."""

    name: str
    header: int
    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
    """The members of one sample that may be read: extension (lower case) -> Member. offset: of its first header."""

    key: str
    offset: int
    members: dict[str, Member]

    @property
    def image(self) -> Member | None:
        """The one image, if there is one."""
        return next((self.members[extension] for extension in IMAGES if extension in self.members), None)


def members(storage: Storage, path: str, where: str) -> Iterator[Member]:
    """The regular files of a tar (ustar, GNU long names, pax), in order.

    `where` names the file in errors: DistFairError for a truncated, compressed or damaged tar, with the offset.
    """
    size = storage.size(path)
    archive = _opened(storage, path, where)
    start = 0
    while True:
        try:
            info = archive.next()
        except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
            raise _damaged(where, start, size, str(error)) from error
        if info is None:
            return _check_end(storage, path, where, archive.offset, size)
        archive.members.clear()  # tarfile keeps every header; a shard may have a million
        if info.isreg() and not info.issparse():
            if info.size < 0 or info.offset_data + info.size > size:
                raise _damaged(where, start, size, f"'{info.name}' has {info.size} bytes from {info.offset_data}")
            yield Member(info.name, start, info.offset_data, info.size)
        if archive.offset <= start:
            raise _damaged(where, start, size, "a header of negative size")
        start = archive.offset


def samples(storage: Storage, path: str, where: str) -> Iterator[TarSample]:
    """The samples of a shard in order: neighbouring members of one key, as WebDataset groups them.

    Members other than jpg, jpeg, png, webp, json and cls are passed over and never read, hidden files too. Raises
    DistFairError for a key that comes back after another one, for a member that a sample has twice, and for a sample
    with two images.
    """
    finished: dict[str, int] = {}
    current: TarSample | None = None
    for member in members(storage, path, where):
        match = _KEY.fullmatch(member.name)
        if match is None:
            continue
        key, extension = match.group(1), match.group(2).lower()
        if current is None or key != current.key:
            if current is not None:
                yield current
                finished[current.key] = current.offset
            if key in finished:
                raise DistFairError(
                    f"{where}: '{member.name}' at byte {member.header} belongs to sample '{key}', which began at byte "
                    f"{finished[key]} and was followed by another: the members of a sample must be neighbours; "
                    "write the shard again with its files sorted by name"
                )
            current = TarSample(key, member.header, {})
        if extension in (*IMAGES, "json", "cls"):
            _add(current, extension, member, where)
    if current is not None:
        yield current


def _add(sample: TarSample, extension: str, member: Member, where: str) -> None:
    present = sample.members.get(extension) or (sample.image if extension in IMAGES else None)
    if present is not None:
        raise DistFairError(
            f"{where}: sample '{sample.key}' has both '{present.name}' at byte {present.header} and '{member.name}' at "
            f"byte {member.header}: one image, one json and one cls a sample, in shards with unique keys"
        )
    sample.members[extension] = member


def _opened(storage: Storage, path: str, where: str) -> tarfile.TarFile:
    file = io.BufferedReader(_StorageFile(storage, path), buffer_size=HEADER_BUFFER)
    head = storage.read(path, 0, min(6, storage.size(path)))
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise DistFairError(f"{where} is compressed, which rules out reading in byte ranges: decompress it first")
    try:
        return tarfile.TarFile(fileobj=file, mode="r", errorlevel=0)
    except (tarfile.TarError, ValueError) as error:
        raise DistFairError(f"{where} is no tar file ({error}): remove it from the folder or write it again") from error


def _check_end(storage: Storage, path: str, where: str, offset: int, size: int) -> None:
    """A whole tar ends in a block of zeros; tarfile also stops, silently, at a cut or damaged header."""
    block = storage.read(path, offset, max(0, min(BLOCK, size - offset)))
    if len(block) < BLOCK:
        raise _damaged(where, offset, size, "the end-of-archive block is missing")
    if any(block):
        raise _damaged(where, offset, size, "no valid header there")


def _damaged(where: str, offset: int, size: int, reason: str) -> DistFairError:
    return DistFairError(
        f"{where} is truncated or damaged: at byte {offset} of {size}: {reason}; copy or write the shard again"
    )


class _StorageFile(io.RawIOBase):
    """A file of a storage as a seekable stream, for tarfile."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._size, self._position = storage.size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        buffer[:count] = self._storage.read(self._path, self._position, count)
        self._position += count
        return count
