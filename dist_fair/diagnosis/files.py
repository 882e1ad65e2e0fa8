"""Checks of the file system of run folders: seen by all ranks, locks and renames that hold everywhere, space."""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, ok, problem, warning
from dist_fair.errors import DistFairError

HUNG = "the file system of out= does not answer: `stat -f` on it and `dmesg` on this node tell whether its server is up"
PATIENCE = 30.0  # seconds until a file that another node wrote must be seen; NFS hides new ones for up to that long
RENAMES = 50
GIGABYTE = 10**9
SHARED = "out= must lie on a file system that all nodes share, under one path"


def visible(site: Site) -> Verdict:
    """A file that rank 0 writes: when does each rank see it?"""
    with _scratch(site, "visible") as folder:
        if site.ranks.rank == 0:
            (folder / "seen").write_text(folder.name)
        site.ranks.tell("visible/written")
        began = time.monotonic()
        seen = _await(folder / "seen")
        seconds = time.monotonic() - began
    if not seen:
        return problem(
            "run folder", f"{folder.parent}: what rank 0 writes is not seen here within {PATIENCE:.0f} s", SHARED
        )
    if seconds > 2:
        return warning("run folder", f"{folder.parent}: what rank 0 writes is seen here after {seconds:.0f} s",
                       "resuming may wait that long: mount it with actimeo=1, or take another file system")  # fmt: skip
    return ok("run folder", f"{folder.parent}: written, and seen by all ranks at once", alike=True)


def locks(site: Site) -> Verdict:
    """flock: a lock that rank 0 holds must keep every other one away, or two jobs may write one run folder."""
    ranks = site.ranks
    with _scratch(site, "locks") as folder:
        if ranks.rank == 0:
            held = open(folder / "lock", "w")  # noqa: SIM115
            refusal = _flock(held)
            ranks.tell("locks/held", refusal)
            outcome = _locked(folder / "lock") if refusal is None else None
        else:
            refusal = ranks.tell("locks/held")
            outcome = _locked(folder / "lock") if refusal is None and _await(folder / "lock") else None
        ranks.collect("locks/tried")
        if ranks.rank == 0:
            held.close()
    fix = "mount it with flock (Lustre: -o flock; NFS: without local_lock), or take another file system for out="
    if refusal is not None:
        return problem("flock", f"{folder.parent}: {refusal}", fix)
    if outcome is None:
        return problem("flock", f"{folder.parent}: the file that is locked is not seen here", SHARED)
    if outcome:
        return problem(
            "flock", f"{folder.parent}: a lock of rank 0 is not seen here: two jobs could write one run", fix
        )
    return ok("flock", f"{folder.parent}: a lock holds on all ranks", alike=True)


def renames(site: Site) -> Verdict:
    """A file that rank 0 replaces again and again must never be gone or half written for a reader."""
    ranks = site.ranks
    with _scratch(site, "renames") as folder:
        path, fault = folder / "renamed", None
        if ranks.rank == 0:
            _replace(path, 0)
        ranks.tell("renames/begun")
        present = _await(path)
        for number in range(1, RENAMES if present else 0):
            if ranks.rank == 0:
                _replace(path, number)
            fault = fault or _torn(path)
            time.sleep(0.002)
    if not present:
        return problem("rename", f"{folder.parent}: what rank 0 writes is not seen here", SHARED)
    if fault is not None:
        return problem("rename", f"{folder.parent}: a file was {fault} while rank 0 replaced it",
                       "renaming must be atomic there: no object store behind a file system for out=")  # fmt: skip
    return ok("rename", f"{folder.parent}: whole at every moment of {RENAMES} replacements", alike=True)


def free_space(site: Site) -> Verdict | None:
    """Bytes and inodes for checkpoints. Quotas are not seen here."""
    if site.ranks.rank > 0:
        return None
    place = next(path for path in (site.out.absolute(), *site.out.absolute().parents) if path.is_dir())
    state = os.statvfs(place)
    free, inodes = state.f_bavail * state.f_frsize, state.f_favail
    found = f"{place}: {free / GIGABYTE:.1f} GB" + (f", {inodes:,} inodes" if state.f_files else "")
    if free < GIGABYTE or (state.f_files and inodes < 1000):
        return problem("free space", f"{found} free", "delete old runs, or choose another out=")
    if free < 10 * GIGABYTE or (state.f_files and inodes < 10_000):
        return warning("free space", f"{found} free", "a run keeps checkpoint.keep checkpoints: is that enough?")
    return ok("free space", f"{found} free; quotas not known")


@contextmanager
def _scratch(site: Site, key: str) -> Iterator[Path]:
    """A folder in the run folder that rank 0 makes, names to all, and removes when all are done with it."""
    ranks, out = site.ranks, site.out.absolute()
    if ranks.rank > 0:
        name, fault = ranks.tell(f"{key}/folder")
        if fault is not None:
            raise DistFairError(fault)
        try:
            yield out / name
        finally:
            ranks.collect(f"{key}/done")
        return
    folder, made, fault = out / f".doctor-{uuid.uuid4().hex[:12]}", _absent(out), None
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        fault = f"{out} cannot be written: {error.strerror}: choose another out=, on a disk that is yours"
    ranks.tell(f"{key}/folder", [folder.name, fault])
    if fault is not None:
        raise DistFairError(fault)
    try:
        yield folder
    finally:
        ranks.collect(f"{key}/done")
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another job has begun to use it
            for path in made:
                path.rmdir()


def _absent(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _await(path: Path) -> bool:
    """Is the file there within PATIENCE? The folder is listed, which has NFS look again."""
    until = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            return False
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.05)
    return True


def _flock(file) -> str | None:
    """Locks, or says why not."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"flock does not work there ({error.strerror})"
    return None


def _locked(path: Path) -> bool:
    """Could the lock be taken?"""
    with open(path) as file:
        return _flock(file) is None


def _replace(path: Path, number: int) -> None:
    aside = path.with_name("aside")
    aside.write_text(chr(ord("a") + number % 26) * 4096)
    os.replace(aside, path)


def _torn(path: Path) -> str | None:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return "gone"
    except OSError as error:  # ESTALE: the reader is told, and may read again
        return f"unreadable ({error.strerror})"
    return None if len(text) == 4096 and len({*text}) == 1 else "half written"
