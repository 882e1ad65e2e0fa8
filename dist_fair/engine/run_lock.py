"""One job at a time in a run folder.

The lock is the kernel's (flock on RUN/.lock), so it goes with the process that held it, however that ended, on the same
machine at once; what the file says is only for people. Two things are left over on file systems shared by nodes:

    a node that died  NFS and Lustre keep its locks until they evict it (NFS: 90 s). A requeued job is its own successor
                      and need not wait: it puts a new file in the place of the old one, and locks that
    a node that is    cut off, its processes alive, while the job is requeued: they hold a lock on a file that is no
                      longer there, notice (`check`, after steps), and stop

A file system without locks (Lustre mounted without `flock`) is told to the caller: two jobs would not see each other.
"""

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from dist_fair.engine.children import keep_from_children
from dist_fair.errors import DistFairError

NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
CHECK = 10.0  # seconds between looks at a lock that one still holds: a stat of a shared file system


@dataclass(frozen=True)
class Holder:
    """Who is at work in a folder. job, restarts: of Slurm, None outside it."""

    doing: str
    user: str
    host: str
    pid: int
    job: str | None
    restarts: int
    since: str

    @classmethod
    def me(cls, doing: str) -> "Holder":
        """This process."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        user = os.environ.get("USER", str(os.getuid()))
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(doing, user, socket.gethostname(), os.getpid(), job, restarts, since)

    def precedes(self, other: "Holder") -> bool:
        """True if this is an earlier start of the same Slurm job, which then is no more."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts

    def __str__(self) -> str:
        job = f"Slurm job {self.job}, " if self.job else ""
        return f"it is {self.doing} by {self.user} on {self.host}, {job}process {self.pid}, since {self.since}"


class RunLock:
    """Held from `acquire` to `release`, or to the end of the process. Only rank 0 has one."""

    def __init__(self, folder: Path, doing: str):
        self.path, self.me = folder / NAME, Holder.me(doing)
        self._file: int | None = None
        self._looked = -CHECK

    def acquire(self) -> str | None:
        """Takes the lock; returns a warning where the file system has no locks.

        Raises DistFairError, naming the holder, where another process has it.
        """
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            keep_from_children(self)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._refuse_or_replace(_holder(self._file))
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.release()
                return (f"{self.path.parent} lies on a file system without locks ({error.strerror}; Lustre: mount with "
                        "flock): see to it that no two jobs share this folder")  # fmt: skip
            else:
                if self._mine():
                    os.truncate(self._file, 0)
                    os.write(self._file, json.dumps(asdict(self.me)).encode())
                    return None
            self._close()  # somebody removed or replaced the file in between

    def check(self) -> None:
        """Raises DistFairError if a successor has taken the folder over. Looks every ten seconds."""
        if self._file is None or time.monotonic() < self._looked + CHECK:
            return
        self._looked = time.monotonic()
        if not self._mine():
            raise DistFairError(f"{self.path.parent} was taken over by a later start of the same job: this one stops, "
                                "and leaves everything to it")  # fmt: skip

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        if self._file is not None:
            if self._mine():
                self.path.unlink(missing_ok=True)
            self._close()

    def disown(self) -> None:
        """A child's copy would keep the folder locked when this process is killed."""
        self._close()

    def _refuse_or_replace(self, holder: Holder | None) -> None:
        if holder is None or not holder.precedes(self.me):
            raise DistFairError(f"{self.path.parent} is in use ({holder or 'another process has it'}): wait for it, "
                                "stop it, or choose another out=")  # fmt: skip
        aside = self.path.with_name(f"{NAME}.{self.me.restarts}")
        aside.touch()
        os.replace(aside, self.path)

    def _mine(self) -> bool:
        """Whether the file that is locked here is the one that others find."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _holder(file: int) -> Holder | None:
    """What a lock says of who holds it; None while that is being written."""
    try:
        return Holder(**json.loads(os.pread(file, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None
