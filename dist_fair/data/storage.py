"""Where bytes come from, behind one small interface, and how files that people keep are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from dist_fair.errors import DistFairError

OPEN_FILES = 64  # per process; the usual limit is 1,024, and torch's workers need descriptors too
CHUNK = 4 << 20


class Storage(Protocol):
    """A folder of shards that can be read in byte ranges. Paths are relative to the folder, with forward slashes."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; DistFairError where the file is missing or ends before."""

    def size(self, path: str) -> int:
        """Bytes in a file; DistFairError where it is missing."""

    def shards(self) -> list[str]:
        """The .tar files directly in the folder, sorted by name."""

    def close(self) -> None:
        """Lets go of what is open; reading afterwards opens anew."""


class LocalStorage:
    """Storage in a local folder, by pread on descriptors that stay open (the OPEN_FILES last used).

    Safe in threads and across fork, since pread shares no file position; pickled, it carries the folder alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._descriptor = lru_cache(maxsize=OPEN_FILES)(self._open)

    def __reduce__(self) -> tuple:
        return LocalStorage, (self.folder,)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        descriptor = self._descriptor(path)
        data = os.pread(descriptor.number, size, offset)
        while len(data) < size:  # one pread gives at most 2 GiB, and less on some network file systems
            more = os.pread(descriptor.number, size - len(data), offset + len(data))
            if not more:
                raise DistFairError(
                    f"{self.folder / path} ends at byte {offset + len(data)}, where bytes {offset} to {offset + size} "
                    "were wanted: the file was cut or changed; copy it again, then index its folder again"
                )
            data += more
        return data

    def size(self, path: str) -> int:
        """Bytes in a file."""
        try:
            return (self.folder / path).stat().st_size
        except OSError as error:
            raise DistFairError(f"{self.folder / path} cannot be read: {error.strerror}") from error

    def shards(self) -> list[str]:
        """The .tar files directly in the folder, sorted by name."""
        try:
            return sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".tar"))
        except OSError as error:
            raise DistFairError(f"{self.folder} is no folder that can be read: {error.strerror}") from error

    def close(self) -> None:
        """Closes the descriptors that no thread is reading from."""
        self._descriptor.cache_clear()

    def _open(self, path: str) -> "_Descriptor":
        try:
            return _Descriptor(os.open(self.folder / path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise DistFairError(f"{self.folder / path} cannot be read: {error.strerror}") from error


class _Descriptor:
    """An open file that closes with its last reference, so that dropping it from the cache never cuts off a reader."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def chunks(storage: Storage, path: str) -> Iterator[bytes]:
    """The whole of a file, in pieces of CHUNK bytes."""
    size = storage.size(path)
    for offset in range(0, size, CHUNK):
        yield storage.read(path, offset, min(CHUNK, size - offset))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and leaves no trace when it does not.

    Written aside, synced to disk, then renamed: a reader sees the old file or the whole new one.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)
