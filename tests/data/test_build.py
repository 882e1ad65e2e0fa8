"""Building shards from tables: same bytes for the same input, resumable, and nothing written on bad input."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dist_fair.data.build import MANIFEST, build
from dist_fair.data.index import INDEX_NAME, Index, read_index
from dist_fair.data.tables import TableOptions
from dist_fair.errors import DistFairError
from tests.data.shard_files import digests, faces, image, stored, write_table


def text(index: Index, attribute: str, sample: int) -> str:
    column = index.attributes[attribute]
    return column.values[column.codes[sample]] if column.codes[sample] >= 0 else ""


def check(index: Index, rows: list[dict], images: Path) -> None:
    """The index holds exactly the rows of the table, with the bytes of their files."""
    by_key = {str(row["path"]).replace("/", "__").split(".")[0]: row for row in rows}
    assert sorted(index.keys) == sorted(by_key)
    for sample, key in enumerate(index.keys):
        row = by_key[key]
        assert index.labels[sample] == row["label"]
        assert stored(index, sample) == (images / row["path"]).read_bytes()
        assert text(index, "gender", sample) == row["gender"]
        assert text(index, "race", sample) == row["race"]
        video = index.videos.values[index.videos.codes[sample]]
        assert video == f"{'fake' if row['label'] else 'real'}/{row['video']}"


def test_shards_hold_what_the_table_says(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    table = write_table(tmp_path / "t.csv", rows)
    (index,) = build([table], images, tmp_path / "out", samples_per_shard=5)
    check(index, rows, images)
    assert index.names == ("out",)
    assert [shard.path for shard in index.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted((index.shard == shard).sum() for shard in range(3)) == [4, 4, 4]
    assert read_index(tmp_path / "out").keys.tolist() == index.keys.tolist()
    assert sorted(os.listdir(tmp_path / "out")) == ["00000.tar", "00001.tar", "00002.tar", MANIFEST, INDEX_NAME]


def test_csv_and_parquet_give_the_same_bytes(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    write_table(tmp_path / "t.csv", rows)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    build([tmp_path / "t.csv"], images, tmp_path / "csv", samples_per_shard=5)
    build([tmp_path / "t.parquet"], images, tmp_path / "parquet", samples_per_shard=5)
    assert digests(tmp_path / "csv") == digests(tmp_path / "parquet")


def test_bytes_do_not_depend_on_workers_time_or_the_order_of_rows(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    build([write_table(tmp_path / "1.csv", rows)], images, tmp_path / "one", samples_per_shard=5)
    for file in images.rglob("*.*"):
        os.utime(file, (1, 1))
    build([write_table(tmp_path / "2.csv", rows[::-1])], images, tmp_path / "two", samples_per_shard=5, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    build([tmp_path / "1.csv"], images, tmp_path / "three", samples_per_shard=5, seed=1)
    assert digests(tmp_path / "one") != digests(tmp_path / "three")


def test_kept_order_is_that_of_the_table(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    table = write_table(tmp_path / "t.csv", rows)
    (index,) = build([table], images, tmp_path / "out", shuffle=False)
    assert index.keys.tolist() == [row["path"].replace("/", "__").split(".")[0] for row in rows]
    (mixed,) = build([table], images, tmp_path / "mixed")
    assert index.keys.tolist() != mixed.keys.tolist()


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    import webdataset

    images, rows = faces(tmp_path, identity="someone")
    (index,) = build([write_table(tmp_path / "t.csv", rows)], images, tmp_path / "out", samples_per_shard=5)
    urls = [str(tmp_path / "out" / shard.path) for shard in index.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == index.keys.tolist()
    for number, sample in enumerate(theirs):
        extension = next(name for name in ("jpg", "png", "webp") if name in sample)
        assert sample[extension] == stored(index, number)
        record = json.loads(sample["json"])
        assert record["label"] == index.labels[number]
        assert record["identity"] == "someone"
        assert record["attributes"].get("gender", "") == text(index, "gender", number)


def test_splits_become_folders_and_data_sets(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    rows = [{**row, "split": ("train", "test")[n // 8]} for n, row in enumerate(rows)]
    test, train = build([write_table(tmp_path / "t.csv", rows)], images, tmp_path / "out", name="ffpp")
    assert (test.names, train.names) == (("ffpp-test",), ("ffpp-train",))
    check(test, rows[8:], images)
    check(train, rows[:8], images)
    assert "split" not in train.attributes


def test_columns_can_be_renamed_and_attributes_chosen(tmp_path: Path) -> None:
    images, rows = faces(tmp_path, age="007")
    rows = [{"file": row["path"], "label": row["label"], "race": row["race"], "age": row["age"]} for row in rows]
    options = TableOptions(attributes=("age",), rename={"file": "path"}, video_pattern=r"^(v\d+)/")
    (index,) = build([write_table(tmp_path / "t.csv", rows)], images, tmp_path / "out", options=options)
    assert {name: column.values for name, column in index.attributes.items()} == {"age": ("007",)}
    assert {video.partition("/")[2] for video in index.videos.values} == {"v000", "v001", "v002", "v003"}


def test_keys_that_fall_together_are_told_apart(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(["a/b.jpg", "a__b.jpg", "a/b.png", "a.b/c.jpg"]):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image(number, name[-3:]))
        rows.append({"path": name, "label": 0})
    keys = []
    for order in (rows, rows[::-1]):
        out = tmp_path / str(len(keys))
        (index,) = build([write_table(tmp_path / "t.csv", order)], tmp_path / "images", out)
        keys.append(index.keys.tolist())
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 4
    assert "a_b__c" in keys[0]
    assert sum(key.startswith("a__b-") for key in keys[0]) == 3


def bad(rows: list[dict], images: Path) -> dict[str, tuple[list[dict], str]]:
    row = rows[0]
    return {
        "label": ([{**row, "label": 2}, *rows[1:]], r"line 2, field 'label': label '2'; it must be 0 \(real\) or 1"),
        "no label": ([*rows[:-1], {**rows[-1], "label": ""}], r"line 13, field 'label': no label"),
        "column": ([{"path": r["path"], "lable": 0} for r in rows], "no column 'label'.*did you mean 'lable'"),
        "duplicate": (
            [*rows, {**row, "path": "./v000/../" + row["path"]}],
            r"line 14: path .* line 2; each image once",
        ),
        "missing": (
            [*rows, *({**row, "path": f"gone{n}.jpg"} for n in range(12))],
            r"12 of 24 images are not in .*: gone0\.jpg \(.* line 14\), .*gone9\.jpg \(.* line 23\) and 2 more",
        ),
        "extension": ([*rows, {**row, "path": "x.gif"}], r"line 14: 'x\.gif' is not \.jpg, \.png or \.webp"),
        "outside": ([*rows, {**row, "path": "../x.jpg"}], r"line 14: path '\.\./x\.jpg' leaves the images' folder"),
        "absolute": ([*rows, {**row, "path": "/x.jpg"}], "leaves the images' folder"),
        "split": ([{**r, "split": "a/b"} for r in rows], r"split 'a/b' is to be a folder"),
        "no split": ([{**r, "split": ""} for r in rows], r"line 2: no split"),
    }


@pytest.mark.parametrize("case", bad([{"path": "x"}], Path()).keys())
def test_bad_tables_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    images, rows = faces(tmp_path)
    rows, said = bad(rows, images)[case]
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(DistFairError, match=said):
        build([table], images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no column 'path'"),
        (b"path,label\n", "the table has no row"),
        (b"path,label\na.jpg\n", r"t\.csv line 2 has 1 values, the header 2"),
        (b"path,label,path\n", "two columns 'path'"),
        (b'path,label\n"a.jpg,0\n', r"line \d is not CSV"),
        (b"path,label\n\xff\xfe,0\n", "is not UTF-8"),
        (b"path,label\n,0\n", "line 2: no path"),
    ],
)
def test_broken_csv_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DistFairError, match=said):
        build([tmp_path / "t.csv"], tmp_path, tmp_path / "out")


def test_broken_parquet_and_missing_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DistFairError, match="is not a Parquet table"):
        build([tmp_path / "t.parquet"], tmp_path, tmp_path / "out")
    with pytest.raises(DistFairError, match="is no file; give a CSV or Parquet table"):
        build([tmp_path / "u.csv"], tmp_path, tmp_path / "out")


def test_wrong_options_are_named(tmp_path: Path) -> None:
    images, rows = faces(tmp_path)
    table = write_table(tmp_path / "t.csv", rows)
    cases: list[tuple[dict, str]] = [
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"layout": "pgfdd"}, "layout 'pgfdd' is unknown: did you mean 'pg_fdd'"),
        ({"options": TableOptions(attributes=("rce",))}, "no column 'rce'.*did you mean 'race'"),
        ({"options": TableOptions(rename={"pth": "path"})}, "no column 'pth' to rename: did you mean 'path'"),
        ({"options": TableOptions(rename={"race": "gender"})}, "two columns 'gender'"),
        ({"options": TableOptions(video_pattern="(")}, r"pattern '\(' is no regular expression"),
    ]
    for options, said in cases:
        with pytest.raises(DistFairError, match=said):
            build([table], images, tmp_path / "out", **options)
    rows = [{**row, "video": ""} for row in rows]
    with pytest.raises(DistFairError, match=r"line 2: the video pattern 'id' does not occur in 'v000/00\.jpg'"):
        build([write_table(table, rows)], images, tmp_path / "out", options=TableOptions(video_pattern="id"))
