"""Image sizes from headers, without decoding."""

import warnings
import zlib
from pathlib import Path

import pytest

from dist_fair.data.indexing import image_size, index_folder
from tests.data.shard_files import image, write_tar


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_image_sizes_come_from_the_header(extension: str) -> None:
    data = image(0, extension, height=7, width=11)
    assert image_size(data) == (11, 7)
    assert image_size(data[:20]) == (0, 0)
    assert image_size(b"") == image_size(b"GIF89a" + bytes(50)) == (0, 0)


def test_the_size_of_a_huge_image_is_known_without_decoding_it() -> None:
    data = bytearray(image(0, "png"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(bytes(data)) == (60_000, 60_000)


def test_an_unreadable_image_has_no_size(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"no image"), ("a.cls", b"1")])
    assert index_folder(tmp_path).width.tolist() == [0]
