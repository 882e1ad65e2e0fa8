"""Tables of other projects, by name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_fair.data.tables import Entry, Layout, TableOptions, image_path, plain, read_table, require, with_video
from dist_fair.data.values import Record, label_of, text_of
from dist_fair.errors import DistFairError, nearest

# spe_label of PG-FDD: 0 is real, 1 to 5 are FaceForensics++'s manipulations.
PG_FDD_MANIPULATIONS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
PG_FDD_RACES = {"isasian": "Asian", "iswhite": "White", "isblack": "Black"}


def pg_fdd(paths: Sequence[Path], options: TableOptions) -> list[Entry]:
    """The CSV files of PG-FDD's authors (Lin et al., CVPR 2024): faketrain, realtrain, fakeval, realval, test.

    Columns by their header: img_path, label, ismale, isasian, iswhite, isblack (1 yes, -1 no, 0 undecided),
    intersec_label, spe_label (only in fake train and validation files). DFD's and Celeb-DF's files have no isasian, and
    their intersec_label counts White, Black, Others only. Gives gender male/female, race Asian/White/Black/Other
    (Other: no to all), manipulation by spe_label; the split is the end of the file's name. A path may be a folder of
    such files.
    """
    if options.attributes is not None:
        raise DistFairError("layout pg_fdd has the attributes gender and race; leave the list of attributes out")
    files = [file for path in paths for file in (sorted(path.glob("*.csv")) if path.is_dir() else [path])]
    if not files:
        raise DistFairError(f"no .csv file in {', '.join(map(str, paths))}")
    return [entry for file in files for entry in _pg_fdd_file(file, options)]


def layout_of(name: str) -> Layout:
    """The layout of a name; DistFairError with the nearest for an unknown one."""
    if name not in LAYOUTS:
        raise DistFairError(f"layout '{name}' is unknown: {nearest(name, [*LAYOUTS])}")
    return LAYOUTS[name]


LAYOUTS: Mapping[str, Layout] = {"plain": plain, "pg_fdd": pg_fdd}


def _pg_fdd_file(file: Path, options: TableOptions) -> Iterator[Entry]:
    match = re.search(r"(train|val|test)$", file.stem)
    if match is None:
        raise DistFairError(f"{file}: its name shows no split; call it ...train.csv, ...val.csv or ...test.csv")
    columns, rows = read_table(file, options.rename)
    require(file, columns, ("img_path", "label", "ismale", "iswhite", "isblack"))
    for place, row in rows:
        image = image_path(row["img_path"], place)
        attributes = {"gender": _gender(row, place), "race": _race(row, place)}
        _check_intersection(row, attributes, place)
        record = Record(
            label=label_of(row["label"], place),
            video=None,
            identity=None,
            manipulation=_manipulation(row, place),
            attributes={name: value for name, value in attributes.items() if value is not None},
        )
        yield Entry(image, with_video(record, image, options, place), match.group(1), place)


def _number(row: Mapping[str, Any], column: str, allowed: Sequence[int], place: str) -> int | None:
    text = text_of(row.get(column), place)
    try:
        number = None if text is None else float(text)
    except ValueError:
        number = text
    if number is not None and number not in allowed:
        raise DistFairError(f"{place}: {column} is '{text}'; it must be one of {', '.join(map(str, allowed))}")
    return None if number is None else int(number)


def _gender(row: Mapping[str, Any], place: str) -> str | None:
    return {1: "male", -1: "female"}.get(_number(row, "ismale", (1, -1, 0), place))


def _race(row: Mapping[str, Any], place: str) -> str | None:
    flags = {race: _number(row, column, (1, -1, 0), place) for column, race in PG_FDD_RACES.items() if column in row}
    races = [race for race, flag in flags.items() if flag == 1]
    if len(races) > 1:
        raise DistFairError(f"{place} is marked {' and '.join(races)}; mark one, or 0 (undecided) for all")
    if races:
        return races[0]
    return "Other" if all(flag == -1 for flag in flags.values()) else None


def _check_intersection(row: Mapping[str, Any], attributes: Mapping[str, str | None], place: str) -> None:
    """The one redundancy of these files shows swapped columns (their README lists black and white in both orders)."""
    races = [race for column, race in PG_FDD_RACES.items() if column in row] + ["Other"]
    code = _number(row, "intersec_label", range(2 * len(races)), place)
    if code is None or None in attributes.values():
        return
    expected = ("male", "female").index(attributes["gender"]) * len(races) + races.index(attributes["race"])
    if code != expected:
        said = f"{('male', 'female')[code // len(races)]}, {races[code % len(races)]}"
        raise DistFairError(
            f"{place}: intersec_label {code} means {said}, but the columns say {attributes['gender']}, "
            f"{attributes['race']} ({expected}): correct the header's order, or remove intersec_label"
        )


def _manipulation(row: Mapping[str, Any], place: str) -> str | None:
    code = _number(row, "spe_label", range(len(PG_FDD_MANIPULATIONS) + 1), place)
    fake = label_of(row["label"], place)
    if code is not None and bool(code) != bool(fake):
        raise DistFairError(f"{place}: label {fake}, but spe_label {code} (0 real, 1 to 5 fake): one of them is wrong")
    return PG_FDD_MANIPULATIONS[code - 1] if code else None
