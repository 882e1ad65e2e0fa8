"""Runs written up from their folders: alone, and side by side where they judged the same samples."""

import csv
import json

import pytest

from dist_fair import cli
from dist_fair.errors import DistFairError
from dist_fair.metrics import Predictions
from dist_fair.reporting import side_by_side as module
from dist_fair.reporting.side_by_side import names_of, side_by_side, write_up
from tests.reporting.evaluated import judged, run_folder


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn, instead of drawing it."""
    calls = []
    monkeypatch.setattr(module, "draw", lambda *call: calls.append(call) or [])
    return calls


@pytest.fixture
def runs(tmp_path):
    return {
        name: run_folder(tmp_path / name, near=judged(model=model), **{name: judged(model=model)})
        for model, name in enumerate(("erm", "daid"))
    }


def test_a_run_is_written_up_in_its_folder(runs, drawn):
    report = json.loads((runs["erm"] / "evaluation.json").read_text())
    report["near"]["unreadable"] = 3
    (runs["erm"] / "evaluation.json").write_text(json.dumps(report))
    assert write_up(runs["erm"], ["near"]) == [runs["erm"] / "evaluation.md", runs["erm"] / "evaluation.csv"]
    text = (runs["erm"] / "evaluation.md").read_text()
    assert text.startswith("step-00000004 of recipe 0123456789ab: near, erm\n")
    assert "| near    | gender x race | female/Asian |" in text
    assert "near: 3 unreadable samples left out." in text
    rows = [*csv.DictReader((runs["erm"] / "evaluation.csv").open())]
    assert {row["dataset"] for row in rows} == {"near", "erm"}
    ((of_run, dataset, folder),) = drawn
    assert ([*of_run], dataset, folder) == (["erm"], "near", runs["erm"] / "figures")


def test_runs_are_compared_on_what_all_have_judged(runs, drawn, tmp_path):
    out = tmp_path / "out"
    assert side_by_side(runs, out) == [out / "comparison.md", out / "comparison.csv"]
    text = (out / "comparison.md").read_text()
    sets = ["## Fairness over gender", "## Fairness over race", "## Fairness over gender x race"]
    assert [line for line in text.splitlines() if line.startswith("##")] == sets
    report = json.loads((runs["daid"] / "evaluation.json").read_text())["near"]
    assert f"{report['fairness']['gender x race']['F_FPR']:.1f}" in text
    rows = [*csv.DictReader((out / "comparison.csv").open())]
    assert {(row["run"], row["dataset"]) for row in rows} == {("erm", "near"), ("daid", "near")}
    aucs = [float(row["value"]) for row in rows if (row["part"], row["metric"]) == ("frame", "AUC")]
    assert aucs[1] == report["utility"]["frame"]["AUC"]
    ((of_runs, dataset, folder),) = drawn
    assert ([*of_runs], dataset, folder) == (["erm", "daid"], "near", out / "figures")


def test_what_is_true_of_one_run_only_is_said_of_it(runs, drawn, tmp_path):
    report = json.loads((runs["daid"] / "evaluation.json").read_text())
    report["near"]["unreadable"] = 2
    (runs["daid"] / "evaluation.json").write_text(json.dumps(report))
    side_by_side(runs, tmp_path / "out")
    assert "\ndaid: near: 2 unreadable samples left out.\n" in (tmp_path / "out" / "comparison.md").read_text()


def test_the_order_of_samples_does_not_matter(runs, drawn, tmp_path):
    path = runs["daid"] / "predictions" / "near.parquet"
    found = Predictions.read(path)
    columns = {name: getattr(found, name)[::-1] for name in ("sample_id", "video", "label", "score")}
    Predictions(**columns, attributes={name: values[::-1] for name, values in found.attributes.items()}).write(path)
    side_by_side(runs, tmp_path / "out")


def missing_predictions(runs):
    (runs["daid"] / "predictions" / "near.parquet").unlink()


def missing_report(runs):
    (runs["daid"] / "evaluation.json").unlink()


def damaged_report(runs):
    (runs["daid"] / "evaluation.json").write_text('{"near": ')


def no_reports(runs):
    (runs["daid"] / "evaluation.json").write_text('["near"]')


def nothing_shared(runs):
    path = runs["daid"] / "evaluation.json"
    path.write_text(json.dumps({"daid": json.loads(path.read_text())["daid"]}))


def fewer_samples(runs):
    run_folder(runs["daid"], near=judged(without=[("male/Asian", 1)], model=1))


def other_samples(runs):
    run_folder(runs["daid"], near=judged(seed=1, model=1))


def stale_predictions(runs):
    judged(count=20).predictions.write(runs["daid"] / "predictions" / "near.parquet")


def other_groups(runs):
    run_folder(runs["daid"], near=judged({"gender": ["male", "female"], "race": ["Asian", "Black", "White"]}, model=1))
    path = runs["daid"] / "predictions" / "near.parquet"
    Predictions.read(runs["erm"] / "predictions" / "near.parquet").write(path)


@pytest.mark.parametrize(("spoil", "told"), [
    (missing_predictions, r"daid/predictions/near\.parquet: no predictions can be read"),
    (missing_report, r"daid/evaluation\.json is missing or empty"),
    (damaged_report, r"daid/evaluation\.json cannot be read"),
    (no_reports, r"daid/evaluation\.json cannot be read"),
    (nothing_shared, r"no dataset was judged by all runs \(erm: near, erm; daid: daid\)"),
    (fewer_samples, r"near: erm and daid judged other samples \(\d+ are in one only, such as '0"),
    (other_samples, r"near: erm and daid have other labels or attributes"),
    (stale_predictions, r"near\.parquet has 20 samples and .* tells of 150"),
    (other_groups, r"near: erm was judged by the groups \('female/Asian', .*daid by \('male/Asian'"),
])  # fmt: skip
def test_runs_that_cannot_be_compared_say_why(runs, drawn, tmp_path, spoil, told):
    spoil(runs)
    with pytest.raises(DistFairError, match=told):
        side_by_side(runs, tmp_path / "out")
    assert not drawn
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_is_no_place_for_a_comparison(runs, drawn):
    with pytest.raises(DistFairError, match="daid is the folder of a run: a comparison needs another one"):
        side_by_side(runs, runs["daid"])
    with pytest.raises(DistFairError, match=r"erm/evaluation\.json is a file: results need a folder"):
        side_by_side(runs, runs["erm"] / "evaluation.json")


def test_names_are_as_long_as_they_must_be(tmp_path):
    one, two, three = (tmp_path / name for name in ("a/run", "b/run", "b/other"))
    assert names_of([one, three]) == {"run": one, "other": three}
    assert names_of([one, two, three]) == {"a/run": one, "b/run": two, "b/other": three}
    with pytest.raises(DistFairError, match="a/run is given twice"):
        names_of([one, tmp_path / "b" / ".." / "a" / "run"])


# `dist-fair evaluate --from-predictions`, which needs no detector


def test_evaluate_from_predictions_draws_and_compares(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["evaluate", *map(str, runs.values()), "--from-predictions", "--out", str(out)]) == 0
    figures = {f"near-{kind}.{form}" for kind in ("radar", "scores", "roc") for form in ("png", "svg")}
    assert {path.name for path in (out / "figures").iterdir()} == figures
    assert {path.name for path in out.iterdir()} == {"comparison.md", "comparison.csv", "figures"}
    assert str(out / "comparison.md") in capsys.readouterr().out
    assert {path.name for path in runs["erm"].iterdir()} == {"evaluation.json", "predictions"}


def test_evaluate_from_predictions_of_one_run_goes_to_its_folder(tmp_path, drawn):
    run = run_folder(tmp_path / "seed=1", near=judged())  # a run may be called so, and is no override
    assert cli.main(["evaluate", str(run), "--from-predictions"]) == 0
    assert (run / "evaluation.md").is_file()
    assert drawn[0][1:] == ("near", run / "figures")


@pytest.mark.parametrize(("arguments", "told"), [
    (["erm", "daid"], "2 runs: say where they are to be compared, with --out DIR"),
    (["erm", "daid", "--from-predictions"], "--out DIR"),
    (["erm", "data.eval=[near]", "--from-predictions"], "scores nothing: leave out data.eval=[near]"),
    (["erm", "--ranks", "2", "--from-predictions"], "scores nothing: leave out --ranks"),
    (["erm", "--out", "x", "--from-predictions"], "draws one run into its own folder: leave out --out"),
    (["data.eval=[near]"], "name a run folder or a checkpoint"),
    (["erm", "dead", "--out", "x"], "dead is neither a checkpoint nor a run folder"),
])  # fmt: skip
def test_evaluate_says_what_is_wrong_before_anything_starts(runs, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    (runs["erm"] / "checkpoints" / "step-00000001").mkdir(parents=True)
    (runs["erm"] / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    assert cli.main(["evaluate", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
