"""Byte ranges of local files, and files that are there whole or not at all."""

import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_fair.data import storage
from dist_fair.data.storage import LocalStorage, chunks, replacing
from dist_fair.errors import DistFairError


def test_reads_exactly_the_bytes_asked_for(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(range(100)))
    local = LocalStorage(tmp_path)
    assert local.read("0.tar", 10, 5) == bytes(range(10, 15))
    assert local.read("0.tar", 100, 0) == b""
    assert local.size("0.tar") == 100
    local.close()
    assert local.read("0.tar", 0, 1) == b"\x00"


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(100))
    with pytest.raises(DistFairError, match=r"0\.tar ends at byte 100, where bytes 90 to 110 were wanted"):
        LocalStorage(tmp_path).read("0.tar", 90, 20)


def test_short_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(range(50)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda number, size, offset: pread(number, min(size, 7), offset))
    assert LocalStorage(tmp_path).read("0.tar", 1, 40) == bytes(range(1, 41))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    local = LocalStorage(tmp_path / "nowhere")
    for call in (local.shards, lambda: local.size("0.tar"), lambda: local.read("0.tar", 0, 1)):
        with pytest.raises(DistFairError, match="nowhere"):
            call()


def test_shards_are_the_tars_by_name(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.tar.gz", "index.parquet", ".a.tar.part"):
        (tmp_path / name).touch()
    assert LocalStorage(tmp_path).shards() == ["a.tar", "b.tar"]


def test_open_files_are_bounded_and_threads_are_never_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    for number in range(8):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    local = LocalStorage(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda i: local.read(f"{i % 8}.tar", i % 500, 9), range(800)))
    assert read == [bytes([i % 8]) * 9 for i in range(800)]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def _read(local: LocalStorage, queue: multiprocessing.Queue) -> None:
    queue.put(local.read("0.tar", 3, 4))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_can_read(tmp_path: Path, start: str) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(range(10)))
    local = LocalStorage(tmp_path)
    local.read("0.tar", 0, 1)
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_read, args=(local, queue))
    process.start()
    assert queue.get(timeout=60) == bytes(range(3, 7))
    process.join(60)
    assert pickle.loads(pickle.dumps(local)).folder == local.folder


def test_chunks_are_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK", 7)
    for size in (0, 6, 7, 20):
        (tmp_path / "0.tar").write_bytes(bytes(range(size)))
        assert b"".join(chunks(LocalStorage(tmp_path), "0.tar")) == bytes(range(size))


def test_replacing_leaves_the_old_file_or_the_whole_new_one(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["kept"]
