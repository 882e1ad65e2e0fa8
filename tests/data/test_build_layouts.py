"""The CSV files of PG-FDD's authors, with their traps."""

from pathlib import Path

import pytest

from dist_fair.data.build import build
from dist_fair.data.index import Index
from dist_fair.data.tables import TableOptions
from dist_fair.errors import DistFairError
from tests.data.shard_files import image, write_table

RACES = ("Asian", "White", "Black", "Other")


def row(
    images: Path, name: str, label: int, gender: str, race: str, spe: int | None = None, asian: bool = True
) -> dict:
    """A row as the authors write it, and its image."""
    file = images / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(image(len(name)))
    races = RACES if asian else RACES[1:]
    flags = {f"is{other.lower()}": 1 if race == other else -1 for other in races[:-1]}
    code = ("male", "female").index(gender) * len(races) + races.index(race)
    found = {"img_path": name, "label": label, "ismale": 1 if gender == "male" else -1, **flags, "intersec_label": code}
    return found if spe is None else {**found, "spe_label": spe}


def facts(index: Index) -> dict[str, tuple[str, ...]]:
    def value(column, sample):
        return column.values[column.codes[sample]] if column.codes[sample] >= 0 else "-"

    return {
        key: (
            ("real", "fake")[index.labels[n]],
            *(value(index.attributes[name], n) for name in ("gender", "race")),
            value(index.manipulations, n),
        )
        for n, key in enumerate(index.keys)
    }


def test_the_five_files_become_three_splits(tmp_path: Path) -> None:
    images, tables = tmp_path / "images", tmp_path / "tables"
    tables.mkdir()
    fakes = [row(images, f"f{n}.png", 1, "male", race, n + 1) for n, race in enumerate(RACES)]
    write_table(tables / "faketrain.csv", [*fakes, row(images, "f4.png", 1, "female", "Black", 5)])
    write_table(tables / "realtrain.csv", [row(images, f"r{n}.png", 0, "female", race) for n, race in enumerate(RACES)])
    write_table(tables / "fakeval.csv", [row(images, "v1.png", 1, "female", "White", 2)])
    write_table(tables / "realval.csv", [row(images, "v0.png", 0, "male", "Black")])
    write_table(
        tables / "test.csv", [row(images, "t0.png", 0, "male", "Asian"), row(images, "t1.png", 1, "male", "Other")]
    )
    test, train, val = build([tables], images, tmp_path / "out", layout="pg_fdd")
    assert facts(train) == {
        "f0": ("fake", "male", "Asian", "Deepfakes"),
        "f1": ("fake", "male", "White", "Face2Face"),
        "f2": ("fake", "male", "Black", "FaceSwap"),
        "f3": ("fake", "male", "Other", "NeuralTextures"),
        "f4": ("fake", "female", "Black", "FaceShifter"),
        **{f"r{n}": ("real", "female", race, "-") for n, race in enumerate(RACES)},
    }
    assert facts(val) == {"v0": ("real", "male", "Black", "-"), "v1": ("fake", "female", "White", "Face2Face")}
    assert facts(test) == {"t0": ("real", "male", "Asian", "-"), "t1": ("fake", "male", "Other", "-")}


def test_files_without_asian_column_have_other_codes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    rows = [
        row(images, f"{gender}{race}.png", 0, gender, race, asian=False)
        for gender in ("male", "female")
        for race in RACES[1:]
    ]
    assert [r["intersec_label"] for r in rows] == [0, 1, 2, 3, 4, 5]
    (index,) = build([write_table(tmp_path / "celeb_test.csv", rows)], images, tmp_path / "out", layout="pg_fdd")
    assert {found[1:3] for found in facts(index).values()} == {(g, r) for g in ("male", "female") for r in RACES[1:]}


def test_undecided_flags_are_unknown(tmp_path: Path) -> None:
    images = tmp_path / "images"
    rows = [row(images, "a.png", 0, "male", "White"), row(images, "b.png", 0, "male", "Other")]
    rows[0]["ismale"], rows[1]["isblack"] = 0, "0.0"
    (index,) = build([write_table(tmp_path / "test.csv", rows)], images, tmp_path / "out", layout="pg_fdd")
    assert facts(index) == {"a": ("real", "-", "White", "-"), "b": ("real", "male", "-", "-")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"isblack": 1}, "line 2 is marked White and Black"),
        ({"ismale": 2}, "line 2: ismale is '2'; it must be one of 1, -1, 0"),
        ({"ismale": "yes"}, "line 2: ismale is 'yes'"),
        ({"intersec_label": 2}, "intersec_label 2 means male, Black, but the columns say male, White"),
        ({"intersec_label": 8}, "intersec_label is '8'"),
        ({"spe_label": 0}, r"label 1, but spe_label 0 \(0 real, 1 to 5 fake\)"),
        ({"spe_label": 6}, "spe_label is '6'"),
        ({"label": 2}, "label '2'"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: dict, said: str) -> None:
    images = tmp_path / "images"
    rows = [{**row(images, "a.png", 1, "male", "White", 1), **change}]
    with pytest.raises(DistFairError, match=said):
        build([write_table(tmp_path / "faketrain.csv", rows)], images, tmp_path / "out", layout="pg_fdd")


def test_swapped_race_columns_are_noticed(tmp_path: Path) -> None:
    rows = [row(tmp_path / "images", "a.png", 0, "male", "White")]
    swap = {"iswhite": "isblack", "isblack": "iswhite"}
    options = TableOptions(rename=swap)
    with pytest.raises(DistFairError, match=r"means male, White, but the columns say male, Black .*header's order"):
        build(
            [write_table(tmp_path / "test.csv", rows)],
            tmp_path / "images",
            tmp_path / "out",
            layout="pg_fdd",
            options=options,
        )


def test_other_files_and_options_are_refused(tmp_path: Path) -> None:
    images = tmp_path / "images"
    table = write_table(tmp_path / "faces.csv", [row(images, "a.png", 0, "male", "White")])
    with pytest.raises(DistFairError, match="its name shows no split"):
        build([table], images, tmp_path / "out", layout="pg_fdd")
    with pytest.raises(DistFairError, match=r"no column 'path'.*--rename"):
        build([table], images, tmp_path / "out")
    with pytest.raises(DistFairError, match="no column 'img_path'"):
        build([write_table(tmp_path / "test.csv", [{"path": "a.png"}])], images, tmp_path / "out", layout="pg_fdd")
    with pytest.raises(DistFairError, match="leave the list of attributes out"):
        build([table], images, tmp_path / "out", layout="pg_fdd", options=TableOptions(attributes=("race",)))
    with pytest.raises(DistFairError, match=r"no \.csv file in"):
        build([images], images, tmp_path / "out", layout="pg_fdd")
