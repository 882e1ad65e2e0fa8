"""One node's copy of the shards it will read: in turn with other jobs, checked, and only ever whole files."""

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dist_fair.data.index import INDEX_COMMAND, Shard
from dist_fair.data.storage import LocalStorage, chunks, replacing
from dist_fair.errors import DistFairError

THREADS = 8  # BLAKE2b makes 1 GB/s in each, and a parallel file system wants several readers
RESERVE = 256 << 20  # bytes that stay free on the local disk, for the job's own temporary files
LOCK_NAME = ".staging.lock"


@dataclass
class ShardFolder:
    """One folder of shards: where it lies, where its copy does, and the shards that will be read, by path."""

    source: Path
    target: Path
    shards: dict[str, Shard]

    def missing(self) -> list[Shard]:
        """The shards that have no copy of their size yet."""
        return [shard for path, shard in self.shards.items() if _size(self.target / path) != shard.size]


class State(NamedTuple):
    """How far a copy is: bytes done, and 0 or 1 for each of: at work, waiting for another job's turn, failed."""

    done: int = 0
    working: int = 0
    waiting: int = 0
    failed: int = 0


class NodeCopy:
    """The copying of one node, in threads of its own; the main thread asks how it goes.

    root: the folder of all copies. total: bytes to copy. fault: the error that ended it, or None.
    """

    def __init__(self, root: Path, folders: Sequence[ShardFolder]):
        self.root, self.folders = root, folders
        self.total = _missing(folders)
        self.fault: DistFairError | None = None
        self._done, self._waiting, self._counting = 0, False, threading.Lock()
        self._stopped, self._finished = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)

    def check_space(self) -> None:
        """Raises DistFairError unless the disk has room for what is missing."""
        needed = _missing(self.folders)
        place = next(path for path in (self.root, *self.root.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed and free < needed + RESERVE:
            raise DistFairError(
                f"{_gigabytes(needed)} of shards are to be copied to {self.root}, where {_gigabytes(free)} are free, "
                f"of which {_gigabytes(RESERVE)} are kept: clear the disk, name a larger one, or set data.stage_to=null"
            )

    def start(self) -> None:
        """Begins to copy."""
        self._thread.start()

    def stop(self) -> None:
        """Gives up what is not finished; returns when nothing more is written."""
        self._stopped.set()
        self._thread.join()

    def state(self, seconds: float) -> State:
        """The state after so many seconds, or at the end if that is sooner."""
        finished = self._finished.wait(seconds)
        with self._counting:
            return State(self._done, int(not finished), int(self._waiting), int(self.fault is not None))

    def _run(self) -> None:
        try:
            if self.total:
                with self._turn():
                    self._copy_missing()
        except _Stopped:
            pass
        except DistFairError as error:
            self.fault = error
        except OSError as error:
            self.fault = DistFairError(f"copying to {self.root}: {error}")
        except Exception as error:
            self.fault = DistFairError(f"copying to {self.root}: {error!r}")
        finally:
            self._finished.set()

    def _copy_missing(self) -> None:
        for folder in self.folders:
            folder.target.mkdir(parents=True, exist_ok=True)
            for left in folder.target.glob(".*.part"):  # of a copy that was killed: it is our turn, none is at work
                left.unlink(missing_ok=True)
        self.check_space()
        self._count(self.total - _missing(self.folders))  # what another job copied meanwhile
        with ThreadPoolExecutor(THREADS, "staging") as threads:
            jobs = [threads.submit(self._copy, folder, shard) for folder in self.folders for shard in folder.missing()]
            ended, others = wait(jobs, return_when=FIRST_EXCEPTION)
            if others:
                self._stopped.set()
        for job in ended:
            job.result()

    def _copy(self, folder: ShardFolder, shard: Shard) -> None:
        source, digest = LocalStorage(folder.source), hashlib.blake2b(digest_size=16)
        with replacing(folder.target / shard.path) as file:
            for chunk in chunks(source, shard.path):
                self._go_on()
                file.write(chunk)
                digest.update(chunk)
                self._count(len(chunk))
            self._go_on()
            if digest.hexdigest() != shard.checksum:
                raise DistFairError(
                    f"{folder.source / shard.path} is not as it was indexed (BLAKE2b {digest.hexdigest()}, not "
                    f"{shard.checksum}): restore it, or if the change is meant: {INDEX_COMMAND} {folder.source}"
                )

    def _count(self, size: int) -> None:
        with self._counting:
            self._done += size

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One job of a node at a time: the others wait, then find the shards there. The system ends a dead job's."""
        self.root.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.root / LOCK_NAME, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                self._go_on()
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._waiting = True
                    time.sleep(0.1)
            self._waiting = False
            yield
        finally:
            os.close(lock)


class _Stopped(Exception):
    """The copy was told to stop."""


def _missing(folders: Sequence[ShardFolder]) -> int:
    """Bytes of all shards without a copy."""
    return sum(shard.size for folder in folders for shard in folder.missing())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
