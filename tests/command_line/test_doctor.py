"""`dist-fair doctor`: every check finds what it is for; ranks that differ, are silent or hang are named."""

import json
import os
import re
import resource
import socket
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dist_fair import doctor
from dist_fair.collectives import Communicator
from dist_fair.detectors import registry
from dist_fair.diagnosis import experiment, files, machine, network, services, software
from dist_fair.diagnosis.examination import CHECKS, Check, examine, examined
from dist_fair.diagnosis.ranks import Ranks, meet
from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, merged, ok, problem, warning
from dist_fair.errors import DistFairError
from dist_fair.recipe.composition import load
from dist_fair.recipes import interventions
from tests.command_line import crashing
from tests.ranks import run_ranks

HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}
SMALL = ("train.batch_size=16", "detector.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "WANDB_", "NCCL_", "GLOO_", "TORCHELASTIC_")) or name in (
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "HTTPS_PROXY", "https_proxy", "NETRC"
        ):  # fmt: skip
            monkeypatch.delenv(name)
    return monkeypatch


def site(*overrides: str, world: int = 1, rank: int = 0, **environment: object) -> Site:
    told = {name: str(value) for name, value in environment.items()}
    resolved = load(overrides, interventions()) if overrides else None
    return Site(Ranks(rank, world), told, resolved, hosts={rank: "here"})


def state(verdict: Verdict, found: str = "", fix: str = "") -> str:
    """The state, if these words are in the verdict."""
    assert found in verdict.found, verdict
    assert fix in verdict.fix, verdict
    return verdict.state


def test_ranks_that_agree_are_one_line_and_those_that_differ_are_named() -> None:
    said = {rank: [ok("v", "2.15" if rank < 3 else "2.14", alike=True)] for rank in range(4)}
    assert merged(said, HOSTS)[0].state == "warning"
    assert merged(said, HOSTS)[0].found == "2.15 on ranks 0-2 on a, b; 2.14 on rank 3 on b"
    (same,) = merged({rank: [ok("v", "2.15", alike=True)] for rank in range(4)}, HOSTS)
    assert same == ok("v", "2.15", alike=True)
    said = {0: [ok("d", "1 GB")], 1: [problem("d", "none", "mend")], 2: [warning("d", "few", "x")]}
    assert merged(said, HOSTS) == [problem("d", "rank 1 on a: none", "mend")]
    assert merged({0: [ok("d", "1 ms")], 2: [ok("d", "2 ms")]}, HOSTS)[0].found == "1 ms (rank 0 on a)"
    many = {rank: f"n{rank}" for rank in range(9)}
    said = {rank: [problem("d", "none", "mend")] if rank % 2 == 0 else [] for rank in range(9)}
    said[1] = [ok("d", "1 GB")]
    assert merged(said, many)[0].found == "ranks 0, 2, 4, 6, 8 on n0, n2, n4 and 2 more: none"
    said = {rank: [problem("d", "waits" if rank != 1 else "out of memory")] for rank in range(3)}
    assert merged(said, HOSTS)[0].found == "ranks 0, 2 on a, b: waits; rank 1 on a: out of memory"
    said = {rank: [problem("d", f"{rank} s")] for rank in range(4)}
    assert merged(said, HOSTS)[0].found == "rank 0 on a: 0 s; rank 1 on a: 1 s; and ranks 2-3 on b likewise"


def test_a_check_that_hangs_or_fails_is_a_problem() -> None:
    (hung,) = examined(Check("slow", lambda site: time.sleep(5), 0.05, "look there"), site())
    assert hung == problem("slow", "no answer within 0 s", "look there")

    def fail(site: Site) -> None:
        raise RuntimeError("no driver")

    (failed,) = examined(Check("bad", fail), site())
    assert state(failed, "the check failed: RuntimeError: no driver") == "problem"


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"torchvision": ["numpy", "torch==2.0.1"], "dist-fair": ["numpy<1", "pytest>=8 ; extra == 'test'", "nope"]}
    monkeypatch.setattr(software.metadata, "requires", wanted.get)
    assert state(software.torchvision_fits(site()), "built for torch==2.0.1", "from one index") == "problem"
    assert state(software.requirements(site()), "not met: numpy<1 (found ", "constraints") == "problem"
    assert state(software.requirements(site()), "nope (found none)") == "problem"
    monkeypatch.setattr(software.metadata, "requires", lambda name: [])

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(software.importlib, "import_module", broken)
    assert state(software.torchvision_fits(site()), "nms does not exist") == "problem"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state(machine.gpus(site()), "none: the CPU") in ("ok", "problem")
    monkeypatch.setattr(machine, "glob", lambda pattern: ["/dev/nvidia0"])
    assert state(machine.gpus(site()), "torch", "nvidia-smi" if torch.version.cuda else "CPU") == "problem"
    assert machine.gpus(site(CUDA_VISIBLE_DEVICES="")).state == "ok"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert state(machine.gpus(site(LOCAL_WORLD_SIZE=4)), "1 for 4 ranks", "one rank per GPU") == "problem"


def test_limits_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.threads(site(OMP_NUM_THREADS=1)).state == "ok"
    assert state(machine.threads(site(OMP_NUM_THREADS=10_000)), "10000 threads on", "OMP_NUM_THREADS=1") == "warning"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    assert state(machine.open_files(site()), "256", "ulimit -n 4096") == "problem"
    loading = site("recipe=erm", "data.workers=8", "data.image_size=224", "train.batch_size=64")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert state(machine.shared_memory(loading), "0.07 GB free", "--shm-size") == "problem"
    assert machine.temporary_files(site()).state == "warning"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", full)
    assert state(machine.temporary_files(site()), "No space left", "TMPDIR") == "problem"


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({}, "without LOCAL_RANK, LOCAL_WORLD_SIZE: all of a node would take GPU 0"),
        ({"LOCAL_RANK": 4, "LOCAL_WORLD_SIZE": 4}, "LOCAL_RANK=4 of LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "SLURM_STEP_ID": 0, "SLURM_NTASKS": 2}, "2 tasks of srun"),
    ],
)
def test_launchers_that_contradict_themselves(told: dict, found: str) -> None:
    assert state(services.launch(site(world=8, **told)), found, "slurm/rank.sh") == "problem"
    assert state(services.launch(site(world=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2)), "by hand") == "ok"


def test_a_bare_srun_is_told_what_to_do(environment, capsys: pytest.CaptureFixture) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}.items():
        environment.setenv(name, value)
    with pytest.raises(DistFairError, match=r"(?s)4 tasks of one srun, .*slurm/doctor\.sh.*srun bash slurm/rank\.sh"):
        doctor.main([])
    environment.setenv("SLURM_PROCID", "3")
    assert doctor.main([]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("job", "script", "expected", "words"),
    [
        ("Requeue=1 BatchFlag=1", "#SBATCH --signal=USR1@120", "ok", "--signal=USR1@120"),
        ("Requeue=0 BatchFlag=1", "#SBATCH --signal=USR1@120", "warning", "not to be requeued"),
        ("Requeue=1 BatchFlag=1", "echo", "warning", "no #SBATCH --signal"),
        ("Requeue=1 BatchFlag=0", "", "ok", "interactive"),
        ("Requeue=0 BatchFlag=1 Command=/home/me/slurm/doctor.sh", "", "ok", "slurm/train.sh asks"),
    ],
)
def test_slurm_job(tmp_path: Path, environment, job: str, script: str, expected: str, words: str) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = write ]; then echo "{script}"; else echo "Partition=main {job}"; fi\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert state(services.slurm_job(site(SLURM_JOB_ID=7)), words) == expected
    environment.setenv("PATH", "/nowhere")
    assert state(services.slurm_job(site(SLURM_JOB_ID=7)), "no scontrol") == "warning"


def test_wandb_says_whether_a_key_is_there_and_never_which(environment, tmp_path: Path) -> None:
    environment.setenv("HOME", str(tmp_path))
    online = site("recipe=erm", "wandb.mode=online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert state(services.wandb(site("recipe=erm")), "offline (wandb.mode=auto)") == "ok"
    assert state(services.wandb(online), "without a key", "wandb login") == "problem"
    environment.setenv("WANDB_API_KEY", SECRET)
    verdict = services.wandb(online)
    assert state(verdict, "127.0.0.1 does not answer", "wandb.mode=offline") == "warning"
    assert SECRET not in str(verdict)


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    for variable, value, expected in (("GLOO_SOCKET_IFNAME", "ib0", "problem"), ("NCCL_SOCKET_IFNAME", "eth", "ok"),
                                      ("GLOO_SOCKET_IFNAME", "eth0", "ok"), ("NCCL_SOCKET_IFNAME", "=eth", "problem"),
                                      ("NCCL_SOCKET_IFNAME", "^docker", "ok")):  # fmt: skip
        assert network.interface(site(**{variable: value})).state == expected, (variable, value)
    two_nodes = site(world=4, LOCAL_WORLD_SIZE=2)
    assert state(network.interface(two_nodes), "127.0.1.1 to itself", "GLOO_SOCKET_IFNAME") == "warning"


@pytest.mark.parametrize(
    ("ahead", "expected", "words"),
    [(0.4, "ok", "0.300 s apart"), (-3, "warning", "3.0 s behind"), (90, "problem", "90.0 s ahead")],
)
def test_clocks(monkeypatch: pytest.MonkeyPatch, ahead: float, expected: str, words: str) -> None:
    looked = site(world=2)
    monkeypatch.setattr(looked.ranks, "pairwise", lambda key: {1: (ahead, 0.2)})
    assert state(network.clocks(looked), words) == expected


def test_run_folders_that_do_not_keep_their_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "run"
    looked = site("recipe=erm", f"out={out}")
    for check in (files.visible, files.locks, files.renames, files.free_space):
        assert check(looked).state == "ok"
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr(
        files.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=1, f_favail=5, f_files=9)
    )
    assert state(files.free_space(looked), "5 inodes") == "problem"
    monkeypatch.setattr(files.fcntl, "flock", lambda file, how: None)
    assert state(files.locks(looked), "is not seen here", "flock") == "problem"

    def unsupported(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    assert state(files.locks(looked), "flock does not work there (Function not implemented)") == "problem"
    monkeypatch.setattr(files.os, "replace", lambda aside, path: path.write_text(aside.read_text()[:100]))
    assert state(files.renames(looked), "half written") == "problem"
    (tmp_path / "file").touch()
    refused = site("recipe=erm", f"out={tmp_path / 'file' / 'run'}")
    (verdict,) = examined(Check("run folder", files.visible), refused)
    assert state(verdict, "cannot be written: Not a directory: choose another out=") == "problem"


def test_data_that_a_rank_cannot_use(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = site("recipe=erm", f"data={data}", f"data.stage_to={tmp_path}")
    assert [verdict.state for verdict in experiment.data_sets(good)] == ["ok"] * 3
    assert state(experiment.stage_to(good), "and fit") == "ok"
    bad = site("recipe=erm", f"data={data}", "data.eval=[nowhere]", "data.stage_to=$NOT_SET")
    assert [verdict.state for verdict in experiment.data_sets(bad)] == ["ok", "problem"]
    (verdict,) = examined(Check("data.stage_to", experiment.stage_to), bad)
    assert state(verdict, "$NOT_SET is not set") == "problem"
    three = site("recipe=erm", f"data={data}", world=3)
    (verdict,) = examined(Check("lanes", experiment.lanes), three)
    assert state(verdict, "3 ranks do not divide data.lanes") == "problem"
    more = site("recipe=erm", f"data={data}", "train.ranks=8")
    assert state(experiment.lanes(more), fix="train.ranks=8 stops such a run") == "warning"
    monkeypatch.setattr("dist_fair.data.reading.zlib.crc32", lambda data: 0)
    assert state(experiment.data_sets(good)[0], "the bytes are not those that were indexed") == "problem"


def test_the_program_alone(data: Path, tmp_path: Path, environment, capsys: pytest.CaptureFixture) -> None:
    environment.setenv("WANDB_API_KEY", SECRET)
    arguments = ["recipe=erm", f"data={data}", f"out={tmp_path / 'run'}", "wandb.mode=offline", *SMALL]
    assert doctor.main(arguments) == 0
    output = capsys.readouterr().out
    assert "0 problem(s)" in output
    assert re.search(r"^ok +one step +[0-9.]+ s on the CPU, [0-9.]+ samples/s; ", output, re.MULTILINE)
    crashing.known(environment)
    assert doctor.main([*arguments, "detector.name=crashing", "--json"]) == 2
    (found,) = [one for one in json.loads(capsys.readouterr().out)["verdicts"] if one["state"] != "ok"]
    assert found["name"] == "one step"
    assert f"the backward pass of a real step fails on the CPU: RuntimeError: {crashing.ASSERTION}" in found["found"]
    assert doctor.main(["recipe=ermm", "--json"]) == 2
    output = capsys.readouterr().out
    document = json.loads(output)
    told = {one["name"]: one for one in document["verdicts"]}
    assert document["world"] == 1
    assert told["recipe"]["state"] == "problem"
    assert "did you mean" in told["recipe"]["found"]
    assert SECRET not in output
    assert not (tmp_path / "run").exists()


def test_the_store_of_rank_0_cannot_be_reached(environment, capsys: pytest.CaptureFixture) -> None:
    told = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    with pytest.raises(DistFairError, match=r"rank 1 cannot meet the others at 127\.0\.0\.1:9 .*firewall"):
        meet(told, patience=1)
    with pytest.raises(DistFairError, match="WORLD_SIZE=2 without MASTER_ADDR"):
        meet({"WORLD_SIZE": "2", "RANK": "1"})


def _look(
    comm: Communicator, folder: Path, card: Path, silent: bool = False, apart: bool = False, name: str = "resnet18"
) -> list[Verdict]:
    """All checks on a rank that talks to the others by a file, but may say nothing, or lie on another disk."""
    told = {"RANK": str(comm.rank), "LOCAL_RANK": str(comm.rank), "LOCAL_WORLD_SIZE": str(comm.world),
            "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    os.environ.update(told, WORLD_SIZE=str(comm.world))
    registry.register("crashing")(crashing.crashing)
    torch.cuda.device_count = lambda: 0
    files.PATIENCE = 0.5
    if silent and comm.rank == 1:
        time.sleep(4)
        return []
    ranks = Ranks(comm.rank, comm.world, dist.FileStore(str(folder / "store"), comm.world), 1.0 if silent else 60.0)
    out = folder / (f"own{comm.rank}" if apart else "run")
    chosen = ["recipe=erm", f"data={card}", f"out={out}", f"detector.name={name}", *SMALL]
    looked = Site(ranks, told, load(chosen, interventions()))
    looked.hosts = ranks.collect("hello", f"node{comm.rank}")
    return examine(looked, [check for check in CHECKS if check.name != "Slurm job"])


def test_two_ranks(tmp_path: Path, data: Path) -> None:
    verdicts, others = run_ranks(2, _look, tmp_path, data)
    assert others == []
    told = {verdict.name: verdict for verdict in verdicts}
    assert {verdict.state for verdict in verdicts} == {"ok"}, verdicts
    assert told["ranks"].found == "2 on node0, node1"
    assert told["all-reduce"].found.startswith("gloo: 8 MiB in ")
    assert told["clocks"].found.endswith(" s apart")
    assert "a sample decoded on each rank" in told["data train"].found
    assert " s on the CPU, " in told["one step"].found
    assert not (tmp_path / "run").exists()


def test_two_ranks_whose_step_crashes(tmp_path: Path, data: Path) -> None:
    told = {verdict.name: verdict for verdict in run_ranks(2, _look, tmp_path, data, False, False, "crashing")[0]}
    assert [name for name, verdict in told.items() if verdict.state != "ok"] == ["one step"]
    assert (
        "train.batch_size=16 (8 at a time on each of 2 ranks): the backward pass of a real " in told["one step"].found
    )
    assert f"RuntimeError: {crashing.ASSERTION}" in told["one step"].found


def test_two_ranks_that_do_not_share_a_disk(tmp_path: Path, data: Path) -> None:
    told = {verdict.name: verdict for verdict in run_ranks(2, _look, tmp_path, data, False, True)[0]}
    assert state(told["run folder"], "rank 1 on node1", "file system that all nodes share") == "problem"
    assert "not seen here" in told["run folder"].found
    assert {told["flock"].state, told["rename"].state} == {"problem"}
    assert not any(path.name.startswith("own") for path in tmp_path.iterdir())


def test_a_silent_rank_is_named_and_waited_for_once(tmp_path: Path, data: Path) -> None:
    told = {verdict.name: verdict for verdict in run_ranks(2, _look, tmp_path, data, True, False)[0]}
    assert state(told["ranks"], "1 of 2 do not answer: rank 1", "MASTER_ADDR") == "problem"
    assert state(told["all-reduce"], "not run without ranks 1") == "problem"
    assert state(told["one step"], "not taken without ranks 1") == "problem"
    assert told["run folder"].state == "ok"
