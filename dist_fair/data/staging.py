"""Copies of shards on each node's local disk, made once a node, so that training does not read a shared file system.

    STAGE_TO/NAME-FINGERPRINT/00000.tar        FINGERPRINT: of names, sizes and checksums of the folder's shards

A copy is named after what is in it, so a changed data set gets a folder of its own and nothing that another job reads
is ever replaced. A shard has its final name only once its checksum is that of the index and it is on the disk: what is
there may be used by every later job, and a copy that was killed goes on where it stopped. Indexes stay where they are:
they have been read and checked when staging begins.
"""

import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np
import torch

from dist_fair.collectives import Communicator
from dist_fair.data.index import Index, Shard
from dist_fair.data.node_copy import NodeCopy, ShardFolder, State
from dist_fair.errors import DistFairError

INTERVAL = 1.0  # seconds between two looks at the copying; a collective that waited for all of it would time out
MEGABYTE = 10**6

Report = Callable[..., None]  # (megabytes more, copying=nodes, waiting=nodes: for another job, if any do)


def local_folder(stage_to: str) -> Path:
    """The folder meant by data.stage_to on this node, `$NAME` of the environment expanded.

    Raises DistFairError for a variable that is unset or empty, and for what is no absolute path.
    """
    template = Template(stage_to)
    if not template.is_valid():
        raise DistFairError(f"data.stage_to={stage_to}: a $ is followed by the name of a variable, such as $TMPDIR")
    for name in template.get_identifiers():
        if not os.environ.get(name):
            raise DistFairError(f"data.stage_to={stage_to}: ${name} is not set: name the node's local disk by a "
                                "variable that this cluster sets, such as $TMPDIR, or by its path")  # fmt: skip
    path = Path(template.substitute(os.environ))
    if not path.is_absolute() or "://" in stage_to:
        raise DistFairError(f"data.stage_to={stage_to}: an absolute path on the node's local disk, such as $TMPDIR")
    return path


class Staging:
    """The copies that a run needs on its nodes. Making one checks the disks and writes nothing; on every rank.

    stage_to: data.stage_to. indexes: what will be read, the same on all ranks. rows: the samples of each that will
    be, None for all; shards without any are left out. The rank of each node with LOCAL_RANK 0 copies.
    megabytes: to copy, over all nodes. Raises DistFairError on every rank where one of them cannot stage.
    """

    def __init__(
        self,
        stage_to: str,
        indexes: Sequence[Index],
        comm: Communicator,
        rows: Sequence[np.ndarray | None] | None = None,
    ):
        self.indexes, self.comm, self._copy = indexes, comm, None
        with self._agreed():
            self.root = local_folder(stage_to)
            self._folders = shard_folders(self.root, indexes, rows or [None] * len(indexes))
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                self._copy = NodeCopy(self.root, self._folders)
                self._copy.check_space()
        own = self._copy.total if self._copy else 0
        self._bytes = int(comm.sum(torch.tensor(own, device=comm.device), "staging/total"))
        self.megabytes = -(-self._bytes // MEGABYTE)

    def run(self, report: Report = lambda megabytes, **nodes: None) -> list[Index]:
        """Copies what is missing and returns the indexes with the copies as their folders; on every rank.

        report is called on every rank, as often, about once a second. Raises DistFairError on every rank, naming the
        node, if one of them fails: no space, or a shard whose bytes are not those of the index.
        """
        with self._agreed():
            if self._copy is not None:
                self._copy.start()
            try:
                self._follow(report)
            finally:
                if self._copy is not None:
                    self._copy.stop()
            if self._copy is not None and self._copy.fault is not None:
                raise self._copy.fault
        with self._agreed():
            self._check_visible()
        return [replace(index, folders=tuple(map(str, _targets(self.root, index)))) for index in self.indexes]

    def _follow(self, report: Report) -> None:
        """Until all nodes are done or one has failed."""
        shown, working = 0, 1
        while working:
            own = self._copy.state(INTERVAL) if self._copy else State()
            sums = self.comm.sum(torch.tensor(own, device=self.comm.device), "staging")
            done, working, waiting, failed = sums.tolist()
            megabytes = self.megabytes if done == self._bytes else done // MEGABYTE
            report(megabytes - shown, copying=working - waiting, **({"waiting": waiting} if waiting else {}))
            shown = megabytes
            if failed:
                return

    def _check_visible(self) -> None:
        for folder in self._folders:
            if missing := folder.missing():
                raise DistFairError(f"{folder.target / missing[0].path} is not seen from here: all ranks of a node "
                                    "need one data.stage_to, on one disk")  # fmt: skip

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """What goes wrong inside on one rank is raised on all of them, with the rank and its node named."""
        fault = None
        try:
            yield
        except (DistFairError, OSError) as error:
            fault = str(error)
        found = self.comm.objects([socket.gethostname(), fault], "staging/faults")
        faults = [f"rank {rank} on {host}: {text}" for rank, (host, text) in enumerate(found) if text is not None]
        if faults:
            more = f"\nand {len(faults) - 1} more ranks failed" if len(faults) > 1 else ""
            error = DistFairError(f"shards could not be copied to the nodes: {faults[0]}{more}")
            error.everywhere = True
            raise error


def shard_folders(root: Path, indexes: Sequence[Index], rows: Sequence[np.ndarray | None]) -> list[ShardFolder]:
    """The folders of all indexes, each once, with the shards that hold any of the rows."""
    folders: dict[Path, ShardFolder] = {}
    for index, chosen in zip(indexes, rows, strict=True):
        read = np.unique(index.shard if chosen is None else index.shard[chosen])
        for number, target in enumerate(_targets(root, index)):
            folder = folders.setdefault(target, ShardFolder(Path(index.folders[number]), target, {}))
            own = [index.shards[shard] for shard in read if index.shard_folders[shard] == number]
            folder.shards |= {shard.path: shard for shard in own}
    return [*folders.values()]


def _targets(root: Path, index: Index) -> list[Path]:
    """Where the copy of each folder of an index lies."""
    targets = []
    for number, name in enumerate(index.names):
        shards = [shard for shard, folder in zip(index.shards, index.shard_folders, strict=True) if folder == number]
        plain = re.sub(r"[^\w-]+", "-", name).strip("-") or "shards"
        targets.append(root / f"{plain}-{fingerprint(shards)}")
    return targets


def fingerprint(shards: Sequence[Shard]) -> str:
    """16 hexadecimal digits of names, sizes and checksums: with the same ones, two folders hold the same bytes."""
    text = "\n".join(f"{shard.path} {shard.size} {shard.checksum}" for shard in shards)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
