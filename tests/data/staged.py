"""Data sets for the tests of staging, and ranks that stage them on pretended nodes."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from dist_fair.collectives import Communicator
from dist_fair.data import node_copy
from dist_fair.data.index import Index, read_index, write_index
from dist_fair.data.reading import Reader
from dist_fair.data.staging import Staging
from dist_fair.errors import DistFairError
from tests.data.making import encoded, made_index, picture


def made(folder: Path, shards: int = 4, first: int = 0) -> Index:
    """An indexed folder of so many shards, four pictures each."""
    write_index(made_index(folder, [encoded(picture(first + i)) for i in range(4 * shards)], shards))
    return read_index(folder)


def images(index: Index) -> np.ndarray:
    """All samples of an index, read."""
    return Reader(index, 24).read(np.arange(len(index)), np.zeros(len(index), int)).images


def copies(disk: Path) -> list[str]:
    """The files under a node's disk, without the lock."""
    found = (path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(node_copy.LOCK_NAME))


@contextlib.contextmanager
def unchecked():
    """The planted bug: the checksum of a copy is not compared with the index's."""
    digest = SimpleNamespace(update=lambda chunk: None, hexdigest=lambda: mock.ANY)
    with mock.patch.object(node_copy, "hashlib", SimpleNamespace(blake2b=lambda **_: digest)):
        yield


def stage_on_nodes(
    comm: Communicator, sources: Sequence[Path], disks: Sequence[Path], setting: str = "$NODE_DISK/copies"
) -> tuple:
    """What one of two ranks a node does: (folders of the copies, whether all reads the same) or the error's text."""
    node, local = divmod(comm.rank, comm.world // len(disks))
    os.environ.update(LOCAL_RANK=str(local), NODE_DISK=str(disks[node]))
    indexes = [read_index(source) for source in sources]
    try:
        staging = Staging(setting, indexes, comm)
        reports = []
        staged = staging.run(lambda megabytes, **nodes: reports.append(megabytes))
    except DistFairError as error:
        return str(error), error.everywhere
    same = all(np.array_equal(images(one), images(other)) for one, other in zip(indexes, staged, strict=True))
    return [index.folders for index in staged], same, sum(reports) == staging.megabytes
