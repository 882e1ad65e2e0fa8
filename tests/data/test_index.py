"""The index: what it says of a sample, how it survives the disk, and when it refuses to be used."""

import json
import shutil
import zlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_fair.data.index import INDEX_NAME, Column, Index, read_index, write_index
from dist_fair.data.indexing import index_folder
from dist_fair.data.values import Fields
from dist_fair.data.writing import Sample, write_shards
from dist_fair.errors import DistFairError
from tests.data.shard_files import image, members_of, write_tar


def assert_equal(one: Index, other: Index) -> None:
    for field in fields(Index):
        a, b = getattr(one, field.name), getattr(other, field.name)
        a, b = (x if isinstance(x, dict) else {"": x} for x in (a, b))
        assert a.keys() == b.keys(), field.name
        for name in a:
            if isinstance(a[name], Column):
                assert a[name].values == b[name].values, (field.name, name)
                np.testing.assert_array_equal(a[name].codes, b[name].codes)
                assert a[name].codes.dtype == b[name].codes.dtype == np.int32
            elif isinstance(a[name], np.ndarray):
                np.testing.assert_array_equal(a[name], b[name], err_msg=field.name)
                assert a[name].dtype == b[name].dtype, field.name
            else:
                assert a[name] == b[name], field.name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five samples in two shards: two fakes of one manipulation, one without, two reals, one without attributes."""
    write_tar(
        tmp_path / "set" / "00000.tar",
        [
            *members_of("b", 0, video="v1", identity="p", attributes={"gender": "male", "race": "White"}),
            *members_of("a", 1, label=1, video="v1", manipulation="swap", attributes={"gender": "male"}),
            *members_of("c", 2, label=1, video="v1", manipulation="swap", attributes={"gender": "", "race": None}),
        ],
    )
    write_tar(
        tmp_path / "set" / "00001.tar",
        [*members_of("e", 3, label=1), *members_of("d", 4, manipulation="ignored", attributes={"gender": "female"})],
    )
    return tmp_path / "set"


def test_the_index_says_what_the_shards_hold(folder: Path) -> None:
    index = index_folder(folder)
    assert index.names == ("set",)
    assert index.folders == (str(folder),)
    assert list(index.keys) == ["b", "a", "c", "e", "d"]
    assert index.labels.tolist() == [0, 1, 1, 1, 0]
    assert index.attributes["gender"].values == ("female", "male")
    assert index.attributes["gender"].codes.tolist() == [1, 1, -1, -1, 0]
    assert index.attributes["race"].codes.tolist() == [0, -1, -1, -1, -1]
    names = [index.videos.values[code] for code in index.videos.codes]
    assert names == ["real/v1", "swap/v1", "swap/v1", "fake/e", "real/d"]
    assert index.manipulations.values == ("swap",)
    assert index.manipulations.codes.tolist() == [-1, 0, 0, -1, -1]
    assert index.identities.codes.tolist() == [0, -1, -1, -1, -1]
    assert index.shard.tolist() == [0, 0, 0, 1, 1]
    assert index.image_crc.tolist() == [zlib.crc32(image(number)) for number in range(5)]
    assert set(zip(index.width, index.height, strict=True)) == {(10, 12)}
    assert index.place(3) == f"e in {folder}/00001.tar at byte 512"


def test_the_index_does_not_depend_on_the_workers(folder: Path) -> None:
    assert_equal(index_folder(folder, workers=1), index_folder(folder, workers=2))


def test_the_index_survives_the_disk(folder: Path) -> None:
    index = index_folder(folder)
    write_index(index)
    assert_equal(read_index(folder), index)
    assert sorted(path.name for path in folder.iterdir()) == ["00000.tar", "00001.tar", INDEX_NAME]


def test_the_index_moves_with_its_folder(folder: Path) -> None:
    write_index(index_folder(folder, name="ffpp"))
    moved = folder.rename(folder.parent / "moved")
    assert read_index(moved).folders == (str(moved),)
    assert read_index(moved).names == ("ffpp",)


def test_fields_of_other_peoples_shards(tmp_path: Path) -> None:
    record = {"target": "1", "clip": 7, "who": 3.0, "how": "swap", "sex": True, "age": 31.5, "race": "unknown"}
    write_tar(tmp_path / "0.tar", [("a.jpg", image()), ("a.json", json.dumps(record).encode())])
    fields = Fields("target", "clip", "who", "how", ("sex", "age"))
    index = index_folder(tmp_path, fields)
    assert index.labels.tolist() == [1]
    assert index.videos.values == ("swap/7",)
    assert index.identities.values == ("3",)
    assert {name: column.values for name, column in index.attributes.items()} == {"sex": ("true",), "age": ("31.5",)}
    assert fields.options() == [
        *("--label-field", "target", "--video-field", "clip", "--identity-field", "who"),
        *("--manipulation-field", "how", "--attributes", "sex,age"),
    ]
    with pytest.raises(DistFairError, match=r"no sample of .* has a value of attribute 'rase': did you mean 'race'"):
        index_folder(tmp_path, replace(fields, attributes=("rase",)))


def test_a_cls_member_is_the_label_where_no_json_has_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", image()), ("a.cls", b"1\n"), ("b.cls", b"0"), *members_of("b", label=1)])
    assert index_folder(tmp_path).labels.tolist() == [1, 1]


@pytest.mark.parametrize("label", [2, -1, 0.5, "fake", True, [1], "01", 1e300])
def test_a_label_outside_0_and_1_is_an_error(tmp_path: Path, label: object) -> None:
    write_tar(tmp_path / "0.tar", [*members_of("a"), *members_of("b", 1, label=label)])
    with pytest.raises(
        DistFairError, match=r"0\.tar: sample 'b' at byte \d+, field 'label': .*(label|plain value)"
    ) as e:
        index_folder(tmp_path)
    assert repr(label) in str(e.value)


@pytest.mark.parametrize("label", [None, "", float("nan")])
def test_a_missing_label_is_an_error(tmp_path: Path, label: object) -> None:
    write_tar(tmp_path / "0.tar", members_of("b", 1, label=label))
    with pytest.raises(DistFairError, match=r"sample 'b' at byte 0, field 'label': no label"):
        index_folder(tmp_path)


def test_a_fake_of_manipulation_real_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members_of("b", 1, label=1, manipulation="real"))
    with pytest.raises(DistFairError, match=r"sample 'b' .* label 1 \(fake\), but manipulation 'real'"):
        index_folder(tmp_path)


def test_a_key_that_comes_twice_is_an_error_naming_both_places(folder: Path) -> None:
    write_tar(folder / "00002.tar", members_of("x") + members_of("a"))
    with pytest.raises(DistFairError, match=r"'a' comes twice: a in .*00000\.tar at byte \d+, and a in .*00002\.tar"):
        index_folder(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_from_workers_as_they_are(folder: Path, workers: int) -> None:
    write_tar(folder / "00001.tar", members_of("x", label=3))
    with pytest.raises(DistFairError, match=r"00001\.tar: sample 'x'"):
        index_folder(folder, workers=workers)


def test_folders_without_shards_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DistFairError, match=r"no \.tar file in .*shards build"):
        index_folder(tmp_path)
    write_tar(tmp_path / "train" / "0.tar", members_of("a"))
    with pytest.raises(DistFairError, match="in its folders train: index each"):
        index_folder(tmp_path)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "0.tar.gz").touch()
    with pytest.raises(DistFairError, match="compressed"):
        index_folder(tmp_path / "gz")
    write_tar(tmp_path / "empty" / "0.tar", [("readme.txt", b"")])
    with pytest.raises(DistFairError, match="hold no sample"):
        index_folder(tmp_path / "empty")


def change_size(folder: Path) -> None:
    with open(folder / "00001.tar", "ab") as file:
        file.write(bytes(512))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "00001.tar").unlink(), r"00001\.tar is gone"),
        (lambda folder: shutil.copy(folder / "00001.tar", folder / "00002.tar"), r"00002\.tar is new"),
        (lambda folder: (folder / "00001.tar").rename(folder / "x.tar"), r"00001\.tar is gone, x\.tar is new"),
        (change_size, r"00001\.tar has 10752 bytes, not 10240"),
    ],
)
def test_a_stale_index_names_the_change_and_the_command(folder: Path, change: object, said: str) -> None:
    write_index(index_folder(folder, Fields(attributes=("gender",))), Fields(attributes=("gender",)).options())
    change(folder)
    command = f"dist-fair shards index {folder} --attributes gender"
    with pytest.raises(DistFairError, match=rf"index\.parquet is stale: {said}; index the folder again: {command}$"):
        read_index(folder)


def test_a_missing_index_names_the_command(folder: Path) -> None:
    with pytest.raises(DistFairError, match=rf"has no index\.parquet; make it: dist-fair shards index {folder}"):
        read_index(folder)
    with pytest.raises(DistFairError, match="is no folder"):
        read_index(folder / "nowhere")
    write_index(index_folder(folder))
    with pytest.raises(DistFairError, match=r"has no index\.parquet, but these folders in it have: set"):
        read_index(folder.parent)


def test_a_damaged_or_foreign_index_is_an_error(folder: Path) -> None:
    path = write_index(index_folder(folder))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DistFairError, match=r"is not an index of shards, or is damaged .*make it again: dist-fair"):
        read_index(folder)
    pa.parquet.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(DistFairError, match="is not an index of shards"):
        read_index(folder)


def test_another_format_version_is_an_error(folder: Path) -> None:
    path = write_index(index_folder(folder))
    table = pa.parquet.read_table(path)
    about = json.loads(table.schema.metadata[b"dist_fair"]) | {"format": 0}
    pa.parquet.write_table(table.replace_schema_metadata({b"dist_fair": json.dumps(about).encode()}), path)
    with pytest.raises(
        DistFairError, match=r"has format 0, this version reads 1; make it again: dist-fair shards index"
    ):
        read_index(folder)


def test_with_values_orders_the_declared_and_forgets_the_rest(folder: Path) -> None:
    index = index_folder(folder).with_values({"gender": ["male", "divers", "female"]})
    assert list(index.attributes) == ["gender"]
    assert index.attributes["gender"].values == ("male", "divers", "female")
    assert index.attributes["gender"].codes.tolist() == [0, 0, -1, -1, 2]
    only = index.with_values({"gender": ["female"]}).attributes["gender"]
    assert only.codes.tolist() == [-1, -1, -1, -1, 0]
    assert index.with_values({"gender": []}).attributes["gender"].values == ("female", "male")


def test_with_values_names_the_folder_that_lacks_an_attribute(folder: Path, tmp_path: Path) -> None:
    index = index_folder(folder)
    with pytest.raises(DistFairError, match=rf"no sample of {folder} has attribute 'gendre': did you mean 'gender'"):
        index.with_values({"gendre": []})
    write_tar(tmp_path / "bare" / "0.tar", members_of("a"))
    both = Index.concatenate([index, index_folder(tmp_path / "bare")])
    with pytest.raises(DistFairError, match=rf"no sample of {tmp_path / 'bare'} has attribute 'gender'"):
        both.with_values({"gender": []})


def test_concatenated_indexes_keep_every_sample(folder: Path, tmp_path: Path) -> None:
    write_tar(
        tmp_path / "other" / "0.tar", members_of("a", 9, label=1, manipulation="blur", attributes={"gender": "x"})
    )
    parts = [index_folder(folder), index_folder(tmp_path / "other"), index_folder(folder)]
    whole = Index.concatenate(parts)
    assert len(whole) == 11
    assert whole.names == ("set", "other", "set")
    assert whole.shard_folders.tolist() == [0, 0, 1, 2, 2]
    start = 0
    for part in parts:
        rows = range(start, start + len(part))
        assert [whole.place(i) for i in rows] == [part.place(i) for i in range(len(part))]
        for name in ("videos", "identities", "manipulations"):
            assert texts(getattr(whole, name))[start : rows.stop] == texts(getattr(part, name))
        assert texts(whole.attributes["gender"])[start : rows.stop] == texts(part.attributes["gender"])
        start = rows.stop
    assert texts(whole.attributes["race"])[5] is None
    assert Index.concatenate([parts[0]]) is parts[0]
    with pytest.raises(DistFairError, match="no dataset"):
        Index.concatenate([])


def texts(column: Column) -> list[str | None]:
    return [column.values[code] if code >= 0 else None for code in column.codes]


@given(st.lists(st.lists(st.none() | st.text(max_size=3), min_size=1), min_size=1, max_size=3))
def test_columns_are_sorted_and_lossless(parts: list[list[str | None]]) -> None:
    parts = [[value and value.encode(errors="replace").decode() for value in part] for part in parts]
    columns = [Column.of(part) for part in parts]
    for column, part in zip(columns, parts, strict=True):
        assert column.values == tuple(sorted({value for value in part if value is not None}))
        assert texts(column) == part
        assert texts(Column.of(column.arrow())) == part
    whole = Column.concatenate(columns)
    assert texts(whole) == [value for part in parts for value in part]
    assert texts(Column(("unused", *whole.values), whole.codes + (whole.codes >= 0)).compacted()) == texts(whole)


def test_many_shards_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = image()
    samples = (Sample(f"{i:03d}", picture, "jpg", {"label": i % 2, "video": str(i // 3)}) for i in range(200))
    assert write_shards(samples, tmp_path, 7) == 29
    index = index_folder(tmp_path)
    write = pa.parquet.write_table
    monkeypatch.setattr(pa.parquet, "write_table", lambda *a, **k: write(*a, **k, row_group_size=13))
    write_index(index)
    assert_equal(read_index(tmp_path), index)
