"""Reading tar files that others wrote: every format, every way to be broken, nothing executed."""

import json
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_fair.data import tar
from dist_fair.data.indexing import index_folder
from dist_fair.data.storage import LocalStorage
from dist_fair.errors import DistFairError
from tests.data.shard_files import image, members_of, write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def samples(path: Path) -> list[tar.TarSample]:
    return list(tar.samples(LocalStorage(path.parent), path.name, str(path)))


@pytest.mark.parametrize("format", FORMATS)
def test_members_of_every_tar_format_are_found_at_their_bytes(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "key"  # 87 characters: fits ustar's prefix; the next needs an extended header elsewhere
    names = ["a.jpg", "b/c.d.jpg", f"{long}.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names += ["x" * 180 + ".json", "grüße.jpg"]
    path = write_tar(tmp_path / "0.tar", [(name, name.encode() * 40) for name in names], format)
    data = path.read_bytes()
    found = list(tar.members(LocalStorage(tmp_path), "0.tar", "0.tar"))
    assert [member.name for member in found] == names
    assert [data[member.offset : member.offset + member.size] for member in found] == [n.encode() * 40 for n in names]
    with tarfile.open(path) as archive:
        assert [member.header for member in found] == [info.offset for info in archive.getmembers()]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=8),
    shards=st.integers(1, 3),
    format=st.sampled_from(FORMATS),
    width=st.integers(1, 160),
)
def test_offsets_in_the_index_are_those_of_the_images_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shards: int, format: int, width: int
) -> None:
    if format == tarfile.USTAR_FORMAT:
        width = min(width, 80)
    folder = tmp_path_factory.mktemp("shards")
    images = {}
    for shard in range(shards):
        content = []
        for number, size in enumerate(sizes):
            key = f"{shard}-{number}-".ljust(width, "k")
            images[key] = bytes([number]) * size
            content += [(f"{key}.txt", b"?" * (size // 2)), (f"{key}.JPG", images[key]), (f"{key}.cls", b"1\n")]
        write_tar(folder / f"{shard}.tar", content, format)
    index = index_folder(folder)
    storage = LocalStorage(folder)
    read = {
        index.keys[i]: storage.read(
            index.shards[index.shard[i]].path, int(index.image_offset[i]), int(index.image_size[i])
        )
        for i in range(len(index))
    }
    assert read == images
    assert list(index.keys) == list(images)  # canonical order: shards by name, samples as they lie


def test_keys_and_extensions_follow_webdataset(tmp_path: Path) -> None:
    import webdataset

    names = ["a.b/c.jpg", "a.b/c.json", "d.seg.png", "d.png", "e.JSON", "e.jpeg", "noextension", "__meta__", "f.txt"]
    path = write_tar(tmp_path / "0.tar", [(name, b"{}") for name in names])
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [sample.key for sample in samples(path)] == theirs == ["a.b/c", "d", "e", "f"]
    assert [sorted(sample.members) for sample in samples(path)] == [["jpg", "json"], ["png"], ["jpeg", "json"], []]


def test_members_of_a_sample_must_be_neighbours(tmp_path: Path) -> None:
    (jpg, text), (other, _) = members_of("a"), members_of("b")
    path = write_tar(tmp_path / "0.tar", [jpg, other, text])
    header = next(m.header for m in tar.members(LocalStorage(tmp_path), "0.tar", "") if m.name == "a.json")
    with pytest.raises(DistFairError, match=rf"{path}: 'a.json' at byte {header} belongs to sample 'a', .* byte 0 "):
        samples(path)


def test_hidden_files_of_macos_do_not_part_a_sample(tmp_path: Path) -> None:
    jpg, text = members_of("d/a")
    path = write_tar(tmp_path / "0.tar", [("d/._a.jpg", b"x"), jpg, ("d/._a.json", b"x"), text, ("d/._b.jpg", b"x")])
    assert [sorted(sample.members) for sample in samples(path)] == [["jpg", "json"]]


@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("a.jpg", "a.png"), ("a.jpg", "a.json", "a.json")])
def test_a_sample_has_one_image_and_one_json(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = write_tar(tmp_path / "0.tar", [(name, b"{}") for name in names])
    with pytest.raises(DistFairError, match=r"sample 'a' has both 'a\.\w+' at byte \d+ and 'a\.\w+' at byte \d+"):
        samples(path)


def test_a_truncated_tar_is_an_error_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", members_of("a") + members_of("b", 1)).read_bytes()
    last = max(m.offset + m.size for m in tar.members(LocalStorage(tmp_path), "whole.tar", ""))
    end = -(-last // 512) * 512  # here the end-of-archive blocks start
    path = tmp_path / "cut.tar"
    for length in [*range(0, end, 128), end - 1, end, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(DistFairError, match=r"cut\.tar is (truncated or damaged: at byte \d+ of|no tar file)"):
            samples(path)
    path.write_bytes(whole[: end + 512])
    assert len(samples(path)) == 2


def test_a_damaged_header_does_not_end_the_shard_silently(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", members_of("a") + members_of("b", 1))
    header = [m.header for m in tar.members(LocalStorage(tmp_path), "0.tar", "")][2]
    data = bytearray(path.read_bytes())
    data[header + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DistFairError, match=rf"at byte {header} of"):
        samples(path)


def test_a_huge_size_in_a_header_is_an_error(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DistFairError, match=r"at byte 0 of 1536: 'a.jpg' has 1099511627776 bytes"):
        samples(tmp_path / "0.tar")


def test_a_negative_size_in_a_header_is_an_error(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = -1536
    (tmp_path / "0.tar").write_bytes(bytes(512) + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    write_tar(tmp_path / "1.tar", [("b.jpg", b"")])
    whole = (tmp_path / "1.tar").read_bytes()[:512] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    (tmp_path / "1.tar").write_bytes(whole)
    with pytest.raises(DistFairError, match="truncated or damaged"):
        samples(tmp_path / "1.tar")


def test_a_compressed_tar_says_so(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DistFairError, match="is compressed"):
        samples(tmp_path / "0.tar")


class Bomb:
    """Leaves a file behind when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "npy", "jpg.pkl"])
def test_a_pickle_member_is_never_loaded(tmp_path: Path, extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    path = write_tar(tmp_path / "0.tar", [*members_of("a"), (f"a.{extension}", bomb), *members_of("b", 1)])
    read = []
    original = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda *a: read.append(original(*a)) or read[-1])
    assert [sorted(sample.members) for sample in samples(path)] == [["jpg", "json"]] * 2
    index = index_folder(tmp_path)
    assert list(index.keys) == ["a", "b"]
    assert not trace.exists()
    assert image(1) in read  # so the spy sees what is read
    assert bomb not in read


def test_links_and_folders_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert samples(tmp_path / "0.tar") == []


def test_a_json_that_is_none_is_named(tmp_path: Path) -> None:
    for text in [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000]:
        write_tar(tmp_path / "0.tar", [("a.jpg", image()), ("a.json", text)])
        with pytest.raises(DistFairError, match=r"0\.tar: sample 'a' at byte 0: its \.json"):
            index_folder(tmp_path)


def test_a_sample_without_image_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.bmp", image()), ("a.json", json.dumps({"label": 1}).encode())])
    with pytest.raises(DistFairError, match=r"sample 'a' at byte 0 has no image: expected one of \.jpg, \.jpeg"):
        index_folder(tmp_path)
