"""Every command does what its help says: in this process where it can be, as ranks where that is the point."""

import json
import re
import shutil
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from dist_fair import cli, session
from dist_fair.reporting import wandb_log
from tests.command_line.runs import QUICK_WITHOUT_METHODS, call, final_model, losses, metrics, succeed

ERM = ["train", "recipe=erm", *QUICK_WITHOUT_METHODS, "train.steps=4", "checkpoint.every=2", "evaluation.bootstrap=0"]
TRAINING_ONLY = "evaluation.at_end=false"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Four steps of ERM, evaluated; tests only read it."""
    folder = tmp_path_factory.mktemp("run") / "erm"
    assert cli.main([*ERM, f"data={data}", f"out={folder}", "evaluation.figures=true"]) == 0
    return folder


@pytest.fixture
def files(run):
    """All files of `run` with their contents: what a test must leave as it was."""
    before = contents(run)
    yield before
    assert contents(run) == before


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_numbers(one, other, keys=("loss", "gradient_norm")):
    for key in keys:
        np.testing.assert_allclose(losses(other, key), losses(one, key), rtol=1e-5)


# What is printed


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_all_verbs_are_listed(capsys, arguments):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} +\w", out, re.MULTILINE) for verb in ("train", "evaluate", "shards", "recipes"))


@pytest.mark.parametrize("command", [*cli.VERBS, "recipes show", "shards build", "shards index", "shards inspect"])
def test_every_verb_has_help(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert f"usage: dist-fair {command}" in capsys.readouterr().out


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "no verb 'trian': did you mean 'train'?" in capsys.readouterr().err


def test_recipes_lists_files_with_what_they_are(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  sfd_gda +SFD\+GDA", out, re.MULTILINE)
    assert {"recipe=NAME", "data=NAME", "detector=NAME"} <= {*out.splitlines()}


def test_recipes_show_tells_where_each_value_came_from(capsys):
    assert cli.main(["recipes", "show", "erm", "seed=7"]) == 0
    out = capsys.readouterr().out
    assert "seed: 7  # command line" in out
    assert "reduction: mean  # recipes/erm.yaml" in out
    assert "accumulate: 1  # default" in out


def test_all_keys_are_listed(capsys):
    assert cli.main(["train", "--keys"]) == 0
    out = capsys.readouterr().out
    assert all(key in out for key in ("data.image_size", "detector.norm", "train.stop_after", "wandb.mode"))


# Training


def test_a_dry_run_says_what_would_run_and_writes_nothing(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*ERM, f"data={data}", "--dry-run", f"out={out}"]) == 0
    text = capsys.readouterr().out
    assert f"run folder    {out} (starts anew)" in text
    assert "150 samples" in text
    assert "evaluation    far: 30 samples" in text
    assert "nothing was trained" in text
    assert not out.exists()


def test_a_run_leaves_its_folder(run):
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "checkpoints", "evaluation.json", "predictions",
        "evaluation.md", "evaluation.csv", "figures",
    }  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    report = json.loads((run / "evaluation.json").read_text())
    assert {name: found["checkpoint"] for name, found in report.items()} == dict.fromkeys(
        ("near", "far"), "step-00000004"
    )
    assert parquet.read_table(run / "predictions" / "near.parquet").num_rows == 53
    assert {path.name for path in (run / "figures").iterdir()} == figures("near", "far")


def figures(*datasets):
    kinds = [f"{kind}.{form}" for kind in ("radar", "scores", "roc") for form in ("png", "svg")]
    return {f"{dataset}-{kind}" for dataset in datasets for kind in kinds}


def test_a_finished_run_started_again_is_evaluated_and_not_trained(data, run, files, capsys):
    (run / "evaluation.json").unlink()
    assert cli.main([*ERM, f"data={data}", f"out={run}", "evaluation.figures=true"]) == 0
    assert "train " not in capsys.readouterr().out  # `files` compares the rest, evaluation.json too


def test_a_run_that_stops_goes_on_where_it_was(data, run, tmp_path):
    arguments = [*ERM, f"data={data}", f"out={tmp_path / 'run'}"]
    assert cli.main([*arguments, "train.stop_after=3"]) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-00000003"
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert cli.main(arguments) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    same_numbers(run, tmp_path / "run")
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_resume_from_a_named_checkpoint(data, run, files, tmp_path):
    step = run / "checkpoints" / "step-00000002"
    assert cli.main([*ERM, f"data={data}", f"resume={step}", TRAINING_ONLY, f"out={tmp_path / 'run'}"]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 3]
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run)[2:], rtol=1e-5)


def test_two_smaller_batches_are_one_step(data, run, tmp_path):
    """Eight lanes give both the same samples, in one batch of 16 or two of 8; the statistics of the norm are frozen."""
    frozen = ["data.lanes=8", "detector.norm=frozen", f"detector.init_from={run}", TRAINING_ONLY, f"data={data}"]
    for parts in (1, 2):
        assert cli.main([*ERM, *frozen, f"train.accumulate={parts}", f"out={tmp_path / str(parts)}"]) == 0
    same_numbers(tmp_path / "1", tmp_path / "2")
    one, two = final_model(tmp_path / "1"), final_model(tmp_path / "2")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def test_bf16_stays_finite_and_near(data, run, tmp_path):
    out = tmp_path / "half"
    assert cli.main([*ERM, f"data={data}", "train.precision=bf16", TRAINING_ONLY, f"out={out}"]) == 0
    np.testing.assert_allclose(losses(out), losses(run), rtol=0.1)
    assert not np.array_equal(losses(out), losses(run))
    assert all(value.dtype != torch.bfloat16 for value in final_model(out).values())


def test_metrics_have_a_place_for_every_term(data, tmp_path):
    gda = ["recipe=gda" if one == "recipe=erm" else one for one in ERM]
    gda += [f"interventions.distribution_alignment.{setting}" for setting in ("delay=0.5", "grid=32", "weight=0.005")]
    out = tmp_path / "gda"
    assert cli.main([*gda, f"data={data}", TRAINING_ONLY, f"out={out}"]) == 0
    lines = metrics(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert {"loss", "loss/cross_entropy", "loss/distribution_alignment"} <= {*line}
        assert (line["loss/distribution_alignment"] is None) == (line["step"] < 2)
        weighted = line["loss/cross_entropy"] + 0.005 * (line["loss/distribution_alignment"] or 0)
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("source", ["run", "checkpoint", "file"])
def test_init_from_starts_with_the_detector_of_another_run(data, run, files, tmp_path, source):
    step = run / "checkpoints" / "step-00000004"
    path = {"run": run, "checkpoint": step, "file": step / "model.safetensors"}[source]
    arguments = [*ERM, f"data={data}", f"detector.init_from={path}", "train.steps=1", "optimizer.lr=0", TRAINING_ONLY]
    assert cli.main([*arguments, f"out={tmp_path / 'next'}"]) == 0
    before, after = final_model(run), final_model(tmp_path / "next")
    trained = [name for name in before if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert trained
    assert all(torch.equal(before[name], after[name]) for name in trained)  # a learning rate of 0 moved nothing
    assert losses(tmp_path / "next")[0] != pytest.approx(losses(run)[0], rel=1e-3)


def test_init_from_leaves_a_classifier_of_another_width(data, run, files, tmp_path):
    projection = "+interventions.low_rank_projection={rank: 8}"
    still = [*ERM, f"data={data}", f"detector.init_from={run}", "train.steps=1", "optimizer.lr=0", TRAINING_ONLY]
    assert cli.main([*still, projection, f"out={tmp_path / 'next'}"]) == 0
    before, after = final_model(run), final_model(tmp_path / "next")
    assert torch.equal(before["detector.backbone.conv1.weight"], after["detector.backbone.conv1.weight"])
    assert after["detector.classifier.weight"].shape == (2, 8)


# Evaluating


def test_evaluate_a_run_on_one_data_set_keeps_the_others(run, files):
    before = json.loads((run / "evaluation.json").read_text())
    assert cli.main(["evaluate", str(run), "data.eval=[near]"]) == 0
    assert json.loads((run / "evaluation.json").read_text()) == before  # the same scores, and far is still there


def test_evaluate_a_checkpoint_into_a_folder(run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    out = tmp_path / "early"
    settings = ["data.eval=[far]", "data.workers=1", "evaluation.figures=false"]
    assert cli.main(["evaluate", "step-00000002", "--out", str(out), *settings]) == 0
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "predictions", "evaluation.md", "evaluation.csv"
    }  # fmt: skip
    report = json.loads((out / "evaluation.json").read_text())
    assert [*report] == ["far"]
    assert report["far"]["checkpoint"] == "step-00000002"
    scores = [parquet.read_table(folder / "predictions" / "far.parquet")["score"].to_numpy() for folder in (run, out)]
    assert not np.allclose(*scores)


@pytest.mark.parametrize("setting", ["data.image_size=96", "seed=1", "detector.norm=local", "optimizer.lr=1"])
def test_evaluate_refuses_settings_of_training(run, files, capsys, setting):
    assert cli.main(["evaluate", str(run), setting]) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err


def stopped(run, folder, step):
    """A run folder that has one checkpoint of `run`."""
    for path in ("recipe.yaml", f"checkpoints/step-{step:08d}"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(run / path)
    return folder


def test_evaluate_two_runs_compares_them(run, files, tmp_path):
    out, early, late = tmp_path / "out", stopped(run, tmp_path / "early", 2), stopped(run, tmp_path / "late", 4)
    launched = [sys.executable, "-m", "dist_fair.evaluate", str(early), str(late), "data.eval=[near]", "--ranks", "2"]
    done = succeed(call(*launched, "--out", str(out)))
    assert done.stdout.count(str(out / "comparison.md")) == 1  # one rank draws
    assert {path.name for path in (out / "figures").iterdir()} == figures("near")
    assert all(f"| near    | {name}  |" in (out / "comparison.md").read_text() for name in ("early", "late "))
    reports = [json.loads((folder / "evaluation.json").read_text())["near"] for folder in (early, late)]
    assert [report["checkpoint"] for report in reports] == ["step-00000002", "step-00000004"]
    assert reports[0]["recipe"] == reports[1]["recipe"]


def test_numbers_of_two_checkpoints_do_not_mix(run, files, tmp_path, capsys):
    first, last = (str(run / "checkpoints" / f"step-0000000{step}") for step in (2, 4))
    out = ["--out", str(tmp_path / "out"), "evaluation.figures=false"]
    assert cli.main(["evaluate", first, *out, "data.eval=[near]"]) == 0
    before = contents(tmp_path / "out")
    assert cli.main(["evaluate", last, *out, "data.eval=[far]"]) == 2
    assert "has numbers of step-00000002 of recipe" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert cli.main(["evaluate", last, *out, "data.eval=[near,far]"]) == 0  # nothing of the first would stay


def test_all_runs_are_checked_before_one_is_scored(run, files, tmp_path, capsys):
    early, late = stopped(run, tmp_path / "early", 2), stopped(run, tmp_path / "late", 4)
    shutil.copy(run / "evaluation.json", early)  # numbers of step-00000004
    before = contents(tmp_path)
    assert cli.main(["evaluate", str(late), str(early), "data.eval=[near]", "--out", str(tmp_path / "out")]) == 2
    assert f"{early}/evaluation.json has numbers of step-00000004 of recipe" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_what_cannot_be_drawn_is_said_and_the_numbers_stay(run, files, tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise ImportError("no matplotlib here")

    monkeypatch.setattr(session, "write_up", broken)
    assert cli.main(["evaluate", str(run), "--out", str(tmp_path / "out"), "data.eval=[far]"]) == 0
    assert "warning: no tables and figures (ImportError: no matplotlib here)" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "predictions"}


# Weights & Biases


def test_wandb_offline_writes_beside_the_run(data, tmp_path):
    out = tmp_path / "run"
    assert cli.main([*ERM, f"data={data}", "wandb.mode=offline", "train.steps=2", TRAINING_ONLY, f"out={out}"]) == 0
    assert [*(out / "wandb").glob("offline-run-*/*.wandb")]


class Failing:
    """A W&B run of which every call fails."""

    def __getattr__(self, name):
        raise OSError("no space left on device")


def test_a_failing_wandb_does_not_stop_training(data, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_log, "_start", lambda mode, settings: Failing())
    out = tmp_path / "run"
    assert cli.main([*ERM, f"data={data}", "wandb.mode=offline", TRAINING_ONLY, f"out={out}"]) == 0
    same_numbers(run, out)
    assert capsys.readouterr().out.count("warning: W&B failed (no space left on device)") == 1


# Launching


@pytest.mark.parametrize("launcher", [
    ["-c", "import sys; from dist_fair.cli import main; sys.exit(main())", "train", "--ranks", "2"],
    ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "dist_fair.train"],
], ids=["dist-fair train --ranks", "accelerate launch"])  # fmt: skip
def test_two_ranks_by_any_launcher_are_the_run_of_one(data, run, tmp_path, launcher):
    out = tmp_path / "two"
    arguments = [*ERM[1:], f"data={data}", "train.ranks=2", TRAINING_ONLY, f"out={out}"]
    done = succeed(call(sys.executable, *launcher, *arguments))
    same_numbers(run, out)
    assert done.stdout.count("train 4/4") == 1  # one rank speaks


def test_ranks_that_fail_alike_say_so_once_and_the_exit_code_is_theirs(data, tmp_path):
    launcher = ["-c", "import sys; from dist_fair.cli import main; sys.exit(main())", "train", "--ranks", "2"]
    done = call(sys.executable, *launcher, "recipe=erm", "train.batch_siz=4", f"out={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'train.batch_size'?") == 1
    assert "Traceback" not in done.stderr


def test_accelerate_launch_that_would_start_one_rank_says_how_to_start_two(data, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "dist_fair.train"]
    done = call(sys.executable, *launcher, *ERM[1:], f"data={data}", f"out={tmp_path / 'run'}")
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr
    assert "--multi_gpu --num_processes N" in done.stderr
    assert not (tmp_path / "run").exists()
