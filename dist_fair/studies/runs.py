"""The training runs that a study is made of: what is not finished is trained, each run in processes of its own.

A study lists its runs, `train_all` sees to it that they are there, `results` reads what they found. Started again, a
study trains only what is missing: finished runs are kept, half-done ones resume.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dist_fair.engine import checkpoint
from dist_fair.engine.assembly import dataset_names, total_steps, training_index, training_plan
from dist_fair.engine.run_folder import RunFolder
from dist_fair.errors import DistFairError, Preempted
from dist_fair.recipe.composition import load
from dist_fair.recipe.resolved import Resolved
from dist_fair.recipes import interventions
from dist_fair.reporting.progress import Progress, say

POLL = 0.1  # seconds between looks at the running processes
GRACE = 60  # seconds that stopped runs have to end; torchrun gives its ranks 30
SHOWN = 5  # last lines of the log of a failed run
MANY = 20  # runs, from which on their check shows how far it is: a fifth of a second each


@dataclass(frozen=True)
class Run:
    """One run of a study.

    folder: its run folder; what it prints is appended to FOLDER.log. arguments: of `dist_fair.train`, without out=.
    """

    folder: Path
    arguments: tuple[str, ...]

    @property
    def overrides(self) -> list[str]:
        """The arguments with out=, quoted as Hydra's grammar wants it."""
        folder = str(self.folder).replace("'", r"\'")
        return [*self.arguments, f"out='{folder}'"]

    @property
    def log(self) -> Path:
        """What the run has printed, over all its starts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @cached_property
    def resolved(self) -> Resolved:
        """The recipe asked for. Raises DistFairError where there is none, or none that ends in an evaluation."""
        try:
            resolved = load(self.overrides, interventions())
        except DistFairError as error:
            raise DistFairError(f"{self.folder}: {error}") from None
        recipe = resolved.recipe
        for key, fits, reason in (
            ("evaluation.at_end", recipe.evaluation.at_end, "a study reads what its runs find: leave it true"),
            ("data.eval", bool(recipe.data.eval), "a study reads what its runs find: name evaluation sets"),
            ("train.stop_after", recipe.train.stop_after is None, "a run of a study trains to its end: leave it null"),
        ):
            if not fits:
                raise DistFairError(f"{self.folder}: {key} ({resolved.provenance[key]}): {reason}")
        return resolved

    @cached_property
    def steps(self) -> int:
        """How many it trains for; epochs are steps only beside the data."""
        recipe = self.resolved.recipe
        return recipe.train.steps or total_steps(recipe, training_plan(recipe, training_index(recipe)))


@dataclass(frozen=True)
class Failure:
    """A run that ended without being finished. ending: how, such as "exit code 2"; logs: what is quoted of it."""

    run: Run
    ending: str
    logs: tuple[Path, ...]

    def __str__(self) -> str:
        """The run, how it ended, and the last lines of each log that has any."""
        lines = []
        for log in self.logs:
            with suppress(OSError):
                if last := log.read_text(errors="replace").splitlines()[-SHOWN:]:
                    lines += [f"; {log} ends:", *(f"\n    {line}" for line in last)]
        return f"{self.run.folder}: {self.ending}{''.join(lines) or '; it has left no log'}"


def over_seeds(root: Path, name: str, arguments: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The same arguments with each seed, in ROOT/NAME-SEED."""
    return [Run(root / f"{name}-{seed}", (*arguments, f"seed={seed}")) for seed in seeds]


def train_all(runs: Sequence[Run], jobs: int = 1, ranks: int = 1) -> None:
    """Trains and evaluates the runs that are not finished, `jobs` at a time, `ranks` local ranks each.

    Raises DistFairError as `train_missing` does, and at the end with every failed run.
    """
    if failures := train_missing(runs, jobs, ranks):
        raise failed(failures, len(runs))


def train_missing(runs: Sequence[Run], jobs: int = 1, ranks: int = 1) -> list[Failure]:
    """`train_all`, but runs that fail are returned.

    Each rank has one thread, unless OMP_NUM_THREADS says otherwise. Before the first starts, every recipe is resolved
    and every folder looked at. A run that fails does not stop the others.
    Raises DistFairError if something is wrong before the start; `stopped` on signals, when the runs started here are
    stopped too.
    """
    for key, value in (("jobs", jobs), ("ranks", ranks)):
        if value < 1:
            raise DistFairError(f"{key}={value}: at least 1")
    refuse_rank()
    check_all(runs)
    waiting = missing(runs)
    return _train(deque(waiting), len(runs), jobs, ranks) if waiting else []


def missing(runs: Sequence[Run]) -> list[Run]:
    """The runs that are not finished, in order; says how many are."""
    unfinished = [run for run in runs if not finished(run)]
    if len(unfinished) < len(runs):
        say(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished")
    return unfinished


def failed(failures: Sequence[Failure], total: int) -> DistFairError:
    """The error that tells of failed runs, with the last lines of their logs."""
    told = "\n".join(map(str, failures))
    return DistFairError(f"{len(failures)} of {total} runs failed; the same command again trains only what is missing\n"
                         f"{told}")  # fmt: skip


def refuse_rank() -> None:
    """Raises DistFairError in a process that torchrun or accelerate has started."""
    if "RANK" in os.environ:
        raise DistFairError("a study starts its runs itself: start it once, without torchrun or accelerate; --ranks N "
                            "gives each run N ranks")  # fmt: skip


def check_all(runs: Sequence[Run]) -> None:
    """Raises DistFairError with everything that can be refused before anything starts, and in which runs it is.

    Recipes that do not resolve, two runs in one folder, and folders that hold another run than the one asked for.
    """
    seen: set[Path] = set()
    problems: dict[str, list[Run]] = {}
    with Progress(len(runs), "check", enabled=len(runs) > MANY, every=MANY) as progress:
        for run in runs:
            try:
                if (place := run.folder.resolve()) in seen:
                    raise DistFairError(f"{run.folder}: two runs in one folder: each needs a name and a seed "
                                        "of its own")  # fmt: skip
                seen.add(place)
                RunFolder(run.folder).refuse_other_recipe(run.resolved, interventions(), str(run.folder),
                                                          "remove it or choose another folder")  # fmt: skip
            except DistFairError as error:
                problems.setdefault(str(error).removeprefix(str(run.folder)), []).append(run)
            progress.step()
    if problems:
        raise _refused(problems, len(runs))


def finished(run: Run) -> bool:
    """True if each evaluation set was scored by the run's last step, with as many bootstrap draws as asked for.

    `dist-fair evaluate` may have scored some of them, or all by an earlier checkpoint: such a run is not finished.
    """
    found, recipe = RunFolder(run.folder).reports(), run.resolved.recipe
    if not found:
        return False
    reports = [found.get(name) for name in dataset_names(recipe.data.eval).values()]
    return all(
        report is not None
        and report["checkpoint"] == checkpoint.name_of(run.steps)
        and (report["intervals"] or {"replicates": 0})["replicates"] == recipe.evaluation.bootstrap
        for report in reports
    )


def state(run: Run) -> str:
    """What `train_all` does with a run: "finished", "starts" or "goes on from step-N"."""
    if finished(run):
        return "finished"
    newest = checkpoint.newest(RunFolder(run.folder).checkpoints)
    return f"goes on from {newest.name}" if newest else "starts"


def results(run: Run) -> dict[str, dict]:
    """What `metrics.evaluate` found for each evaluation set of a finished run, by name."""
    found = RunFolder(run.folder).reports()
    return {name: found[name] for name in dataset_names(run.resolved.recipe.data.eval).values()}


def _refused(problems: dict[str, list[Run]], total: int) -> DistFairError:
    """One error of all problems: a problem that many runs share is told once, by the first of them."""
    lines = []
    for problem, runs in problems.items():
        lines.append(f"{runs[0].folder}{problem}" + (f" ({len(runs) - 1} more say so)" if len(runs) > 1 else ""))
    count = sum(map(len, problems.values()))
    head = [f"{count} of {total} runs cannot be started:"] if count > 1 else []
    return DistFairError("\n".join([*head, *lines]))


def _train(waiting: deque[Run], total: int, jobs: int, ranks: int) -> list[Failure]:
    """Runs all that wait; what failed of them."""
    running: dict[Run, tuple[subprocess.Popen, float]] = {}
    failures: list[Failure] = []
    with stop_signals() as received, Progress(total, "runs", every=1, start=total - len(waiting)) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not received:
                    run = waiting.popleft()
                    say(f"{run.folder}: {state(run)}")
                    running[run] = _start(run, ranks), time.monotonic()
                for run, (process, began) in [*running.items()]:
                    if (code := process.poll()) is None:
                        continue
                    del running[run]
                    say(f"{run.folder}: {_ending(code)} after {time.monotonic() - began:.0f} s")
                    if code != 0:
                        failures.append(Failure(run, _ending(code), (run.log,)))
                    progress.step(running=len(running), failed=len(failures))
                time.sleep(POLL)
                if received:
                    raise stopped(received[0])
        finally:
            _stop([process for process, _ in running.values()])
    return failures


def _start(run: Run, ranks: int) -> subprocess.Popen:
    """The run in a session of its own: a Ctrl-C reaches it once, through `_stop`, and not from the terminal too."""
    command = [sys.executable, "-m", "dist_fair.train", *run.overrides, *(["--ranks", str(ranks)] if ranks > 1 else [])]
    try:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("a") as log:
            print("$ dist-fair train", *command[3:], file=log, flush=True)
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                    env={"OMP_NUM_THREADS": "1"} | os.environ, start_new_session=True)  # fmt: skip
    except OSError as error:
        raise DistFairError(f"{run.log} cannot be written ({error.strerror}): choose another folder") from None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 are kept in a list, to be seen between two starts, not in the middle of one.

    What was ignored before (nohup) stays ignored.
    """
    received, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, lambda signum, _: received.append(signum))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(number: int) -> BaseException:
    """What a study raises that was told to stop: SIGUSR1 comes from slurm/sweep.sh, whose job then goes on later."""
    if number == signal.SIGUSR1:
        return Preempted("the study was stopped by SIGUSR1")
    return KeyboardInterrupt()


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ends processes: asked first, killed after GRACE seconds. They resume from their last checkpoints."""
    if not processes:
        return
    say(f"stopping what runs ({len(processes)}); it goes on from its last checkpoints when started again")
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ending(code: int) -> str:
    if code == 0:
        return "finished"
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
