"""A real Slurm of four virtual nodes on this machine, private to one folder and one user, in about a second.

    with Cluster() as cluster:
        job = cluster.submit("slurm/train.sh", "recipe=erm", "out=/tmp/run", flags=["--nodes=2"], cwd=folder)
        cluster.wait(job, "COMPLETED")

Nodes n1 to n4 have 4 CPUs and 4 GPUs each on paper. Jobs of partition `high` pre-empt those of `main`. Root or not.
"""

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
# Debian's daemons lie where a plain user's PATH does not look.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# What the tests' own environment must not tell the jobs.
FOREIGN = ("SLURM_", "SBATCH_", "DIST_FAIR_", "OMP_NUM_THREADS", "RANK", "VIRTUAL_ENV", "MASTER_", "WORLD_SIZE")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
FirstJobId={first}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=5
InactiveLimit=0
KillWait=5
MinJobAge=3600
MailProg=/bin/true
GresTypes=gpu
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=4 RealMemory=4000 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""


def missing() -> str:
    """Why no cluster can be started here, or ""."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return f"no {', '.join(absent)} here (Debian: slurm-wlm and munge)" if absent else ""


class Cluster:
    """A running cluster. Everything it started, jobs' processes too, is gone when its context ends, or its process."""

    def __init__(self):
        self._daemons: dict[str, subprocess.Popen] = {}
        self._hurried: set[tuple[int, str]] = set()

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self._guard = subprocess.Popen([sys.executable, "-S", __file__, str(self.folder)], stdin=subprocess.PIPE,
                                       start_new_session=True)  # fmt: skip
        outer = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.environment = outer | {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._configure()
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    # Jobs ------------------------------------------------------------------------------------------------------------

    def run(self, *command: str, **options) -> str:
        """The output of a command that can reach the cluster, such as scontrol. Raises where it fails."""
        options = {"env": self.environment, "timeout": 60} | options
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: str | Path, *arguments: str, flags: Sequence[str] = (), cwd: Path, **environment) -> int:
        """The number of a job submitted with sbatch from `cwd`, where its output goes."""
        told = self.run("sbatch", "--parsable", *flags, str(script), *arguments, cwd=cwd,
                        env=self.environment | environment)  # fmt: skip
        return int(told.strip())

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job, by field."""
        return self._jobs()[number]

    def wait(self, number: int, *states: str, timeout: float = 120) -> dict[str, str]:
        """The job's fields once it is in one of the states. Raises where it ends in another one or is late.

        Jobs that were requeued meanwhile start again after 3 s.
        """

        def there() -> dict[str, str] | None:
            jobs = self._jobs()
            self._hurry(jobs)
            if (job := jobs[number])["JobState"] in states:
                return job
            if job["JobState"] in ENDED:
                raise AssertionError(f"job {number} is {job['JobState']}, {job['ExitCode']}\n{self._said(job)}")
            return None

        return self.until(there, f"job {number} to be {' or '.join(states)}", timeout, number)

    def until(self, true, what: str, timeout: float = 60, number: int | None = None):
        """The first true answer of `true()`, asked four times a second; TimeoutError, with a job's output, if late."""
        deadline = time.monotonic() + timeout
        while not (answer := true()):
            if time.monotonic() > deadline:
                said = self._said(self.job(number)) if number else ""
                raise TimeoutError(f"waited {timeout:g} s for {what}\n{said}")
            time.sleep(0.25)
        return answer

    def ranks(self, number: int) -> dict[int, int]:
        """Process number by rank of a job's training processes that run now."""
        found: dict[int, int] = {}
        for process, environment in sorted(processes(self.folder), reverse=True):
            if environment.get("SLURM_JOB_ID") == str(number) and environment.get("RANK", "").isdigit():
                found[int(environment["RANK"])] = process  # a rank's loaders have its environment, and larger numbers
        return found

    def at_work(self, number: int) -> bool:
        """Whether a process of a job runs, the batch script too."""
        return any(environment.get("SLURM_JOB_ID") == str(number) for _, environment in processes(self.folder))

    def _jobs(self) -> dict[int, dict[str, str]]:
        told = self.run("scontrol", "-o", "show", "jobs").splitlines()
        jobs = [dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", line)) for line in told]
        return {int(job["JobId"]): job for job in jobs if "JobId" in job}

    def _hurry(self, jobs: dict[int, dict[str, str]]) -> None:
        """By itself Slurm waits until a requeued job's credential expires; in the same second it would refuse it."""
        for number, job in jobs.items():
            start = number, job["Restarts"]
            if job["JobState"] == "PENDING" and job["Restarts"] != "0" and start not in self._hurried:
                self.run("scontrol", "update", f"jobid={number}", "starttime=now+3")
                self._hurried.add(start)

    @staticmethod
    def _said(job: dict[str, str]) -> str:
        path = Path(job.get("StdOut", ""))
        return path.read_text()[-5000:] if path.is_file() else "(no output)"

    # Daemons ---------------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Starts a node's daemon, again where it was killed."""
        self._spawn(node, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def kill_node(self, node: str) -> None:
        """Kills a node's daemon and all that runs on it, as a power cut would. Slurm notices within 26 s."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        for process, environment in sorted(processes(self.folder)):  # a step's daemon before its tasks
            if environment.get("SLURMD_NODENAME") == node:
                _kill(process)

    def restore(self) -> None:
        """Brings all nodes back into service."""
        for node in NODES:
            if self._daemons[node].poll() is not None:
                self.start_node(node)

        def up() -> bool:
            for node in self._nodes("down"):
                with contextlib.suppress(RuntimeError):  # it has come back by itself in between
                    self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return not self._nodes("down")

        self.until(up, "all nodes to be up")

    def _nodes(self, state: str) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-t", state, "-o", "%N").split())

    def _configure(self) -> None:
        port = _free_ports(1 + len(NODES))
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for number in range(4):
            (self.folder / f"gpu{number}").touch()
        # Two clusters on one machine have different job numbers, hence different ports of their runs.
        (self.folder / "slurm.conf").write_text(CONFIG.lstrip().format(
            host=socket.gethostname().split(".")[0], port=port, node_ports=f"{port + 1}-{port + len(NODES)}",
            user=self.run("id", "-un").strip(), folder=self.folder, first=port,
        ))  # fmt: skip
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={self.folder}/gpu[0-3]\n")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start(self) -> None:
        munge = {"key-file": "key", "socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self.folder.chmod(0o755)  # munge wants its socket to be reachable
        self._spawn("munged", "munged", "--foreground", *(f"--{option}={self.folder}/munge.{name}"
                                                          for option, name in munge.items()))  # fmt: skip
        self.until((self.folder / "munge.socket").exists, "munged's socket", 20)
        self._spawn("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.until(self._idle, "four idle nodes", 30)

    def _idle(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                said = (self.folder / f"{name}.out").read_text()[-3000:]
                raise RuntimeError(f"{name} ended with {daemon.returncode}:\n{said}")
        with contextlib.suppress(RuntimeError):  # slurmctld does not listen yet
            return self._nodes("idle") == {*NODES}
        return False

    def _spawn(self, name: str, program: str, *arguments: str, **environment: str) -> None:
        with open(self.folder / f"{name}.out", "a") as out:
            self._daemons[name] = subprocess.Popen([shutil.which(program, path=PATH), *arguments], stdout=out,
                                                   stderr=out, env=self.environment | environment,
                                                   cwd=self.folder,
                                                   start_new_session=True)  # fmt: skip

    def _stop(self) -> None:
        self._guard.stdin.close()
        for process in (self._guard, *self._daemons.values()):
            process.wait()


def processes(folder: Path) -> list[tuple[int, dict[str, str]]]:
    """Number and environment of every process that was started in the cluster of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            environment = dict(word.split("=", 1) for word in words if "=" in word)
            if environment.get("SLURM_CONF") == f"{folder}/slurm.conf":
                found.append((int(path.parent.name), environment))
    return found


def clear(folder: Path) -> None:
    """Kills what was started in the cluster of a folder, and removes the folder."""
    deadline = time.monotonic() + 10
    while (found := processes(folder)) and time.monotonic() < deadline:
        for process, _ in found:
            _kill(process)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports, below those that the kernel hands out."""
    for _ in range(100):
        first = random.randrange(15000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {count} neighbouring free ports")


if __name__ == "__main__":  # the guard: waits until whoever started the cluster has no more use for it, or is no more
    sys.stdin.read()
    clear(Path(sys.argv[1]))
