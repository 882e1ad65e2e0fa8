"""`dist-fair ace` on made-up predictions: what it writes and says, and what it refuses."""

import csv
import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from dist_fair import ace
from dist_fair.cli import guarded
from dist_fair.metrics import Predictions
from dist_fair.recipe import cards
from dist_fair.reporting import ace_report
from dist_fair.studies import runs as training
from dist_fair.studies.ace import average_causal_effect
from tests.studies.ace_worlds import GROUPS, MODELS, draw, messy


def write_runs(folder, predictions, dataset="near"):
    """Run folders with the predictions of every model; the arguments of --runs."""
    for (mc, f), found in predictions.items():
        found.write(folder / f"{mc}-{f}" / "predictions" / f"{dataset}.parquet")
    return [f"{mc}/{f}={folder / f'{mc}-{f}'}" for mc, f in predictions]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_runs(folder, messy(), "far")
    return write_runs(folder, draw(0))


@pytest.fixture(scope="module")
def study(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    assert ace.main(["--out", str(out), "--replicates", "50", "--runs", *runs]) == 0
    return out


def test_a_study_leaves_its_files(study):
    assert {path.name for path in study.iterdir()} == {
        "ace.json", "ace.md", "ace.csv", *(f"ace-{name}.{form}" for name in ("near", "far") for form in ("png", "svg"))
    }  # fmt: skip
    found = json.loads((study / "ace.json").read_text())
    assert [*found["runs"]] == ["low/0", "low/1", "high/0", "high/1"]
    assert found["datasets"]["near"] == average_causal_effect(draw(0), GROUPS, 50)
    rows = [*csv.DictReader((study / "ace.csv").open())]
    cells = [cell for report in found["datasets"].values() for cell in report["cells"]]
    assert [float(row["difference"]) for row in rows] == [cell["difference"] for cell in cells]
    assert ElementTree.parse(study / "ace-near.svg").getroot().tag.endswith("svg")


def test_the_page_tells_everything(study):
    text = (study / "ace.md").read_text()
    report = json.loads((study / "ace.json").read_text())["datasets"]["far"]
    for part in (
        f"| far     | {100 * report['ACE']:+.2f} |",
        "Strata without both classes are left out, and P is taken over the others: male/Black (14 real, 0 fake).",
        f"{report['unknown']} of {report['samples']} samples are of unknown group and left out.",
        "50 bootstrap draws of videos inside 10 strata (gender x race x label), the same for all models; seed 0.",
        "![Bootstrap distribution of ACE on near](ace-near.png)",
        ace_report.manipulation(report),
        ace_report.interpretation(report),
        "not how much other training seeds would",
        "- high/1: `",
    ):
        assert part in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("| near")]
    assert len({*widths}) == 1


def test_the_same_again_and_with_other_settings(runs, study, tmp_path):
    again = ["--replicates", "50", "--datasets", "near", "--runs", *runs]
    assert ace.main(["--out", str(tmp_path / "a"), *again]) == 0
    for name in ("ace-near.png", "ace-near.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (study / name).read_bytes()
    options = ["--unit", "frame", "--seed", "3", "--attributes", "race"]
    assert ace.main(["--out", str(tmp_path / "b"), *options, *again]) == 0
    found = json.loads((tmp_path / "b" / "ace.json").read_text())["datasets"]
    assert found == {"near": average_causal_effect(draw(0), ["race"], 50, "frame", 3)}


def test_ranks_share_the_replicates(runs, study, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "dist_fair.ace", "--out", str(tmp_path), "--replicates", "50", "--runs", *runs]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ace.md, ace.json, ace.csv and figures lie in") == 1
    for path in study.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


# What is said


def report_of(skews, interval=(0.01, 0.03), effect=0.02, called=(0.5, 0.5)):
    capacities = {
        mc: {"ACE": effect, "interval": interval, "skew": skew, "called_fake": called} for mc, skew in skews.items()
    }
    return {"ACE": effect, "capacities": capacities, "bootstrap": {"interval": interval}}


FELL, ROSE = (0.5, 0.2), (0.2, 0.5)


def test_the_manipulation_check_says_what_skew_did():
    both = ace_report.manipulation(report_of({"low": FELL, "high": (0.4, 0.39)}))
    assert both == "F was manipulated: the largest |Skew| fell from F=0 to F=1 (low 0.50 → 0.20; high 0.40 → 0.39)."
    none = ace_report.manipulation(report_of({"low": ROSE, "high": (0.3, 0.3)}))
    assert "F was NOT manipulated" in none
    assert (
        "did not fall from F=0 to F=1 (low 0.20 → 0.50; high 0.30 → 0.30). ACE answers nothing about fairness" in none
    )
    trivial = ace_report.manipulation(report_of({"low": (0.5, 0.0)}, called=(0.5, 1.0)))
    assert "F was NOT manipulated" in trivial
    assert "low 0.50 → 0.00, where all are called the same" in trivial
    part = ace_report.manipulation(report_of({"low": FELL, "high": ROSE}))
    assert "only in part" in part
    assert "(low 0.50 → 0.20), but not everywhere (high 0.20 → 0.50)" in part


def test_the_interpretation_says_no_more_than_the_interval():
    say = ace_report.interpretation
    assert say(report_of({"low": FELL})).endswith("[+1.00, +3.00]: the AUC is higher under the fairer regime.")
    assert "the AUC is lower under" in say(report_of({"low": FELL}, (-0.03, -0.01), -0.02))
    assert "which contains 0: these held-out samples do not tell" in say(report_of({"low": FELL}, (-0.01, 0.03)))
    assert "so no effect of fairness" in say(report_of({"low": FELL, "high": ROSE}))
    assert "nothing can be said of its uncertainty" in say(report_of({"low": FELL}, None))


@pytest.mark.parametrize(("p", "replicates", "text"), [(0.0, 1000, "< 0.001"), (0.0, 200, "< 0.005"),
                                                       (0.0123, 1000, "0.012"), (None, 1000, "-")])  # fmt: skip
def test_p_as_it_is_printed(p, replicates, text):
    assert ace_report.p_text(p, replicates) == text


def test_a_regime_that_is_not_fairer_is_told_on_the_screen(tmp_path, capsys):
    """The regimes swapped wherever Skew falls, so that it falls nowhere."""
    predictions = draw(0)
    skews = {mc: found["skew"] for mc, found in average_causal_effect(predictions, GROUPS, 1)["capacities"].items()}
    swapped = {(mc, f): predictions[mc, 1 - f if skews[mc][1] < skews[mc][0] else f] for mc, f in MODELS}
    out = tmp_path / "out"
    assert ace.main(["--out", str(out), "--replicates", "5", "--runs", *write_runs(tmp_path, swapped)]) == 0
    assert "near: F was NOT manipulated" in capsys.readouterr().out


def test_a_study_without_any_defined_replicate_is_reported_and_drawn(tmp_path):
    report = average_causal_effect(draw(0), GROUPS, 2)
    report["bootstrap"] |= {"mean": None, "interval": None, "p_unsmoothed": None, "p_smoothed": None,
                            "undefined_replicates": 2, "values": [None, None]}  # fmt: skip
    ace_report.write(tmp_path, dict.fromkeys(MODELS, tmp_path), {"near": report})
    assert "2 replicates left a cell without a class" in (tmp_path / "ace.md").read_text()
    assert (tmp_path / "ace-near.png").is_file()


# Training first


def trained_by(monkeypatch, predictions):
    """Stands in for training: every run leaves its predictions; returns what was asked for."""
    asked = []

    def train_all(runs, jobs, ranks):
        asked.append((runs, jobs, ranks))
        for run, found in zip(runs, predictions.values(), strict=True):
            found.write(run.folder / "predictions" / "in_domain.parquet")

    monkeypatch.setattr(training, "train_all", train_all)
    return asked


CHOICE = ["--plain", "erm", "--fair", "gda", "--capacities", "low=small", "high=resnet50"]


def test_without_runs_they_are_trained(tmp_path, monkeypatch):
    asked, out = trained_by(monkeypatch, draw(0)), tmp_path / "out"
    assert ace.main(["seed=7", "train.steps=9", "--out", str(out), "--replicates", "5", "--jobs", "3", *CHOICE]) == 0
    ((planned, jobs, ranks),) = asked
    assert (jobs, ranks) == (3, 1)
    assert {run.folder: run.arguments for run in planned} == {
        out / "runs" / f"{mc}-{f}": (f"recipe={recipe}", f"detector={card}", "seed=7", "train.steps=9")
        for mc, card in (("low", "small"), ("high", "resnet50")) for f, recipe in enumerate(("erm", "gda"))
    }  # fmt: skip
    assert [*json.loads((out / "ace.json").read_text())["datasets"]] == ["in_domain"]


def test_the_defaults_are_shipped():
    assert {ace.TRAINING["plain"], ace.TRAINING["fair"]} <= {*cards.names("recipe")}
    assert {entry.partition("=")[2] for entry in ace.TRAINING["capacities"]} <= {*cards.names("detector")}


def test_nothing_is_trained_for_what_no_run_will_have(tmp_path, monkeypatch, capsys):
    asked = trained_by(monkeypatch, draw(0))
    for arguments, text in (
        (
            ["--datasets", "in_domian"],
            "--datasets in_domian: {out}/runs/low-0 will not have it: did you mean 'in_domain'?",
        ),
        (["--attributes", "gendr"], "--attributes gendr: {out}/runs/low-0 will not have it: did you mean 'gender'?"),
        (["--replicates", "0"], "replicates=0: at least 1"),
        (["recipe=gda"], "recipe=gda: the study sets it for each run: use --plain, --fair, --capacities and --out"),
        (["--capacities", "low:small"], "--capacities low:small: must be NAME=DETECTOR, as in low=small"),
        (["--capacities", "low=small", "train.steps=3"], "settings of the runs (key=value) stand before --capacities"),
        (["--capacities", "low=small", "low=resnet50"], "low=resnet50: 'low' is small already"),
    ):
        positional = [argument for argument in arguments if argument.startswith("recipe=")]
        options = [argument for argument in arguments if argument not in positional]
        assert guarded(ace.main, [*positional, "--out", str(tmp_path), *CHOICE, *options]) == 2
        assert text.format(out=tmp_path) in capsys.readouterr().err
    assert not asked


def test_training_under_several_ranks_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert guarded(ace.main, ["--out", str(tmp_path), *CHOICE]) == 2
    assert "start it once, without torchrun or accelerate; --ranks N gives each run N ranks" in capsys.readouterr().err


# What is refused


def refused(capsys, arguments):
    assert guarded(ace.main, arguments) == 2
    return capsys.readouterr().err


def test_runs_that_are_not_named_as_they_should_be(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for entries, text in (
        (["low=x"], "--runs low=x: must be CAPACITY/REGIME=RUN with REGIME 0 (plain) or 1 (fair)"),
        (["low/2=x"], "--runs low/2=x: must be"),
        ([*runs, "low/0=x"], "low/0 is"),
        (runs[:3], "no run high/1: every capacity needs F=0 and F=1"),
    ):
        assert text in refused(capsys, [*out, "--runs", *entries])
    assert not (tmp_path / "out").exists()


def test_settings_of_training_beside_trained_runs(runs, tmp_path, capsys):
    for before, after, name in (
        (["seed=1"], [], "seed=1"),
        ([], ["--jobs", "2"], "--jobs"),
        ([], ["--capacities", "low=small"], "--capacities"),
        ([], ["--ranks", "2"], "--ranks"),
    ):
        error = refused(capsys, [*before, "--out", str(tmp_path), "--runs", *runs, *after])
        assert f"{name} has no effect beside --runs" in error


def test_predictions_that_are_not_there(runs, tmp_path, capsys):
    folder = tmp_path / "runs"
    entries = write_runs(folder, draw(0), "near")
    (folder / "high-1" / "predictions" / "near.parquet").rename(folder / "high-1" / "predictions" / "odd.parquet")
    out = ["--out", str(tmp_path / "out")]
    assert "the runs share no data set" in refused(capsys, [*out, "--runs", *entries])
    error = refused(capsys, [*out, "--datasets", "near", "--runs", *entries])
    assert (
        f"{folder}/high-1 (high/1) has no predictions of near; there are odd: `dist-fair evaluate {folder}/high-1 "
        in error
    )
    (folder / "high-1" / "predictions" / "odd.parquet").unlink()
    error = refused(capsys, [*out, "--runs", *entries])
    assert f"{folder}/high-1 (high/1) has no predictions: `dist-fair evaluate {folder}/high-1` writes them" in error


def test_data_sets_that_only_some_runs_have_are_named(tmp_path, capsys):
    entries = write_runs(tmp_path, draw(0), "near")
    draw(0)[MODELS[0]].write(tmp_path / "low-0" / "predictions" / "extra.parquet")
    assert ace.main(["--out", str(tmp_path / "out"), "--replicates", "2", "--runs", *entries]) == 0
    assert "left out, for not every run has predicted them: extra" in capsys.readouterr().out


def test_errors_of_a_data_set_name_it(runs, tmp_path, capsys):
    error = refused(capsys, ["--out", str(tmp_path), "--attributes", "age", "--runs", *runs])
    assert "far: low/0: attribute 'age' is not in the predictions" in error
    entries = write_runs(tmp_path, draw(0), "near")
    other = draw(0)[MODELS[0]]
    Predictions(other.sample_id, other.video, other.label, other.score,
                {"gender": other.attributes["gender"][::-1], "race": other.attributes["race"]}).write(
        tmp_path / "low-1" / "predictions" / "near.parquet")  # fmt: skip
    error = refused(capsys, ["--out", str(tmp_path / "out"), "--runs", *entries])
    assert "near: sample '00000': its gender is 'male' in low/1 and 'female' in low/0" in error
    assert not np.any([path.suffix for path in (tmp_path / "out").glob("*")])
