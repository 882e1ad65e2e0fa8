"""Runs of a study as jobs of Slurm: submitted through submitit as one array, watched through squeue.

submitit starts one task a rank and requeues what is pre-empted or out of time (`studies.job`). Which jobs there are is
kept in OUT/jobs.json, whether they wait or run is asked of squeue, which knows without accounting, and whether a run is
finished is read in its folder: nothing that a job leaves is unpickled here.
"""

import getpass
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from dist_fair.engine.run_folder import write_text
from dist_fair.errors import DistFairError
from dist_fair.reporting.progress import Progress, say
from dist_fair.studies.runs import Failure, Run, finished, stop_signals, stopped

POLL = 10.0  # seconds between looks at the queue
GONE = 3  # looks in a row at which a job is not in the queue, until it is taken for ended
QUOTED = 3  # logs of a failed run, beside that of rank 0; other ranks say nothing that rank 0 says
TIMEOUTS = 1000  # of a job, each of which requeues it: a run ends by its steps, not by the time limit


@dataclass(frozen=True)
class Resources:
    """What each run's job asks for.

    nodes; ranks on each node; gpus on each node, 0 for the CPU; cpus of each rank; minutes until a job is requeued;
    parallel: jobs at a time; sbatch: further flags of sbatch by name, such as account.
    """

    nodes: int = 1
    ranks: int = 1
    gpus: int = 0
    cpus: int | None = None
    minutes: int = 240
    parallel: int = 16
    partition: str | None = None
    sbatch: Mapping[str, str] = field(default_factory=dict)

    def parameters(self, name: str) -> dict:
        """submitit's parameters."""
        wanted = {
            "job_name": name,
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks,
            "gpus_per_node": self.gpus or None,
            "cpus_per_task": self.cpus,
            "partition": self.partition,
            "time": self.minutes,
            "array_parallelism": self.parallel,
            "signal_delay_s": 120,
            "srun_args": [f"--cpus-per-task={self.cpus}"] if self.cpus else None,  # srun takes none from sbatch
            "additional_parameters": {"requeue": True, **self.sbatch},
        }
        return {key: value for key, value in wanted.items() if value is not None}


class Jobs:
    """The jobs of a sweep: run folder's name -> job, such as "1234_0"; kept in OUT/jobs.json."""

    def __init__(self, out: Path):
        self.out, self.file = out, out / "jobs.json"

    def read(self) -> dict[str, str]:
        """All that were submitted. Raises DistFairError for a damaged file."""
        if not self.file.is_file():
            return {}
        try:
            jobs = json.loads(self.file.read_text())
            if not all(re.fullmatch(r"\d+(_\d+)?", job) for job in jobs.values()):
                raise ValueError("not the jobs of a sweep")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DistFairError(f"{self.file} cannot be read ({error}): remove it if none of its jobs run") from None
        return jobs

    def waiting(self) -> dict[str, tuple[str, str]]:
        """Those that are in the queue: name -> (job, its state)."""
        jobs = self.read()
        there = in_queue() if jobs else {}
        if there is None:
            raise DistFairError(f"squeue does not answer, and jobs of {self.file} may run: try again later")
        return {name: (job, there[job]) for name, job in jobs.items() if job in there}

    def submit(self, runs: Sequence[Run], resources: Resources) -> None:
        """Submits the runs as one array. Raises DistFairError with what sbatch said where it refuses."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        from dist_fair.studies import job as rank

        refuse_absent()
        executor = SlurmExecutor(self.out / ".slurm", max_num_timeout=TIMEOUTS)
        executor.update_parameters(**resources.parameters(f"sweep-{self.out.resolve().name}"))
        tasks = [rank.RankTask(tuple(run.overrides), run.log.absolute(), resources.cpus or 1, rank.PROGRAM)
                 for run in runs]  # fmt: skip
        try:
            with _outside():
                jobs = executor.submit_array(tasks)
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            raise DistFairError(f"sbatch refused the jobs: {' '.join(str(error).split())}") from None
        named = {run.folder.name: job.job_id for run, job in zip(runs, jobs, strict=True)}
        write_text(self.file, json.dumps(self.read() | named, indent=1) + "\n")
        say(f"submitted {len(jobs)} runs as job {jobs[0].job_id.partition('_')[0]}, {resources.parallel} at a time")


def train_on_slurm(runs: Sequence[Run], waiting: Sequence[Run], jobs: Jobs, resources: Resources) -> list[Failure]:
    """Trains what waits of the runs, each as a job; the runs that failed.

    Jobs that are still in the queue are watched, for all others new ones are submitted. Raises `runs.stopped` on
    signals; the jobs go on without this process.
    """
    attached = jobs.waiting()
    if new := [run for run in waiting if run.folder.name not in attached]:
        jobs.submit(new, resources)
    if old := len(waiting) - len(new):
        say(f"{old} runs are in the queue already")
    known = jobs.read()
    return _watch({run: known[run.folder.name] for run in waiting}, len(runs))


def _watch(jobs: dict[Run, str], total: int) -> list[Failure]:
    """Waits until none of the jobs is in the queue."""
    failures: list[Failure] = []
    missed, before = dict.fromkeys(jobs, 0), None
    with stop_signals() as received, Progress(total, "runs", every=1, start=total - len(jobs)) as progress:
        while jobs:
            there = in_queue()
            for run, job in [*jobs.items()]:
                missed[run] = missed[run] + 1 if there is not None and job not in there else 0
                if not missed[run] or (missed[run] < GONE and not finished(run)):
                    continue
                del jobs[run]
                if not finished(run):
                    failures.append(failure(run, job))
                    say(f"{run.folder}: {failures[-1].ending}")
            states = [there.get(job, "") for job in jobs.values()] if there is not None else []
            running = sum(state in ("RUNNING", "COMPLETING") for state in states)
            now = {"running": running, "queued": len(jobs) - running, "failed": len(failures)}
            if there is not None and now != before:
                progress.step(total - len(jobs) - progress.done, **now)
                before = now
            if jobs:
                _sleep(received)
            if jobs and received:
                say(_left(jobs))
                raise stopped(received[0])
    return failures


def failure(run: Run, job: str) -> Failure:
    """How a job ended that left its run unfinished; quoted are the ranks' logs, else what submitit kept of the job."""
    told = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True).stdout
    state, code = (re.search(rf"{key}=(\S+)", told) for key in ("JobState", "ExitCode"))
    ending = f"{state[1]}, exit code {code[1].partition(':')[0]}" if state and code else "no longer in the queue"
    others = sorted(run.log.parent.glob(f"{run.log.name}.*"))[:QUOTED]
    logs = [run.log, *others] if run.log.is_file() else [*(run.folder.parent / ".slurm").glob(f"{job}_0_log.*")]
    return Failure(run, f"job {job}: {ending}", tuple(logs))


def in_queue() -> dict[str, str] | None:
    """Job -> state of all of this user's jobs that wait or run; None if squeue does not answer."""
    refuse_absent()
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i %T"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else dict(line.split() for line in done.stdout.splitlines())


def refuse_absent() -> None:
    """Raises DistFairError where Slurm's commands are not to be had."""
    for program in ("sbatch", "squeue", "scontrol"):
        if shutil.which(program) is None:
            raise DistFairError(f"cluster=slurm: no {program} on PATH: start this where jobs are submitted, or choose "
                                "cluster=local")  # fmt: skip


def _left(jobs: Mapping[Run, str]) -> str:
    arrays = sorted({job.partition("_")[0] for job in jobs.values()})
    return (f"{len(jobs)} runs stay in the queue: the same command watches them again, `scancel {' '.join(arrays)}` "
            "ends them")  # fmt: skip


def _sleep(received: list[int]) -> None:
    """POLL seconds, or until a signal comes."""
    end = time.monotonic() + POLL
    while time.monotonic() < end and not received:
        time.sleep(0.1)


@contextmanager
def _outside() -> Iterator[None]:
    """Submitted from inside a job, another one would inherit its shape; what finds the cluster stays."""
    from submitit.helpers import clean_env

    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
        os.environ.update(kept)
        yield
