import csv
import io

import pytest
from rich.console import Console

from dist_fair.metrics import evaluate
from dist_fair.reporting.comparison import comparison_table
from dist_fair.reporting.tables import (
    evaluation_csv,
    evaluation_markdown,
    evaluation_table,
    footnotes,
    group_markdown,
    group_table,
)
from tests.metrics.predicted import VOCABULARY, make


@pytest.fixture(scope="module")
def results():
    return {
        "demo-test": evaluate(make(videos=120), VOCABULARY, bootstrap=50, seed=0),
        "demo-celeb": evaluate(make(videos=15, seed=1), VOCABULARY, bootstrap=50, seed=0),
    }


def drawn(renderable, width):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_every_headline_number_can_be_read(results, width):
    text = drawn(evaluation_table(results), width)
    assert "…" not in text
    for report in results.values():
        assert f"{100 * report['utility']['video']['AUC']:.1f}" in text
        for fairness in report["fairness"].values():
            assert f"{fairness['F_FPR']:.1f}" in text
            assert f"{100 * fairness['es-AUC']:.1f}" in text
            assert f"{fairness['skew']:.2f}" in text
    low, high = results["demo-test"]["intervals"]["utility"]["frame"]["AUC"]
    assert (f"{100 * low:.1f}-{100 * high:.1f}" in text) == (width >= 96)
    assert ("95 % interval" in text) == (width >= 96)


def test_without_intervals_and_without_attributes():
    report = evaluate(make(), {}, bootstrap=0, seed=0)
    text = drawn(evaluation_table({"demo": report}), 100)
    assert "demo" in text
    assert "interval" not in text
    assert evaluation_markdown({"demo": report}).count("\n| demo") == 1


def test_groups_that_lack_rates_are_named():
    predictions = make(videos=40, unknown=0.3)
    predictions.attributes["race"][predictions.label == 0] = "White"
    predictions.attributes["gender"][(predictions.label == 1) & (predictions.attributes["gender"] == "male")] = "female"
    report = evaluate(predictions, VOCABULARY | {"race": ["Asian", "Black", "White", "Other"]}, 0, 0)
    notes = "\n".join(footnotes({"demo": report | {"unreadable": 3}}))
    assert "demo: 3 unreadable samples left out." in notes
    assert "demo, race: no samples of Other; no real samples, so no AUC and FPR, of Asian, Black." in notes
    assert "demo, gender: no fake samples, so no AUC and TPR, of male" in notes
    assert f"{report['fairness']['gender']['unknown']} samples of unknown group" in notes


def test_a_class_that_nobody_is_called_is_named():
    predictions = make()
    predictions.score[:] = 0.9
    notes = footnotes({"demo": evaluate(predictions, ["race"], 0, 0)})
    assert "demo, race: no sample is called real, so no Skew of the real." in notes


def test_one_class_is_named():
    predictions = make()
    predictions.label[:] = 1
    notes = footnotes({"demo": evaluate(predictions, [], 0, 0)})
    assert "demo: no AUC, EER, FPR per frame, for lack of a class." in notes


def test_group_tables_have_a_row_for_each_group(results):
    text = drawn(group_table(results), 100)
    rows = group_markdown(results).splitlines()
    assert len(rows) == 2 + 2 * (2 + 3 + 6)
    assert "…" not in text
    for group in ("female/Asian", "male/White"):
        assert text.count(f" {group} ") == 2
    group = results["demo-test"]["fairness"]["race"]["groups"]["Asian"]
    cells = next(line for line in rows if "demo-test" in line and "| Asian " in line).split("|")
    assert [cell.strip() for cell in cells[4:8]] == [
        str(group["n"]), str(group["n_real"]), str(group["n_fake"]), f"{100 * group['AUC']:.1f}"
    ]  # fmt: skip


def test_markdown_columns_line_up(results):
    table = evaluation_markdown(results).split("\n\n")[0].splitlines()
    assert len(table) == 2 + 2 * 3
    assert len({len(line) for line in table}) == 1
    assert len({line.count("|") for line in table}) == 1


def test_csv_has_every_number_in_full(results):
    rows = [*csv.DictReader(io.StringIO(evaluation_csv(results)))]
    found = {(row["dataset"], row["part"], row["attributes"], row["group"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    race = results["demo-test"]["fairness"]["race"]
    assert float(found["demo-test", "fairness", "race", "", "F_EO"]["value"]) == race["F_EO"]
    row = found["demo-test", "group", "race", "Asian", "FPR"]
    low, high = results["demo-test"]["intervals"]["fairness"]["race"]["groups"]["Asian"]["FPR"]
    assert (float(row["value"]), float(row["low"]), float(row["high"])) == (race["groups"]["Asian"]["FPR"], low, high)
    assert found["demo-test", "frame", "", "", "samples"]["low"] == ""


def run(auc, f_fpr):
    utility = {level: {"AUC": auc, "EER": 0.1, "ACC": 0.9, "absent": []} for level in ("frame", "video")}
    fairness = {"F_FPR": f_fpr, "F_EO": 2.0, "F_DP": 3.0, "es-AUC": 0.8, "skew": 0.25}
    return {"demo": {"utility": utility, "fairness": {"gender": {}, "gender x race": fairness}, "intervals": None}}


def test_comparison_is_mean_and_sample_deviation_with_the_best_in_bold():
    runs = {"erm": [run(0.90, 10.0), run(0.92, 14.0)], "gda": [run(0.89, None), run(0.90, 4.0)]}
    text = comparison_table(runs)
    erm, gda = (line for line in text.splitlines() if line.startswith("| demo"))
    assert "**91.0** ± 1.4" in erm
    assert "12.0 ± 2.8" in erm
    assert "89.5 ± 0.7" in gda
    assert "**4.0** (1 of 2)" in gda
    assert erm.count("**0.25** ± 0.00") == gda.count("**0.25** ± 0.00") == 1, "equal numbers are both best"
    assert "AUC ↑" in text
    assert "F_FPR ↓" in text
    assert "gender x race." in text
    assert "| demo " not in comparison_table(runs, datasets=["other"])
    assert "- |" in comparison_table(runs, attributes="gender").splitlines()[2]
