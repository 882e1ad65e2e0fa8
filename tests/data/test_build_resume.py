"""Builds that are stopped, repeated, or meet what is already there."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_fair.data import build as building
from dist_fair.data.build import MANIFEST, build
from dist_fair.data.index import read_index
from dist_fair.errors import DistFairError
from tests.data.shard_files import digests, faces, image, stored, write_table


def interrupted(stop: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Makes write_shard die at its call number `stop`; gives a function that tells which shards were written."""
    write, written = building.write_shard, []

    def dying(path: Path, samples: object) -> int:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, samples)

    monkeypatch.setattr(building, "write_shard", dying)
    return lambda: written


def test_a_build_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows = faces(tmp_path)
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    build([table], images, tmp_path / "whole", samples_per_shard=3)
    with monkeypatch.context() as patch:
        interrupted(2, patch)
        with pytest.raises(KeyboardInterrupt):
            build([table], images, out, samples_per_shard=3)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00001.tar", MANIFEST]
    written = interrupted(99, monkeypatch)
    seen = []
    build([table], images, out, samples_per_shard=3, progress=lambda done, total: seen.append((done, total)))
    assert written() == ["00002.tar", "00003.tar"]
    assert seen[:3] == [(2, 4), (3, 4), (4, 4)]
    assert digests(out) == digests(tmp_path / "whole")
    assert len(read_index(out)) == 12


def test_only_what_changed_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows = faces(tmp_path)
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    (index,) = build([table], images, out, samples_per_shard=3)
    written = interrupted(99, monkeypatch)
    build([table], images, out, samples_per_shard=3)
    assert written() == []
    path = index.keys[7].replace("__", "/")
    (file,) = images.glob(f"{path}.*")
    file.write_bytes(image(99, file.suffix[1:]))
    (index,) = build([table], images, out, samples_per_shard=3)
    assert written() == ["00002.tar"]
    assert stored(index, 7) == file.read_bytes()
    (out / "00001.tar").write_bytes(b"cut")
    build([table], images, out, samples_per_shard=3)
    assert written() == ["00002.tar", "00001.tar"]


def test_an_index_of_older_shards_does_not_outlive_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows = faces(tmp_path)
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    build([table], images, out)
    file = images / "v000" / "00.jpg"
    file.write_bytes(file.read_bytes()[::-1])  # as long as before, so that the sizes of the shards tell nothing
    with monkeypatch.context() as patch:
        patch.setattr(building, "index_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build([table], images, out)
    (index,) = build([table], images, out)
    sample = index.keys.tolist().index("v000__00")
    assert index.image_crc[sample] == zlib.crc32(file.read_bytes())


def interrupt(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_another_table_needs_overwrite(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    out = tmp_path / "out"
    build([write_table(tmp_path / "1.csv", rows)], images, out, samples_per_shard=3)
    before = digests(out)
    other = write_table(tmp_path / "2.csv", rows[:5])
    with pytest.raises(DistFairError, match=r"out holds shards of another table or other settings: .*--overwrite"):
        build([other], images, out, samples_per_shard=3)
    assert digests(out) == before
    (index,) = build([other], images, out, samples_per_shard=3, overwrite=True)
    assert len(index) == 5
    assert len(digests(out)) == 2


def test_shards_of_others_are_never_touched(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"theirs")
    for overwrite in (False, True):
        with pytest.raises(DistFairError, match=r"00000\.tar was not built here: move it away"):
            build([write_table(tmp_path / "t.csv", rows)], images, out, overwrite=overwrite)
    assert (out / "00000.tar").read_bytes() == b"theirs"
    (out / "00000.tar").unlink()
    (out / MANIFEST).write_text("{")
    with pytest.raises(DistFairError, match=r"build\.json cannot be used"):
        build([tmp_path / "t.csv"], images, out)


def test_an_image_that_vanishes_is_named_and_the_shard_is_not_left(tmp_path: Path, monkeypatch) -> None:
    images, rows = faces(tmp_path)
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path.with_name("gone") if path.name == "04.png" else path)
    )
    with pytest.raises(DistFairError, match=r"04\.png cannot be read: No such file"):
        build([table], images, out)
    assert [path.name for path in out.iterdir()] == [MANIFEST]
