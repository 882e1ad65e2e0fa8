"""The scripts of slurm/ on a real Slurm, with a stand-in for the ranks: how these are called, and what becomes of the
job when they end. Ranks that train: test_training.py.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.events import EVENTS, to_all_ranks

SCRIPTS = Path(__file__).parents[2] / "slurm"
STAND_IN = str(Path(__file__).with_name("stand_in.py"))
AWKWARD = [
    "recipe=erm",
    "data.eval=[a, b]",
    "x='it is, {so: 1}'",
    "y=*",
    'z=$HOME `id` \\n "quoted"',
    "",
    "last=/train.sh ",
]


def calls(folder: Path) -> list[dict]:
    """What the stand-ins that ran in a folder saw, in order."""
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def output(folder: Path, job: int) -> str:
    return (folder / f"slurm-{job}.out").read_text()


@pytest.fixture
def submit(cluster, tmp_path):
    """submit(script, *arguments, flags=..., told=...): a job of stand-ins in tmp_path."""

    def submitted(script: Path | str, *arguments: str, flags=(), told=(), **environment) -> int:
        environment = {"DIST_FAIR_PYTHON": STAND_IN, "STAND_IN": json.dumps(told)} | environment
        script = SCRIPTS / script
        return cluster.submit(script, *arguments, flags=["--nodes=2", *flags], cwd=tmp_path, **environment)

    return submitted


# How ranks are called -------------------------------------------------------------------------------------------------


def test_each_rank_knows_its_place_and_gets_the_arguments_as_they_were(cluster, submit, tmp_path):
    job = submit("train.sh", *AWKWARD, flags=["--ntasks-per-node=2", "--cpus-per-task=2"], MINE="passed on")
    cluster.wait(job, "COMPLETED")
    seen = sorted(calls(tmp_path), key=lambda call: call["environment"]["RANK"])
    assert [call["arguments"] for call in seen] == [["-m", "dist_fair.train", *AWKWARD]] * 4
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    places = [tuple(int(call["environment"][name]) for name in names) for call in seen]
    assert places == [(0, 0, 0, 4, 2), (1, 1, 0, 4, 2), (2, 0, 1, 4, 2), (3, 1, 1, 4, 2)]
    shared = {(one["MASTER_ADDR"], one["MASTER_PORT"], one["OMP_NUM_THREADS"], one["MINE"])
              for one in (call["environment"] for call in seen)}  # fmt: skip
    assert shared == {("127.0.0.1", str(10000 + job % 20000), "2", "passed on")}


def test_rank_0_speaks_in_the_output_and_the_others_in_files_of_their_own(cluster, submit, tmp_path):
    job = submit("train.sh", "recipe=erm", flags=["--ntasks-per-node=2"], told=[{"*": "wait"}, {}])
    cluster.until(lambda: len(calls(tmp_path)) == 4, "the ranks to start", 60, job)
    to_all_ranks(cluster, job)
    cluster.wait(job, "COMPLETED")
    assert "rank 0, start 0\n" in output(tmp_path, job)
    assert "rank 0, start 1\n" in output(tmp_path, job)
    assert "rank 1" not in output(tmp_path, job)
    for start in (0, 1):
        for rank in (1, 2, 3):
            log = tmp_path / f"slurm-{job}" / f"start-{start}" / f"rank-{rank}.log"
            assert log.read_text() == f"rank {rank}, start {start}\n"
    ports = {call["environment"]["MASTER_PORT"] for call in calls(tmp_path)}
    assert len(ports) == 2, "what is left of the first start may still hold its port"


@pytest.mark.parametrize(
    ("flags", "environment", "ranks", "threads"),
    [
        (["--gpus-per-node=2", "--cpus-per-gpu=2"], {}, 2, "2"),
        (["--gpus-per-task=1", "--ntasks-per-node=2"], {}, 2, "1"),
        (["--gpus-per-node=2"], {}, 2, "1"),  # one CPU for two ranks
        (["--gpus-per-node=2", "--ntasks-per-node=1"], {}, 2, "1"),  # as for torchrun
        (["--cpus-per-task=3"], {"RANKS_PER_NODE": "3"}, 3, "1"),
        (["--cpus-per-task=4"], {"OMP_NUM_THREADS": "3"}, 1, "3"),
        (["--cpus-per-task=2", "--export=PATH,SLURM_CONF,DIST_FAIR_PYTHON"], {}, 1, "2"),  # which srun would obey too
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_rank_per_gpu_or_as_many_as_asked_for(cluster, submit, tmp_path, flags, environment, ranks, threads):
    job = submit("train.sh", "recipe=erm", flags=flags, **environment)
    cluster.wait(job, "COMPLETED")
    seen = [call["environment"] for call in calls(tmp_path)]
    assert sorted(int(one["RANK"]) for one in seen) == [*range(2 * ranks)]
    assert not [one for one in seen if {"SLURM_CPUS_PER_GPU", "SLURM_GPUS_PER_TASK"} & one.keys()]  # srun would obey
    assert {(one["OMP_NUM_THREADS"], one["MASTER_ADDR"]) for one in seen} == {(threads, "127.0.0.1")}
    assert ("ranks share 1 CPU(s) of a node" in output(tmp_path, job)) == (
        "--gpus-per-node=2" in flags and threads == "1"
    )


def test_evaluate_and_sweep(cluster, submit, tmp_path):
    scored = submit("evaluate.sh", "runs/a", "data.eval=[x]")
    cluster.wait(scored, "COMPLETED")
    assert [call["arguments"] for call in calls(tmp_path)] == [
        ["-m", "dist_fair.evaluate", "runs/a", "data.eval=[x]"]
    ] * 2
    (tmp_path / "calls.jsonl").unlink()
    swept = submit("sweep.sh", "recipe=erm", "seed=0,1", flags=["--nodes=1"], told=[{"*": 75}, {}])
    cluster.wait(swept, "COMPLETED")
    first, second = calls(tmp_path)
    assert first["arguments"] == second["arguments"] == ["-m", "dist_fair.sweep", "recipe=erm", "seed=0,1"]
    inherited = [name for name in first["environment"] if name.startswith("SLURM_") or name in ("RANK", "MASTER_ADDR")]
    assert inherited == ["SLURM_CONF"], "jobs of the sweep would take their shape from the job that submits them"


def test_by_hand_in_an_allocation(cluster, tmp_path):
    settings = cluster.environment | {"DIST_FAIR_PYTHON": STAND_IN}
    script = ["bash", str(SCRIPTS / "train.sh"), "recipe=erm"]
    cluster.run("salloc", "--nodes=2", "--ntasks-per-node=2", *script, env=settings, cwd=tmp_path)
    assert sorted(call["environment"]["RANK"] for call in calls(tmp_path)) == ["0", "1", "2", "3"]
    with pytest.raises(RuntimeError, match="submit this with sbatch"):
        cluster.run(*script, env=settings, cwd=tmp_path)


def test_the_interpreter_is_found(cluster, submit, tmp_path):
    """In a folder with blanks: DIST_FAIR_PYTHON as a command, the environment submitted from, .venv beside slurm/."""
    home = tmp_path / "a checkout"
    shutil.copytree(SCRIPTS, home / "slurm")
    environments = [tmp_path / "an environment", home / ".venv"]
    for environment in environments:
        (environment / "bin").mkdir(parents=True)
        shutil.copy(STAND_IN, environment / "bin" / "python")
    script = home / "slurm" / "train.sh"
    for number, setting in enumerate([
        {"DIST_FAIR_PYTHON": f"env INSIDE=yes {STAND_IN}"},
        {"DIST_FAIR_PYTHON": "", "VIRTUAL_ENV": str(environments[0])},
        {"DIST_FAIR_PYTHON": "", "VIRTUAL_ENV": ""},
    ]):  # fmt: skip
        job = submit(script, f"number={number}", flags=["--nodes=1"], **setting)
        cluster.wait(job, "COMPLETED")
    assert [call["arguments"][-1] for call in calls(tmp_path)] == ["number=0", "number=1", "number=2"]
    assert calls(tmp_path)[0]["environment"]["INSIDE"] == "yes"
    job = submit(script, "number=3", DIST_FAIR_PYTHON="/bin/false")
    assert cluster.wait(job, "FAILED")["ExitCode"] == "2:0"
    assert "'/bin/false' has no dist_fair: set DIST_FAIR_PYTHON" in output(tmp_path, job)


# How a job ends -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """told: what the ranks do in each start; ends: the job's state and exit code; says: in its output."""

    told: list[dict]
    ends: tuple[str, str]
    says: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


CASES = {
    "stopped in time": Case([{"*": 75}, {}], ("COMPLETED", "0:0"), ["stopped in time, all is saved; requeued"]),
    "stopped before it listens": Case([{"1": "SIGUSR1", "0": "wait"}, {}], ("COMPLETED", "0:0"), ["stopped in time"]),
    "cannot be requeued": Case([{"*": 75}], ("FAILED", "75:0"), ["submit it again"], ["--no-requeue"]),
    "refused on every rank": Case([{"*": 2}], ("FAILED", "2:0")),
    # srun ends the other ranks, which then end as if pre-empted
    "refused on one rank": Case([{"1": 2, "0": "wait"}], ("FAILED", "2:0"), ["the end of its log:\nrank 1, start 0\n"]),
    "killed": Case([{"1": "SIGKILL", "0": "wait"}, {}], ("COMPLETED", "0:0"), ["a rank was lost (exit code 137)"]),
    "lost, but not in a row": Case(
        [{"1": 74, "0": "wait"}, {"1": 1, "0": 74}, {"*": 75}, {"0": 76}, {}], ("COMPLETED", "0:0"),
        ["lost (exit code 74)", "lost (exit code 76)"]
    ),
    "lost again and again": Case(
        [{"0": 74, "1": 74}, {"1": "SIGKILL"}, {"0": 1}], ("FAILED", "1:0"), ["so ended the 2 starts before: given up"]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(running, tmp_path_factory):
    """The folder and number of a job for each case; they run side by side."""
    jobs = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        told = {"STAND_IN": json.dumps(case.told), "DIST_FAIR_PYTHON": STAND_IN, "DIST_FAIR_RESTARTS": "2"}
        number = running.submit(
            SCRIPTS / "train.sh", "recipe=erm", flags=["--nodes=2", *case.flags], cwd=folder, **told
        )
        jobs[name] = folder, number
    return jobs


@pytest.mark.parametrize("name", [*CASES])
def test_how_the_ranks_end_decides_what_becomes_of_the_job(cluster, ended, name):
    case, (folder, number) = CASES[name], ended[name]
    job = cluster.wait(number, case.ends[0])
    assert (job["JobState"], job["ExitCode"]) == case.ends
    assert int(job["Restarts"]) == len(case.told) - 1
    for text in case.says:
        assert text in output(folder, number)


# Events --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_whatever_stops_the_job_it_starts_again(cluster, submit, tmp_path, event):
    job = submit("train.sh", "recipe=erm", told=[{"*": "wait"}, {}])
    cluster.until(lambda: len(calls(tmp_path)) == 2, "the ranks to start", 60, job)
    event(cluster, job)
    restarts = int(cluster.wait(job, "COMPLETED")["Restarts"])
    assert restarts in (1, 2)  # Slurm may try a lost node once more
    starts = [call["start"] for call in calls(tmp_path)]
    assert (starts[:2], starts[-2:]) == ([0, 0], [restarts] * 2)


def test_a_cancelled_job_stays_cancelled(cluster, submit, tmp_path):
    """Though its ranks end as pre-empted ones do."""
    job = submit("train.sh", "recipe=erm", told=[{"*": "wait"}])
    cluster.until(lambda: len(calls(tmp_path)) == 2, "the ranks to start", 60, job)
    cluster.run("scancel", str(job))
    cluster.wait(job, "CANCELLED")
    cluster.until(lambda: not cluster.at_work(job), "the script to end")
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("CANCELLED", "0")
    assert "stopped in time, all is saved; ended by Slurm" in output(tmp_path, job)


@pytest.mark.long  # Slurm's limits are whole minutes, and it looks every 30 s
def test_before_its_time_is_up_a_job_is_told_and_starts_again(cluster, submit, tmp_path):
    job = submit("train.sh", "recipe=erm", told=[{"*": "wait"}, {}], flags=["--time=2", "--signal=USR1@60"])
    assert cluster.wait(job, "COMPLETED", timeout=240)["Restarts"] == "1"
    assert "stopped in time, all is saved; requeued" in output(tmp_path, job)
