"""Images that cannot be read, by the policy for bad samples."""

import json
import struct
import zlib

import pyarrow.parquet as parquet
import pytest

from tests.bad_input.making import COUNT, ODD, data_set, jpeg


def damaged_jpeg() -> bytes:
    whole = jpeg(ODD)
    return whole[: len(whole) * 2 // 3]


def bomb_png() -> bytes:
    """A PNG of 66 bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# name -> (the image, its extension, what is said of them, settings, known before anything is read)
BAD = {
    "cut": (damaged_jpeg(), "jpg", "the image is damaged", [], False),
    "noise": (b"not an image at all", "jpg", "the image's header cannot be read", [], True),
    "large": (jpeg(ODD, 64), "jpg", "64 x 64 pixels are more than data.max_pixels=2000", ["data.max_pixels=2000"],
              True),
    "huge": (bomb_png(), "png", "60000 x 60000 pixels are more than data.max_pixels=50000000", [], True),
}  # fmt: skip


@pytest.fixture(params=BAD)
def bad(request, tmp_path):
    image, extension, *rest = BAD[request.param]
    changes = {"image": image, "extension": extension}
    return data_set(tmp_path / "bad", changes, changes), *rest


def test_a_bad_image_fails_where_the_policy_is_to_fail(bad, train, refused, tmp_path):
    data, said, settings, known = bad
    if known:
        error = refused(*settings, data=data)
    else:
        code, _, error = train(*settings, data=data)
        assert code == 2
        assert not (tmp_path / "out" / "evaluation.json").exists()
        assert len([*(tmp_path / "out" / "checkpoints").iterdir()]) < 3
    assert said in error
    assert f"s{ODD:02d} in {data}/train/00000.tar at byte" in error
    assert "set data.bad_samples=substitute" in error


def test_a_bad_image_is_replaced_in_training_and_left_out_of_evaluation_where_the_policy_is_to_substitute(
    bad, train, tmp_path
):
    data, _, settings, _ = bad
    code, out, error = train(*settings, "data.bad_samples=substitute", data=data)
    assert (code, error) == (0, "")
    counted = f"warning: 1 reads of bad samples in {data}/%s (fake, gender=male, race=Black: 1); "
    assert counted % "train" + "other samples of the same label and attributes took their place" in out
    assert counted % "near" + "they were left out of the evaluation" in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["near"]["unreadable"] == 1
    ids = parquet.read_table(tmp_path / "out" / "predictions" / "near.parquet")["sample_id"].to_pylist()
    assert ids == [f"s{number:02d}" for number in range(COUNT) if number != ODD]


def test_a_bad_image_in_evaluation_alone_ends_with_the_training_kept(tmp_path, train):
    data = data_set(tmp_path / "data", near={"image": damaged_jpeg()})
    code, _, error = train(data=data)
    assert code == 2
    assert f"bad sample s{ODD:02d} in {data}/near/00000.tar" in error
    assert (tmp_path / "out" / "checkpoints" / "step-00000003" / "state.json").is_file()
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert not (tmp_path / "out" / "predictions").exists()
