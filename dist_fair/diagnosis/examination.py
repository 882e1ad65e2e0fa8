"""All checks, and running them: each within its time, none ending the diagnosis, the words of all ranks in one list."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from dist_fair.diagnosis import experiment, files, machine, network, services, software, trial
from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, few, merged, names, ok, problem
from dist_fair.errors import DistFairError

Answer = Verdict | Sequence[Verdict] | None
MARGIN = 10.0  # seconds beyond what a check waits for other ranks


@dataclass(frozen=True)
class Check:
    """A check: its name in case it gives no verdict, what it does, its time, and what to look at if that is over.

    together: ranks wait for one another in it. `look` returns one verdict, several, or None where it has no meaning.
    """

    name: str
    look: Callable[[Site], Answer]
    seconds: float = 20.0
    hint: str = "is a file system or driver of this node hanging? see `dmesg` and `ps -o pid,stat,wchan,cmd`"
    together: bool = False


CHECKS = (
    Check("python and torch", software.versions, 60.0),
    Check("torch and torchvision", software.torchvision_fits, 60.0),
    Check("requirements", software.requirements),
    Check("GPUs", machine.gpus, 60.0, "a GPU or its driver hangs: does nvidia-smi answer on this node?"),
    Check("threads", machine.threads),
    Check("open files", machine.open_files),
    Check("/dev/shm", machine.shared_memory),
    Check("temporary files", machine.temporary_files),
    Check("launch", services.launch),
    Check("Slurm job", services.slurm_job, 30.0, "scontrol does not answer: is the Slurm controller up?"),
    Check("network interface", network.interface),
    Check("clocks", network.clocks, together=True),
    Check("all-reduce", network.all_reduce, 120.0, network.HUNG, together=True),
    Check("run folder", files.visible, 60.0, files.HUNG, together=True),
    Check("flock", files.locks, hint=files.HUNG, together=True),
    Check("rename", files.renames, hint=files.HUNG, together=True),
    Check("free space", files.free_space, hint=files.HUNG),
    Check("recipe", experiment.recipe),
    Check("data sets", experiment.data_sets, 90.0, "does data.root answer on this node?"),
    Check("lanes", experiment.lanes, 90.0, "does data.root answer on this node?"),
    Check("data.stage_to", experiment.stage_to),
    Check("one step", trial.one_step, 300.0, trial.SLOW, together=True),
    Check("W&B", services.wandb),
)


def examine(
    site: Site, checks: Sequence[Check] = CHECKS, progress: Callable[[str], None] = lambda name: None
) -> list[Verdict]:
    """The verdicts on all ranks, on rank 0; [] on the others. progress is told each check as it begins."""
    verdicts = []
    for check in checks:
        progress(check.name)
        verdicts += examined(check, site)
    said = site.ranks.collect("verdicts", [asdict(verdict) for verdict in verdicts])
    reports = {rank: [Verdict(**one) for one in report] for rank, report in said.items()}
    return [_presence(site), *merged(reports, site.hosts)] if site.ranks.rank == 0 else []


def examined(check: Check, site: Site) -> list[Verdict]:
    """What a check says of this rank, or that it failed or hung: it is left behind in its thread then."""
    answers: list[Answer] = []

    def look() -> None:
        try:
            answers.append(check.look(site))
        except DistFairError as error:
            answers.append(problem(check.name, str(error)))
        except TimeoutError as error:
            answers.append(problem(check.name, str(error), "see `ranks` and what that rank says of itself"))
        except Exception as error:
            answers.append(problem(check.name, f"the check failed: {type(error).__name__}: {error}", check.hint))

    thread = threading.Thread(target=look, name=f"check {check.name}", daemon=True)
    thread.start()
    seconds = check.seconds + (site.ranks.patience + MARGIN if check.together else 0)
    thread.join(seconds)
    if not answers:
        return [problem(check.name, f"no answer within {seconds:.0f} s", check.hint)]
    answer = answers[0]
    return [] if answer is None else [answer] if isinstance(answer, Verdict) else [*answer]


def _presence(site: Site) -> Verdict:
    ranks, hosts = site.ranks, site.hosts
    if site.apart is not None:
        return problem("ranks", f"{site.apart} (what follows is of rank 0 alone)")
    if ranks.lost:
        silent = ", ".join(names([rank], hosts) for rank in sorted(ranks.lost))
        return problem("ranks", f"{len(ranks.lost)} of {ranks.world} do not answer: {silent}",
                       "see their output; are their nodes up, and do they reach MASTER_ADDR:MASTER_PORT?")  # fmt: skip
    return ok("ranks", f"{ranks.world} on {few([*hosts.values()])}")
