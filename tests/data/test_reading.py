"""Reading samples: the right pixels, nothing undetected, and bad samples as the policy says."""

import pickle
import struct
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest

from dist_fair.data import opencv as opencv_module
from dist_fair.data.reading import Reader, _fault, counts_by_group
from dist_fair.errors import DistFairError
from tests.data.making import bare_index, encoded, made_index, picture


def read(reader, *samples, epoch=0, **more):
    return reader.read(np.array(samples), np.full(len(samples), epoch), **more)


@pytest.fixture
def healthy(tmp_path):
    return made_index(tmp_path / "faces", [encoded(picture(i)) for i in range(12)])


@pytest.mark.parametrize(("extension", "off"), [("jpg", 12), ("png", 0), ("webp", 12)])
def test_pixels_are_rgb_and_those_of_the_image(tmp_path, extension, off):
    index = made_index(tmp_path, [encoded(picture(i), extension) for i in range(4)], extension=extension)
    result = read(Reader(index, 24), 3, 0)
    assert result.images.dtype == np.uint8
    for image, number in zip(result.images, (3, 0), strict=True):
        assert np.abs(image.astype(int) - picture(number)).mean() <= off
    assert result.samples.tolist() == [3, 0]
    assert result.bad == []


@pytest.mark.parametrize(("size", "way"), [(12, cv2.INTER_AREA), (40, cv2.INTER_LINEAR)])
def test_resized_by_area_down_and_linearly_up(tmp_path, size, way):
    index = made_index(tmp_path, [encoded(picture(i), "png") for i in range(2)], extension="png")
    expected = cv2.resize(picture(1), (size, size), interpolation=way)
    np.testing.assert_array_equal(read(Reader(index, size), 1).images[0], expected)


def test_grey_and_sixteen_bit_and_transparent_images_become_rgb(tmp_path):
    grey = picture(1)[..., 0]
    files = [grey, grey.astype(np.uint16) * 257, np.dstack([picture(1), grey])]
    index = made_index(tmp_path, [cv2.imencode(".png", file)[1].tobytes() for file in files], extension="png")
    images = read(Reader(index, 24), 0, 1, 2).images
    np.testing.assert_array_equal(images[0], np.dstack([grey] * 3))
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], picture(1)[..., ::-1])  # OpenCV writes what it takes for BGR


def test_padding_is_black(healthy):
    result = read(Reader(healthy, 24), 3, -1)
    assert result.images[1].max() == 0
    assert result.samples.tolist() == [3, -1]


def test_the_reader_travels_to_workers(healthy):
    reader = Reader(healthy, 24)
    before = read(reader, 5)
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(reader)), 5).images, before.images)


@pytest.mark.parametrize("policy", ["fail", "substitute"])
def test_a_shard_that_changed_since_it_was_indexed_is_an_error_under_any_policy(healthy, tmp_path, policy):
    path = tmp_path / "faces" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[healthy.image_offset[2] + 300] ^= 1  # one bit
    path.write_bytes(data)
    reader = Reader(healthy, 24, policy)
    read(reader, 1)
    with pytest.raises(DistFairError, match=r"0002 in .*/faces/00000.tar at byte \d+.*dist-fair shards index .*/faces"):
        read(reader, 2)


@pytest.mark.parametrize("policy", ["fail", "substitute"])
def test_a_shard_that_was_cut_is_an_error_under_any_policy(healthy, tmp_path, policy):
    path = tmp_path / "faces" / "00001.tar"
    path.write_bytes(path.read_bytes()[: int(healthy.image_offset[11]) + 50])
    with pytest.raises(DistFairError, match=r"00001\.tar"):
        read(Reader(healthy, 24, policy), 11)


def huge_png_header():
    """A PNG that claims 60,000 x 60,000 pixels: 10 GB once decoded."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + b"\x00\x00\x00\x00IEND\xaeB`\x82"


def broken(kind):
    whole = {extension: encoded(picture(1, 64), extension) for extension in ("jpg", "png", "webp")}
    return {
        "jpg without its end": ("jpg", whole["jpg"][:-2]),
        "half a jpg": ("jpg", whole["jpg"][: len(whole["jpg"]) // 2]),
        "half a jpg that ends in text": ("jpg", whole["jpg"][: len(whole["jpg"]) // 2] + b"\x00" * 99),
        "half a png": ("png", whole["png"][: len(whole["png"]) // 2]),
        "png without its end": ("png", whole["png"][:-12]),
        "png with a flipped byte": ("png", whole["png"][:400] + b"\x00\xff\x00" + whole["png"][403:]),
        "half a webp": ("webp", whole["webp"][: len(whole["webp"]) // 2]),
        "text": ("jpg", b"this is not an image"),
        "nothing": ("jpg", b""),
        "a gif": ("jpg", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"),
        "huge": ("png", huge_png_header()),
    }[kind]


BROKEN = ["jpg without its end", "half a jpg", "half a jpg that ends in text", "half a png", "png without its end",
          "png with a flipped byte", "half a webp", "text", "nothing", "a gif", "huge"]  # fmt: skip


def with_one_broken(folder, kind, count=12):
    """Sample 5 (fake, female) is broken; 1 and 9 are the other fake women."""
    extension, data = broken(kind)
    images = [encoded(picture(i), extension) for i in range(count)]
    return made_index(folder, [*images[:5], data, *images[6:]], extension=extension)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_fail_naming_place_and_settings(tmp_path, kind):
    index = with_one_broken(tmp_path / "faces", kind)
    with pytest.raises(DistFairError, match=r"0005 in .*/faces/00000.tar at byte \d+") as error:
        read(Reader(index, 24), 4, 5)
    assert "data.bad_samples=substitute" in str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if "byte" not in kind and kind != "huge"])
def test_a_missing_end_is_seen_without_the_decoder(kind):
    """OpenCV 5 refuses truncated images, OpenCV 4 fills them with grey."""
    assert _fault(broken(kind)[1]) is not None


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_give_way_to_one_of_the_same_group(tmp_path, kind):
    index = with_one_broken(tmp_path, kind)
    reader = Reader(index, 24, "substitute", seed=3)
    result = read(reader, 4, 5, epoch=2)
    (bad,) = result.bad
    assert (bad.sample, bad.epoch) == (5, 2)
    assert bad.replacement in (1, 9)
    assert result.samples.tolist() == [4, bad.replacement]
    np.testing.assert_array_equal(result.images[1], read(reader, bad.replacement).images[0])
    assert counts_by_group(index, result.bad) == {"fake, gender=female": 1}
    again = read(Reader(index, 24, "substitute", seed=3), 5, epoch=2)
    assert again.bad == result.bad


def test_substitutes_change_with_the_epoch(tmp_path):
    reader = Reader(with_one_broken(tmp_path, "text", 40), 24, "substitute")
    chosen = {read(reader, 5, epoch=epoch).samples[0] for epoch in range(40)}
    assert chosen == {1, 9, 13, 17, 21, 25, 29, 33, 37}


def test_evaluation_leaves_a_bad_sample_out(tmp_path):
    result = read(Reader(with_one_broken(tmp_path, "text"), 24, "substitute"), 4, 5, replace=False)
    assert result.samples.tolist() == [4, -1]
    assert result.images[1].max() == 0
    assert result.bad[0].replacement == -1


def test_without_another_of_the_group_the_label_decides(tmp_path):
    images = [b"broken" if i in (1, 5, 9) else encoded(picture(i)) for i in range(12)]
    index = made_index(tmp_path, images)
    for sample in (1, 5, 9):
        assert read(Reader(index, 24, "substitute"), sample).samples[0] in (3, 7, 11)


def test_without_any_other_there_is_an_error(tmp_path):
    index = made_index(tmp_path, [b"broken" if i % 2 else encoded(picture(i)) for i in range(6)])
    with pytest.raises(DistFairError, match="none of 64 others of its label"):
        read(Reader(index, 24, "substitute"), 1)


def test_a_camera_may_write_bytes_after_the_end(tmp_path):
    index = made_index(tmp_path, [encoded(picture(i)) + b"\x00 from a camera" for i in range(2)])
    assert read(Reader(index, 24), 0).bad == []


def test_check_before_training():
    index = bare_index([40])
    index.width[3], index.width[7] = 0, 30000
    index.height[7] = 2000
    with pytest.raises(DistFairError, match=r"2 of 40 samples are bad") as error:
        Reader(index, 24).check()
    assert "header cannot be read: 3 in /made/00000.tar" in str(error.value)
    assert "30000 x 2000 pixels are more than data.max_pixels=50000000" in str(error.value)
    assert Reader(index, 24, "substitute").check().tolist() == [3, 7]
    assert Reader(index, 24).check(np.arange(3)).tolist() == []
    assert Reader(index, 24, max_pixels=60_000_000, policy="substitute").check().tolist() == [3]
    index.width[:] = 65536
    index.height[:] = 65537  # 2**32 + 65536 pixels: 65536 in 32 bits
    assert len(Reader(index, 24, "substitute").check()) == 40


def test_an_image_over_the_cap_is_never_read(tmp_path, monkeypatch):
    index = made_index(tmp_path, [encoded(picture(i)) for i in range(4)])
    reader = Reader(replace(index, width=index.width * 0 + 10**6), 24, max_pixels=10**6)
    monkeypatch.setattr("dist_fair.data.storage.LocalStorage.read", None)
    with pytest.raises(DistFairError, match="1000000 x 24 pixels"):
        read(reader, 0)


def test_unknown_policy():
    with pytest.raises(DistFairError, match=r"data\.bad_samples=substitue: did you mean 'substitute'"):
        Reader(bare_index([4]), 24, "substitue")


def test_missing_opencv_says_what_to_install(monkeypatch):
    opencv_module.opencv.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(DistFairError, match=r"libGL(.|\n)*opencv-python-headless"):
        opencv_module.opencv()
    opencv_module.opencv.cache_clear()
