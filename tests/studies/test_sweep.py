"""`dist-fair sweep` on this machine: what is missing is trained, what is wrong is said first, the rest is ranked."""

import json
import os
import signal
import subprocess

import pytest
from pyarrow import parquet

from dist_fair import cli
from dist_fair.errors import DistFairError
from dist_fair.studies import runs
from dist_fair.studies.slurm import Resources
from dist_fair.studies.sweep import minutes, names, planned, read
from tests.slurm import trained

GRID = ("optimizer.lr=0.01,0.02", "seed=0,1", "data.eval=[far]")


@pytest.fixture(scope="module")
def real(erm, tmp_path_factory):
    """A real run of four steps."""
    folder = tmp_path_factory.mktemp("real") / "run"
    plain = ("evaluation.bootstrap=0", "evaluation.figures=false")
    assert cli.main(["train", *erm, *plain, "data.eval=[far]", f"out={folder}"]) == 0
    return folder


@pytest.fixture
def copied(real, monkeypatch):
    """In place of each training, what the real run left; those of `fail` fail. Lists what was started."""
    monkeypatch.setenv("TRAINED", str(real))

    def put(*fail: str) -> list[str]:
        begun = []

        def start(run, ranks):
            begun.append(run.folder.name)
            if run.folder.name in fail:
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                run.log.write_text("error: this one fails\n")
                return subprocess.Popen(["false"])
            trained.leave(run.folder, dict(text.split("=", 1) for text in run.arguments))
            return subprocess.Popen(["true"])

        monkeypatch.setattr(runs, "_start", start)
        return begun

    return put


def sweep(*arguments: str) -> int:
    return cli.main(["sweep", *arguments])


def test_one_of_four_fails_and_the_same_command_trains_that_one_again(erm, copied, tmp_path, capsys):
    begun = copied("lr=0.02,seed=0")
    out = tmp_path / "out"
    command = [*erm, *GRID, f"out={out}"]
    assert sweep(*command) == 2
    told = capsys.readouterr()
    assert begun == ["lr=0.01,seed=0", "lr=0.02,seed=0", "lr=0.01,seed=1", "lr=0.02,seed=1"]  # seed by seed
    assert "4 runs in" in told.out
    assert "runs 4/4  running 0  failed 1" in told.out
    assert "error: 1 of 4 runs failed; the same command again trains only what is missing\n" in told.err
    assert f"lr=0.02,seed=0: exit code 1; {out}/lr=0.02,seed=0.log ends:\n    error: this one fails" in told.err
    rows = parquet.read_table(out / "leaderboard.parquet").to_pylist()
    assert [(row["setting"], row["optimizer.lr"], row["runs"], row["planned"]) for row in rows] == [
        ("lr=0.01", "0.01", 2, 2), ("lr=0.02", "0.02", 1, 2),
    ]  # fmt: skip
    found = json.loads((out / "lr=0.01,seed=1" / "evaluation.json").read_text())["far"]
    assert rows[0]["AUC_mean"] == found["utility"]["frame"]["AUC"]
    text = (out / "leaderboard.md").read_text()
    assert "Incomplete: 1 of 4 runs failed." in text
    assert "error: this one fails" in text
    assert "| 1 of 2, incomplete |" in text

    begun = copied()
    assert sweep(*command, "--dry-run") == 0
    assert "lr=0.02,seed=0: starts\nlr=0.01,seed=1: finished\n" in capsys.readouterr().out
    assert sweep(*command, "--attributes", "race", "--fairness", "F_DP", "--sort", "skew") == 0
    assert begun == ["lr=0.02,seed=0"]
    assert "ncomplete" not in (text := (out / "leaderboard.md").read_text())
    assert "Skew over race. Best Skew first." in text
    assert "mean F_DP" in text


def test_all_that_is_wrong_is_said_at_once(erm, copied, tmp_path, capsys):
    begun = copied()
    out = tmp_path / "out"
    assert sweep(*erm, "optimizer.lr=0.01,-1,x", "seed=0,1", f"out={out}") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: 4 of 6 runs cannot be started:\n")
    assert f"{out}/lr=-1,seed=0: " in told
    assert f"{out}/lr=x,seed=0: command line: optimizer.lr=x: expected float (1 more say so)" in told
    assert not begun
    assert not out.exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["log.every=5,10"], "1 of 2 runs would train what another one trains: leave out values that change nothing\n"
                         "every=10 is every=5"),
    (["cluster=slrum"], "cluster=slrum: did you mean 'slurm'?"),
    (["gpus=2"], "gpus=2 has no effect without cluster=slurm: leave it out"),
    (["sbatch.account=us"], "sbatch.account=us has no effect without cluster=slurm"),
    (["parallel=0"], "parallel=0: a whole number, at least 1"),
    (["parallel=2,3"], "parallel=2,3: one value a sweep; a text with commas is written 'a,b'"),
    (["out=a", "out=b"], "out=b: out is given twice"),
    (["cluster=slurm", "gpus=2", "ranks=3"], "ranks=3 gpus=2: one rank a GPU: leave out ranks"),
    (["cluster=slurm", "time=tomorrow"], "time=tomorrow: minutes, H:MM:SS or D-HH:MM:SS"),
    (["--attributes", "rage"], "--attributes rage: did you mean 'race'?"),
    (["sweep=nowhere"], "sweep=nowhere: no such sweep: known: daid_ablation, daid_weights, sfd_channels (your own"),
])  # fmt: skip
def test_no_sweep(erm, copied, tmp_path, monkeypatch, capsys, arguments, message):
    begun = copied()
    monkeypatch.chdir(tmp_path)
    assert sweep(*erm, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not begun


def test_two_sweeps_in_one_folder(erm, tmp_path):
    one, other = (planned([*erm, f"out={tmp_path}"]) for _ in range(2))
    with (
        one.claimed(),
        pytest.raises(DistFairError, match="another `dist-fair sweep` is at work there"),
        other.claimed(),
    ):
        pass
    with other.claimed():
        pass


def test_the_signal_of_a_job_script_is_not_a_failure(erm, started, tmp_path, capsys):
    """slurm/sweep.sh asks with USR1, and requeues its job after exit code 75."""
    before = signal.getsignal(signal.SIGUSR1)
    processes = started("exec sleep 60", signal.SIGUSR1)
    assert sweep(*erm, *GRID, f"out={tmp_path / 'out'}", "parallel=4") == 75
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGUSR1) == before
    assert "SIGUSR1" in capsys.readouterr().err


# Sweep files


@pytest.fixture
def file(tmp_path):
    """Writes a sweep file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_and_a_command_line(erm, file):
    path = file('overrides: [recipe=erm, "seed=0,1"]\nsettings: {plain: [], slow: ["optimizer.lr=1e-4,1e-5"]}')
    plan = planned([f"sweep={path}", "seed=2,3,4", *erm, "parallel=3"])
    assert (plan.name, str(plan.out), plan.parallel, plan.resources) == ("mine", "runs/sweep/mine", 3, None)
    assert [setting.name for setting in plan.runs] == ["plain", "slow, lr=0.0001", "slow, lr=1e-05"]
    assert [run.folder.name for run in plan.all][:4] == [
        "plain,seed=2", "slow,lr=0.0001,seed=2", "slow,lr=1e-05,seed=2", "plain,seed=3",
    ]  # fmt: skip
    assert plan.all[0].arguments[2:] == (*erm, "seed=2")


@pytest.mark.parametrize(("text", "message"), [
    ("rows: []", "unknown key rows: known: ablation, overrides, settings"),
    ("overrides: recipe=erm", "overrides=recipe=erm: expected [key=value, ...], in quotes where there is a comma"),
    ("overrides: [recipe=erm, seed=0,1]", "overrides=[recipe=erm, seed=0, 1]: expected"),
    ("overrides: []\nsettings: [a]", "settings=[a]: expected NAME: [key=value, ...] for each"),
    ("overrides: []\nsettings: {a: x=1}", "settings.a=x=1: expected [key=value, ...]"),
    ("overrides: []\nsettings: {a: []}\nablation: daid", "settings beside ablation: one of them"),
    ("overrides: [recipe=erm, cluster=slurm]", "overrides: cluster=slurm: cluster says where runs are trained"),
    ("overrides: [recipe=erm]\nsettings: {a: [seed=3]}", "seed=3 of the sweep's setting 'a': seed is the same"),
])  # fmt: skip
def test_errors_of_a_file(file, text, message):
    with pytest.raises(DistFairError) as error:
        planned([f"sweep={file(text)}"])
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "settings"), [("daid_ablation", 7), ("daid_weights", 9), ("sfd_channels", 16)])
def test_shipped_files(name, settings):
    assert name in names()
    plan = planned([f"sweep={name}"])
    assert (len(plan.runs), len(plan.all)) == (settings, 3 * settings)
    recipes = [plan.all[place].resolved.recipe for place in (0, settings - 1)]
    assert recipes[0].seed == recipes[1].seed == 0
    assert recipes[0].recipe == name.partition("_")[0]
    assert plan.all[0].resolved.fingerprint() != plan.all[settings - 1].resolved.fingerprint()


def test_the_ablation_sweep_has_the_rows_of_the_ablation():
    _, rows = read("daid_ablation")
    assert [*rows] == ["ERM", "reweight", "reweight + normalise", "L_attr", "L_attr + L_ortho",
                       "reweight + normalise + L_attr", "DAID"]  # fmt: skip
    assert rows["DAID"] == []
    assert "~interventions.pair_alignment" in rows["reweight"]


# What jobs ask for


def test_resources():
    plan = planned(["recipe=erm", "seed=0", "cluster=slurm", "nodes=2", "gpus=4", "time=1-02:00:30", "partition='a,b'",
                    "sbatch.account=us", "cpus=8", "parallel=5"])  # fmt: skip
    assert plan.resources == Resources(2, 4, 4, 8, 26 * 60 + 1, 5, "a,b", {"account": "us"})
    assert plan.resources.parameters("x") == {
        "job_name": "x", "nodes": 2, "ntasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 8, "partition": "a,b",
        "time": 1561, "array_parallelism": 5, "signal_delay_s": 120, "srun_args": ["--cpus-per-task=8"],
        "additional_parameters": {"requeue": True, "account": "us"},
    }  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("1:30:00", 90), ("0:00:01", 1), ("2-00:00:00", 2880)])
def test_minutes(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["0", "0:00:00", "1:30", "-5", "1h"])
def test_no_minutes(text):
    with pytest.raises(DistFairError, match="time="):
        minutes(text)


def test_slurm_that_is_not_here(erm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", os.devnull)
    assert sweep(*erm, f"out={tmp_path / 'out'}", "cluster=slurm") == 2
    assert "cluster=slurm: no sbatch on PATH: start this where jobs are submitted" in capsys.readouterr().err
