"""What a Slurm job of a study does on each of its ranks. Slurm starts one of these a rank, through submitit.

The rank itself is a child process, `python -m dist_fair.train`: the program that people start, with its exit codes.
This one says who the rank is, hands signals on, and lets rank 0 requeue the job where the same command goes on.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.helpers import TorchDistributedEnvironment

from dist_fair.errors import Exit

LOST = 3  # starts in a row that may end without saving, until the job is given up
PROGRAM = (sys.executable, "-m", "dist_fair.train")


@dataclass
class RankTask:
    """A rank of a run, as submitit keeps it between start and requeue.

    overrides: of `dist_fair.train`. log: what rank 0 prints is appended to it, of rank R to LOG.R. threads: of each
    rank, unless OMP_NUM_THREADS says otherwise. program: what is started with the overrides. lost: how many starts in a
    row have ended without saving.
    """

    overrides: tuple[str, ...]
    log: Path
    threads: int = 1
    program: Sequence[str] = PROGRAM
    lost: int = 0

    def __call__(self) -> None:
        """Runs the rank to its end. Leaves with its exit code, on rank 0, where it did not end with 0."""
        job = submitit.JobEnvironment()
        number = signal.Signals[f"SIG{job.USR_SIG}"]
        requeue = signal.getsignal(number)  # submitit's: calls `checkpoint`, keeps what it gives, requeues, exits
        code = self._run(job.global_rank)
        if job.global_rank > 0 or code == Exit.DONE:
            return
        lost = code < 0 or code in (Exit.RANK_LOST, Exit.FORCED_OUT)
        self.lost = self.lost + 1 if lost else 0
        if (lost or code == Exit.PREEMPTED) and self.lost <= LOST and running(job.job_id):
            requeue(number, None)
        sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What a requeued job runs: the same command, which goes on from the run's last checkpoint."""
        return submitit.helpers.DelayedSubmission(self)

    def _run(self, rank: int) -> int:
        """The exit code of the child; minus the number of the signal that killed it."""
        environment = os.environ | _rendezvous() | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        path = self.log if rank == 0 else self.log.with_name(f"{self.log.name}.{rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            child = subprocess.Popen([*self.program, *self.overrides], env=environment, stdin=subprocess.DEVNULL,
                                     stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, lambda received, _: child.send_signal(received))
            return child.wait()


def running(job: str) -> bool:
    """Whether it is for the ranks to say what becomes of a job: not after scancel, nor at its time limit.

    Ranks see the same SIGTERM then as in the time of grace before a pre-emption, in which the job still runs.
    """
    told = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True)
    return "JobState=RUNNING" in told.stdout


def _rendezvous() -> dict[str, str]:
    """torch's names for who this rank is and where rank 0 waits.

    As in slurm/job.sh, at another port after each requeue: what is left of the last start may still hold its port.
    """
    torch = TorchDistributedEnvironment()
    job, start = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return {
        "MASTER_ADDR": _address(torch.master_addr),
        "MASTER_PORT": str(10000 + (job + 7919 * start) % 20000),
        "RANK": str(torch.rank),
        "WORLD_SIZE": str(torch.world_size),
        "LOCAL_RANK": str(torch.local_rank),
        "LOCAL_WORLD_SIZE": str(torch.local_world_size),
    }


def _address(node: str) -> str:
    """Slurm's own address of a node: resolves wherever Slurm works."""
    told = subprocess.run(["scontrol", "-o", "show", "node", node], capture_output=True, text=True, check=True)
    return told.stdout.partition("NodeAddr=")[2].split()[0]
