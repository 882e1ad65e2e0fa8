import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dist_fair.demographics import Groups
from dist_fair.errors import DistFairError
from dist_fair.metrics import Predictions
from tests.metrics.predicted import make


def small(**changes):
    columns = {
        "sample_id": ["a", "b", "c"],
        "video": ["real/1", "real/1", "fake/1"],
        "label": [0, 0, 1],
        "score": [0.1, 0.2, 0.9],
        "attributes": {"gender": ["female", "unknown", "male"]},
    }
    return Predictions(**{**columns, **changes})


def test_a_file_read_back_is_what_was_written(tmp_path):
    written = make()
    written.write(tmp_path / "new" / "demo.parquet")
    read = Predictions.read(tmp_path / "new" / "demo.parquet")
    for name in ("sample_id", "video", "label", "score"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert list(read.attributes) == ["gender", "race"]
    for name, values in written.attributes.items():
        np.testing.assert_array_equal(read.attributes[name], values)
    columns = pyarrow.parquet.read_schema(tmp_path / "new" / "demo.parquet").names
    assert columns == ["sample_id", "video", "label", "gender", "race", "score"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo.parquet"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "demo.parquet"
    small().write(path)
    before = path.read_bytes()

    def half(table, file):
        file.write(b"PAR1")
        raise OSError("no space left")

    monkeypatch.setattr(pyarrow.parquet, "write_table", half)
    with pytest.raises(OSError, match="no space"):
        make().write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_nulls_of_other_writers_are_unknown(tmp_path):
    table = {
        "sample_id": ["a", "b"],
        "video": ["r", "f"],
        "label": [0, 1],
        "race": ["Asian", None],
        "score": [0.0, 1.0],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    assert Predictions.read(tmp_path / "x.parquet").attributes["race"].tolist() == ["Asian", "unknown"]


def test_a_file_that_is_no_predictions_is_named(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    pyarrow.parquet.write_table(pyarrow.table({"score": [0.5]}), tmp_path / "other.parquet")
    table = {"sample_id": ["a"], "video": ["v"], "label": [2], "score": [0.5]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "label.parquet")
    for name, complaint in (
        ("torn", "can be read"),
        ("other", "missing"),
        ("label", "label 2"),
        ("none", "can be read"),
    ):
        with pytest.raises(DistFairError, match=f"{name}.parquet.*{complaint}"):
            Predictions.read(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"label": [0, 0, 2]}, "label 2 .*sample 'c'"),
        ({"label": [0, 0, 0.5]}, "label 0.5"),
        ({"score": [0.1, np.nan, 0.2]}, "score nan .*sample 'b'"),
        ({"score": [0.1, 0.2, np.inf]}, "score inf .*sample 'c'"),
        ({"sample_id": ["a", "b", "a"]}, "sample 'a' is there 2 times"),
        ({"label": [0, 1, 1]}, "video 'real/1' has real and fake samples"),
        ({"video": ["real/1", "real/1"]}, "different lengths"),
        ({"attributes": {"score": ["x", "y", "z"]}}, "attribute 'score'"),
        ({name: [] for name in ("sample_id", "video", "label", "score")} | {"attributes": {}}, "no samples"),
    ],
)
def test_bad_columns_are_named(changes, complaint):
    with pytest.raises(DistFairError, match=complaint):
        small(**changes)


def test_vocabulary_declared_or_found():
    predictions = small()
    assert predictions.vocabulary({"gender": []}) == {"gender": ("female", "male")}
    assert predictions.vocabulary({"gender": ["male"]}) == {"gender": ("male",)}
    assert predictions.codes(Groups(("gender",), (("male",),))).tolist() == [-1, -1, 0]
    with pytest.raises(DistFairError, match=r"'gendr'.*did you mean 'gender'"):
        predictions.vocabulary({"gendr": []})
