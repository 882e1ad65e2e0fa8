"""The leaderboard: numbers by hand, the front by its definition, files that read back."""

import csv
import io
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console

from dist_fair.errors import DistFairError
from dist_fair.reporting import front
from dist_fair.reporting.leaderboard import (
    AVERAGE,
    METRICS,
    Entry,
    Leaderboard,
    columns,
    leaderboard_markdown,
    leaderboard_table,
    over_seeds,
    pareto,
    write,
)

GROUPS = "gender x race"


def report(auc: float, gap: float | None) -> dict:
    """What an evaluation says, as far as a leaderboard reads it."""
    frame = {"AUC": auc, "EER": 1 - auc, "ACC": auc}
    fairness = {"F_FPR": 2 * gap if gap else gap, "F_EO": gap, "F_DP": 1.0, "es-AUC": auc / 2, "skew": 0.25}
    return {
        "utility": {"frame": frame, "video": frame},
        "fairness": {"gender": {"F_EO": 99.0}, GROUPS: fairness},
    }


def entry(name: str, *runs: tuple, planned: int | None = None) -> Entry:
    """runs: (AUC, F_EO) on near and on far, one a seed."""
    found = [{"near": report(*near), "far": report(*far)} for near, far in runs]
    return Entry(name, {"optimizer.lr": name.partition("=")[2]}, found, planned or len(found))


@pytest.fixture
def board():
    return Leaderboard(
        [
            entry("lr=1", ((0.9, 20.0), (0.7, 40.0)), ((0.8, 10.0), (0.6, 20.0))),
            entry("lr=2", ((0.95, 5.0), (0.75, 15.0)), planned=2),
            entry("lr=3", ((0.99, 50.0), (0.61, 90.0)), ((0.97, 70.0), (0.63, 50.0))),
            entry("lr=4", planned=2),
        ],
        GROUPS,
    )


def test_mean_and_deviation_by_hand(board):
    near = {row.entry.name: row.numbers for row in board.rows("near")}
    assert near["lr=1"]["AUC"].mean == pytest.approx((0.9 + 0.8) / 2)
    assert near["lr=1"]["AUC"].deviation == pytest.approx(((0.05**2 + 0.05**2) / 1) ** 0.5)
    assert near["lr=1"]["F_EO"].mean == 15.0
    assert (near["lr=2"]["AUC"].deviation, near["lr=2"]["AUC"].count) == (None, 1)
    assert near["lr=4"]["AUC"] is None


def test_the_average_is_of_sets_first_then_of_seeds(board):
    """The deviation is that of the seeds' averages, not of all numbers."""
    both = {row.entry.name: row.numbers for row in board.rows(AVERAGE)}
    assert both["lr=1"]["AUC"].mean == pytest.approx((0.8 + 0.7) / 2)
    assert both["lr=1"]["AUC"].deviation == pytest.approx((2 * 0.05**2) ** 0.5)
    assert both["lr=3"]["AUC"].deviation == pytest.approx(0.0)  # 0.80 and 0.80, from 0.99, 0.61, 0.97, 0.63


def test_a_set_that_lacks_a_number_leaves_the_average_without_it():
    board = Leaderboard([entry("lr=1", ((0.9, None), (0.7, 40.0)), ((0.8, 10.0), (0.6, 20.0)))], GROUPS)
    (row,) = board.rows(AVERAGE)
    assert (row.numbers["F_EO"].mean, row.numbers["F_EO"].count) == (15.0, 1)
    assert row.numbers["AUC"].count == 2
    assert board.rows("near")[0].numbers["F_EO"].mean == 10.0


def test_the_order_and_the_front(board):
    assert [(row.entry.name, row.front) for row in board.rows("near")] == [
        ("lr=3", True), ("lr=2", True), ("lr=1", False), ("lr=4", False),
    ]  # fmt: skip
    assert [(row.entry.name, row.front) for row in board.rows("far")] == [
        ("lr=2", True), ("lr=1", False), ("lr=3", False), ("lr=4", False),
    ]  # fmt: skip
    by_gap = Leaderboard(board.entries, GROUPS, sort="F_EO")
    assert [row.entry.name for row in by_gap.rows("near")] == ["lr=2", "lr=1", "lr=3", "lr=4"]
    es_auc = Leaderboard(board.entries, GROUPS, fairness="es-AUC")  # more of it is better
    assert [row.entry.name for row in es_auc.rows("near") if row.front] == ["lr=3"]


NUMBER = st.one_of(st.none(), st.integers(0, 4))


@given(st.lists(st.tuples(NUMBER, NUMBER), max_size=12))
def test_the_front_is_what_none_beats_and_beats_all_others(points):
    front = [point for point, there in zip(points, pareto(points), strict=True) if there]
    rest = [point for point, there in zip(points, pareto(points), strict=True) if not there]
    for one in front:
        assert None not in one
        assert all(one == other or one[0] > other[0] or one[1] > other[1] for other in front)
    for one in rest:
        assert None in one or any(other[0] >= one[0] and other[1] >= one[1] and other != one for other in front)


@given(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), max_size=6))
def test_over_seeds(values):
    there = [value for value in values if value is not None]
    number = over_seeds(values)
    if not there:
        assert number is None
        return
    assert (number.mean, number.count) == (pytest.approx(mean(there)), len(there))
    assert number.deviation == (pytest.approx(stdev(there)) if len(there) > 1 else None)


def test_files(board, tmp_path):
    written = [*write(board, tmp_path, "# A sweep\n"), *front.draw(board, tmp_path)]
    assert [path.name for path in written] == [f"leaderboard.{form}" for form in ("md", "csv", "parquet", "png", "svg")]
    assert all(path.stat().st_size for path in written)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    table = parquet.read_table(tmp_path / "leaderboard.parquet").to_pylist()
    lines = [*csv.DictReader(io.StringIO((tmp_path / "leaderboard.csv").read_text()))]
    assert len(table) == len(lines) == 3 * 4
    for row, line in zip(table, lines, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == line
    assert table[0]["dataset"] == AVERAGE
    best = next(row for row in table if (row["dataset"], row["setting"]) == ("far", "lr=2"))
    assert (best["optimizer.lr"], best["runs"], best["planned"], best["on_front"]) == ("2", 1, 2, True)
    assert (best["AUC_mean"], best["AUC_std"], best["AUC_n"], best["F_EO_mean"]) == (0.75, None, 1, 15.0)
    assert best["attributes"] == GROUPS
    assert (tmp_path / "leaderboard.md").read_text().startswith("# A sweep\n\n## average over the evaluation sets\n")


def test_tables_print_per_cent_and_mark_what_is_incomplete(board):
    text = leaderboard_markdown(board)
    assert "| 85.0 ± 7.1 |" in text
    assert "| 1 of 2, incomplete |" in text
    near = text[text.index("## near") : text.index("## far")]
    assert [line.split("|")[1].strip() for line in near.splitlines() if "| lr=" in line] == ["*", "*", "", ""]
    file = io.StringIO()
    Console(width=120, file=file).print(leaderboard_table(board, "near"))
    drawn = file.getvalue()
    assert "…" not in drawn
    assert "85.0" in drawn
    assert "±7.1" in drawn
    assert max(map(len, drawn.splitlines())) <= 120


def test_no_numbers_at_all(tmp_path):
    """All runs failed, or no set has attributes: no front, hence no picture."""
    empty = Leaderboard([entry("lr=1", planned=2)], GROUPS)
    assert empty.datasets == []
    assert columns(empty)[1] == []
    plain = Leaderboard([Entry("a", {}, [{"near": report(0.9, 1.0) | {"fairness": {}}}], 1)], "")
    assert plain.datasets == ["near"]
    assert [row.front for row in plain.rows("near")] == [False]
    assert [path.suffix for path in write(plain, tmp_path, "")] == [".md", ".csv", ".parquet"]
    assert front.draw(plain, tmp_path) == []


@pytest.mark.parametrize("option", ["utility", "fairness", "sort"])
def test_metrics_that_there_are_not(option):
    with pytest.raises(DistFairError, match="metric 'F_FRP': "):
        Leaderboard([], GROUPS, **{option: "F_FRP"})
    assert "F_FRP" not in METRICS
