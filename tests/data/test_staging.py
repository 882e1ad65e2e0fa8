"""Copies of shards on local disks: whole, checked, made once a node, used again; and what stops all ranks."""

import fcntl
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dist_fair.collectives import Communicator
from dist_fair.data import node_copy, storage
from dist_fair.data.index import Index, read_index, write_index
from dist_fair.data.indexing import index_folder
from dist_fair.data.staging import Staging, local_folder
from dist_fair.errors import DistFairError
from tests.data.staged import copies, images, made, stage_on_nodes, unchecked
from tests.ranks import run_ranks


@pytest.fixture
def source(tmp_path: Path) -> Index:
    return made(tmp_path / "source")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def stage(disk: Path, *indexes: Index, rows: list | None = None) -> list[Index]:
    return Staging(str(disk), indexes, Communicator(), rows).run()


def change(path: Path) -> None:
    """Another byte in the first image; size and time stay."""
    data, times = bytearray(path.read_bytes()), path.stat()
    data[900] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_copy_reads_as_the_source(source: Index, disk: Path) -> None:
    (staged,) = stage(disk, source)
    assert Path(staged.folders[0]).parent == disk
    assert len(copies(disk)) == 4
    assert np.array_equal(images(source), images(staged))
    shutil.rmtree(source.folders[0])
    assert len(images(staged)) == len(source)


def test_what_is_there_is_used_again_and_other_data_get_a_folder_of_their_own(
    source: Index, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (staged,) = stage(disk, source)
    monkeypatch.setattr(node_copy, "LocalStorage", None)  # nothing is read from the source
    assert Staging(str(disk), [source], Communicator()).megabytes == 0
    assert stage(disk, source)[0].folders == staged.folders
    monkeypatch.undo()
    change(Path(source.folders[0]) / "00001.tar")
    write_index(index_folder(source.folders[0]))
    (other,) = stage(disk, read_index(source.folders[0]))
    assert other.folders != staged.folders
    assert len(copies(disk)) == 8


def test_folders_that_training_and_evaluation_share_are_copied_once(source: Index, disk: Path, tmp_path: Path) -> None:
    second = made(tmp_path / "second", shards=2, first=100)
    shutil.copytree(source.folders[0], tmp_path / "same")
    same = read_index(tmp_path / "same")
    both, alone, third = stage(disk, Index.concatenate([source, second]), second, same)
    assert both.folders == (third.folders[0], alone.folders[0])
    assert len(copies(disk)) == 6
    assert np.array_equal(images(both)[16:], images(alone))


def test_only_the_shards_that_are_read_are_copied(source: Index, disk: Path) -> None:
    rows = np.flatnonzero(np.isin(source.shard, [1, 3]))
    (staged,) = stage(disk, source, rows=[rows])
    assert [Path(name).name for name in copies(disk)] == ["00001.tar", "00003.tar"]
    assert stage(disk, source)[0].folders == staged.folders
    assert len(copies(disk)) == 4


def test_a_shard_that_changed_after_it_was_indexed_is_refused(source: Index, disk: Path) -> None:
    change(Path(source.folders[0]) / "00002.tar")
    with pytest.raises(DistFairError, match=r"rank 0 on .*00002\.tar is not as it was indexed .*shards index"):
        stage(disk, source)
    assert not any(name.endswith(("00002.tar", ".part")) for name in copies(disk))


def test_that_would_not_be_noticed_without_the_checksum(source: Index, disk: Path) -> None:
    change(Path(source.folders[0]) / "00002.tar")
    with unchecked():
        stage(disk, source)
    assert len(copies(disk)) == 4


@pytest.mark.parametrize("size", [0, 100])
def test_a_copy_of_another_size_is_made_again(source: Index, disk: Path, size: int) -> None:
    stage(disk, source)
    os.truncate(disk / copies(disk)[2], size)
    (staged,) = stage(disk, source)
    assert np.array_equal(images(source), images(staged))


def test_too_little_space_is_said_before_anything_is_copied(
    source: Index, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(disk, source, rows=[np.arange(4)])
    monkeypatch.setattr(node_copy.shutil, "disk_usage", lambda path: SimpleNamespace(free=node_copy.RESERVE + 1000))
    with pytest.raises(DistFairError, match=r"e-05 GB of shards are to be copied to .*disk, where 0\.268 GB are free"):
        stage(disk, source)
    assert len(copies(disk)) == 1
    stage(disk, source, rows=[np.arange(4)])  # nothing is missing: no space is needed


def test_a_disk_that_fills_up_is_named(source: Index, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(DistFairError, match=r"copying to .*disk: \[Errno 28\] No space left on device"):
        stage(disk, source)
    assert copies(disk) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("$NOT_SET/x", r"\$NOT_SET/x: \$NOT_SET is not set"),
        ("${EMPTY}/x", r"\$EMPTY is not set"),
        ("/a/$", "a \\$ is followed by the name of a variable"),
        ("faces", "an absolute path on the node's local disk"),
        ("s3://bucket/faces", "an absolute path on the node's local disk"),
    ],
)
def test_no_local_folder(monkeypatch: pytest.MonkeyPatch, source: Index, setting: str, message: str) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(DistFairError, match=message):
        stage(setting, source)


def test_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK", "/local")
    assert local_folder("$DISK/${DISK}s/a") == Path("/local//locals/a")


def test_a_killed_copy_leaves_whole_shards_and_goes_on(source: Index, disk: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0"):
        run_ranks(1, _killed_after, Path(source.folders[0]), disk, 2)
    assert [Path(name).suffix for name in copies(disk)] == [".part", ".tar", ".tar"]
    staging = Staging(str(disk), [source], Communicator())
    assert staging._bytes == sum(shard.size for shard in source.shards[2:])
    (staged,) = staging.run()
    assert np.array_equal(images(source), images(staged))
    assert [Path(name).suffix for name in copies(disk)] == [".tar"] * 4


def _killed_after(comm: Communicator, source: Path, disk: Path, shards: int) -> None:
    replaced = iter(range(shards))
    rename = os.replace

    def replace(*paths: Path) -> None:
        if next(replaced, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    node_copy.THREADS, storage.os.replace = 1, replace
    Staging(str(disk), [read_index(source)], comm).run()


def test_two_jobs_on_one_node_take_turns(source: Index, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_fair.data.staging.INTERVAL", 0.05)
    disk.mkdir()
    with open(disk / node_copy.LOCK_NAME, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        staging, seen = Staging(str(disk), [source], Communicator()), []
        copying = threading.Thread(target=staging.run, args=(lambda megabytes, **nodes: seen.append(nodes),))
        copying.start()
        while {"copying": 0, "waiting": 1} not in seen:
            time.sleep(0.01)
        assert copies(disk) == []
        stage(disk.with_name("other"), source)
        shutil.copytree(disk.with_name("other"), disk, dirs_exist_ok=True, ignore=lambda *_: [node_copy.LOCK_NAME])
        monkeypatch.setattr(node_copy, "LocalStorage", None)  # what the other job copied is not read again
    copying.join()
    assert staging._copy.fault is None
    assert staging._copy.state(0).done == staging._bytes


def test_what_stops_a_run_stops_its_copy(source: Index, disk: Path) -> None:
    def stop(megabytes: int, **nodes: int) -> None:
        raise KeyboardInterrupt

    staging = Staging(str(disk), [source], Communicator())
    with pytest.raises(KeyboardInterrupt):
        staging.run(stop)
    assert not any(thread.name.startswith("staging") for thread in threading.enumerate())
    assert all(name.endswith(".tar") for name in copies(disk))


def test_each_node_copies_once(tmp_path: Path) -> None:
    made(tmp_path / "train")
    made(tmp_path / "test", 2, first=50)
    disks = [tmp_path / "node0", tmp_path / "node1"]
    sources = [tmp_path / "train", tmp_path / "test"]
    results = run_ranks(4, stage_on_nodes, sources, disks)
    assert all(result[1:] == (True, True) for result in results)
    for node, disk in enumerate(disks):
        assert len(copies(disk)) == 6
        for rank in (2 * node, 2 * node + 1):
            assert all(folder.startswith(f"{disk}/copies/") for folders in results[rank][0] for folder in folders)


def test_one_node_that_fails_stops_all_ranks(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    disks = [tmp_path / "node0", tmp_path / "node1"]
    disks[1].write_text("a file is no folder")
    (told,) = {*run_ranks(4, stage_on_nodes, [tmp_path / "source"], disks)}
    assert told[1]
    assert "could not be copied to the nodes: rank 2 on " in told[0]
    assert f"copying to {disks[1]}/copies: [Errno 20] Not a directory" in told[0]
    disks[1].unlink()
    change(Path(source.folders[0]) / "00003.tar")
    (told,) = {*run_ranks(4, stage_on_nodes, [tmp_path / "source"], disks)}
    assert "00003.tar is not as it was indexed" in told[0]


def test_ranks_of_a_node_with_different_paths_are_told(tmp_path: Path) -> None:
    made(tmp_path / "source")
    disks = [tmp_path / "task0", tmp_path / "task1"]
    (told,) = {*run_ranks(2, _with_own_path, tmp_path / "source", disks)}
    assert f"rank 1 on {os.uname().nodename}: {disks[1]}" in told[0]
    assert "is not seen from here: all ranks of a node need one data.stage_to" in told[0]


def _with_own_path(comm: Communicator, source: Path, disks: list[Path]) -> tuple:
    return stage_on_nodes(comm, [source], [Path("unused")], str(disks[comm.rank]))
