"""Indexes and shards that cannot be trusted."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.bad_input.making import COUNT, folder_of, index, jpeg
from tests.command_line.runs import GENDERS, RACES
from tests.data.shard_files import write_tar


def test_no_index(data, refused):
    (data / "train" / "index.parquet").unlink()
    error = refused(data=data)
    assert f"{data}/train has no index.parquet" in error
    assert f"dist-fair shards index {data}/train" in error


def test_no_folder(data, refused):
    shutil.rmtree(data / "near")
    assert f"{data}/near is no folder" in refused(data=data)


def test_a_damaged_index(data, refused):
    path = data / "near" / "index.parquet"
    path.write_bytes(path.read_bytes()[:100])
    error = refused(data=data)
    assert str(path) in error
    assert f"make it again: dist-fair shards index {data}/near" in error


def rewritten(shards: Path) -> str:
    write_tar(shards / "00001.tar", [("other.jpg", jpeg(0)), ("other.json", b'{"label": 0}')])
    return "00001.tar has"


def added(shards: Path) -> str:
    shutil.copy(shards / "00001.tar", shards / "00002.tar")
    return "00002.tar is new"


def removed(shards: Path) -> str:
    (shards / "00000.tar").unlink()
    return "00000.tar is gone"


def truncated(shards: Path) -> str:
    os.truncate(shards / "00001.tar", 9000)
    return "00001.tar has 9000 bytes"


@pytest.mark.parametrize(("change", "part"), [
    (rewritten, "train"), (added, "train"), (removed, "train"), (truncated, "train"), (added, "near"),
])  # fmt: skip
def test_a_stale_index(data, refused, change, part):
    said = change(data / part)
    error = refused(data=data)
    assert f"{data}/{part}/index.parquet is stale: {said}" in error
    assert f"dist-fair shards index {data}/{part}" in error


def test_bytes_changed_since_the_index_at_the_same_size(data, train, tmp_path):
    path = data / "train" / "00000.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xd8\xff")  # of the first image
    content[start + 200] ^= 0xFF
    path.write_bytes(content)
    for policy in ("fail", "substitute"):
        out = tmp_path / policy
        code, _, error = train(f"data.bad_samples={policy}", f"out={out}", data=data)
        assert code == 2
        assert not (out / "evaluation.json").exists()
        assert f"s00 in {path} at byte {start}: the bytes are not those that were indexed" in error
        assert "restore it, or if the change is meant: dist-fair shards index" in error


@pytest.mark.parametrize("indexed", [False, True])
def test_a_truncated_tar_is_not_indexed(tmp_path, capsys, indexed):
    folder = folder_of(tmp_path / "shards")
    if indexed:
        assert index(folder) == 0
    before = {path: path.read_bytes() for path in folder.glob("*.parquet")}
    os.truncate(folder / "00001.tar", 9000)
    assert index(folder) == 2
    error = capsys.readouterr().err
    assert f"{folder}/00001.tar is truncated or damaged: at byte" in error
    assert "copy or write the shard again" in error
    assert {path: path.read_bytes() for path in folder.glob("*.parquet")} == before
    assert {path.name for path in folder.iterdir()} <= {"00000.tar", "00001.tar", "index.parquet"}


@pytest.mark.parametrize("label", [2, -1, 0.5, "real", None])
def test_a_label_outside_0_and_1(tmp_path, capsys, label):
    folder = folder_of(tmp_path / "shards", label=label)
    assert index(folder) == 2
    error = capsys.readouterr().err
    assert f"{folder}/00000.tar: sample 's07'" in error
    assert "label" in error
    assert not (folder / "index.parquet").exists()


class Bomb:
    """Unpickled, makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_a_shard_is_never_loaded(data, train, tmp_path):
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))
    members = []
    for number in range(COUNT):
        attributes = {"gender": GENDERS[number // 2 % 2], "race": RACES[number // 4 % 3]}
        about = {"label": number % 2, "attributes": attributes}
        members += [(f"k{number:02d}.{extension}", bomb) for extension in ("pkl", "pickle", "pyd", "pth")]
        members += [(f"k{number:02d}.jpg", jpeg(number)), (f"k{number:02d}.json", json.dumps(about).encode())]
    shutil.rmtree(data / "train")
    write_tar(data / "train" / "00000.tar", [("bomb.pkl", bomb), *members])
    assert index(data / "train") == 0
    code, _, error = train(data=data)
    assert (code, error) == (0, "")
    assert not mark.exists()


def test_a_pickle_as_weights_is_never_loaded(refused, tmp_path):
    mark, path = tmp_path / "exploded", tmp_path / "weights.pth"
    torch.save({"state_dict": Bomb(mark)}, path)
    assert f"{path}: cannot be read as weights without executing it" in refused(
        f"detector.pretrained={path}", "detector.name=resnet18"
    )
    assert f"{path} is no safetensors file" in refused(f"detector.init_from={path}")
    assert not mark.exists()
