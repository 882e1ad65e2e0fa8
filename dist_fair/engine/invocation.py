"""One start of a verb that runs on ranks: what may end it before its time, and what it holds until then."""

from pathlib import Path
from typing import TYPE_CHECKING

from dist_fair.engine.preemption import Preemption, seconds
from dist_fair.errors import DistFairError

if TYPE_CHECKING:
    from dist_fair.collectives import Communicator
    from dist_fair.engine.run_lock import RunLock
    from dist_fair.engine.watchdog import Watchdog

SILENCE = 30.0  # seconds; a rank that is lost has its third more to be noticed by all


class Invocation:
    """Entered by an entry point before anything else; a session then makes it known to its ranks and its folder.

    Not entered, as where a script makes a session of its own, it keeps no signals and has no heartbeats.
    Raises DistFairError for DIST_FAIR_GRACE or DIST_FAIR_SILENCE that are no numbers of seconds.
    """

    def __init__(self):
        self.preemption = Preemption()
        self._silence, self._entered = seconds("DIST_FAIR_SILENCE", SILENCE), False
        self._watchdog: Watchdog | None = None
        self._held: dict[Path, RunLock | None] = {}

    def __enter__(self) -> "Invocation":
        self.preemption.__enter__()
        self._entered = True
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Raises RankLost in the place of an error that the loss of another rank is behind."""
        try:
            for lock in self._held.values():
                if lock:
                    lock.release()
            if self._watchdog:
                self._watchdog.close(error)
        finally:
            self.preemption.__exit__()

    def connect(self, comm: "Communicator") -> None:
        """The ranks know each other from here on. Called on all of them together; a later `comm` replaces the first."""
        from dist_fair.engine.watchdog import Watchdog

        self.preemption.whereabouts = comm.__str__
        if self._watchdog:
            self._watchdog.comm = comm
        elif self._entered and self._silence and comm.world > 1:
            self._watchdog = Watchdog(comm, self._silence)

    def hold(self, folder: Path, doing: str, comm: "Communicator") -> str | None:
        """Keeps other jobs out of a folder until this invocation ends; a warning where that cannot be.

        doing: "trained" or "evaluated", for who is kept out. Raises DistFairError, on every rank, where another job is
        at work there, or the folder cannot be made.
        """
        from dist_fair.engine.run_lock import RunLock

        if not self._entered or folder in self._held:
            return None
        self._held[folder], warning, refusal = None, None, None
        if comm.rank == 0:
            lock = RunLock(folder, doing)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                warning, self._held[folder] = lock.acquire(), lock
            except OSError as error:
                refusal = f"{folder} cannot be written ({error.strerror}): choose another out="
            except DistFairError as error:
                refusal = str(error)
        if refusal := comm.objects(refusal, "run lock")[0]:
            error = DistFairError(refusal)
            error.everywhere = True
            raise error
        return warning

    def check(self) -> None:
        """Raises DistFairError if a folder that was held has been taken over by a later start of the same job."""
        for lock in self._held.values():
            if lock:
                lock.check()
