"""Sweeps: a command line or a file becomes settings, settings and seeds become runs, runs become a leaderboard.

    overrides: [recipe=daid, "seed=0,1,2"]            # of all runs; values by Hydra's grammar
    settings:                                         # if there are any: points with names, each on top of that
      published: []
      lambda_attr: ["interventions.pair_alignment.weight=0.1,0.3"]
    ablation: daid                                    # or: the rows of an ablation table as settings

Such files lie in recipes/sweep/. Keys of the sweep itself (`KEYS`) say where its runs are trained.
"""

import fcntl
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override

from dist_fair.errors import DistFairError, nearest
from dist_fair.recipe import cards
from dist_fair.recipe.composition import load
from dist_fair.recipe.resolved import inline
from dist_fair.recipes import interventions
from dist_fair.reporting.leaderboard import Entry
from dist_fair.reporting.progress import say
from dist_fair.studies import runs as training
from dist_fair.studies.ablation import rows_of
from dist_fair.studies.expansion import ROWS, Setting, expand, one_value, parse
from dist_fair.studies.runs import Failure, Run
from dist_fair.studies.slurm import Jobs, Resources, train_on_slurm

FOLDER = "recipes/sweep"
CLUSTERS = ("local", "slurm")
KEYS = {
    "sweep": "a sweep file: its name in recipes/sweep, or path/to/file.yaml",
    "out": "folder of runs and leaderboard; default runs/sweep/NAME, by sweep= or recipe=",
    "cluster": "local, the default: on this machine; slurm: as jobs",
    "parallel": "runs at a time; default 2, on slurm 16",
    "ranks": "ranks of each run, on each of its nodes; default 1, or one a GPU",
    "nodes": "slurm: nodes of each run; default 1",
    "gpus": "slurm: GPUs on each node; default 0, the CPU",
    "cpus": "slurm: CPUs of each rank",
    "partition": "slurm: where jobs go",
    "time": "slurm: minutes or H:MM:SS until a job is requeued and goes on; default 240",
    "sbatch.FLAG": "slurm: any other flag of sbatch, such as sbatch.account=NAME",
}
ON_SLURM = ("nodes", "gpus", "cpus", "partition", "time")
# Means over seeds have no use for intervals and pictures of each run; whatever else is given comes later and wins.
PLAIN = ("evaluation.bootstrap=0", "evaluation.figures=false")


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for. runs: by setting, one a seed. resources: of each job; None on this machine.

    parallel, ranks: as in KEYS.
    """

    name: str
    out: Path
    runs: Mapping[Setting, Sequence[Run]]
    parallel: int
    ranks: int
    resources: Resources | None

    @property
    def all(self) -> list[Run]:
        """All runs, those of the first seed first, so that early results can be compared."""
        return [run for same_seed in zip(*self.runs.values(), strict=True) for run in same_seed]

    def check(self) -> None:
        """Raises DistFairError for all that can be refused before anything starts."""
        training.refuse_rank()
        training.check_all(self.all)
        first: dict[str, Run] = {}
        twice = [(run, same) for run in self.all if (same := first.setdefault(run.resolved.fingerprint(), run)) != run]
        if twice:
            told = "".join(f"\n{run.folder.name} is {same.folder.name}" for run, same in twice)
            raise DistFairError(f"{len(twice)} of {len(self.all)} runs would train what another one trains: leave out "
                                f"values that change nothing{told}")  # fmt: skip

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The sweep's folder is this process's as long as it lasts. Raises DistFairError where it is another one's."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = (self.out / ".lock").open("w")
        except OSError as error:
            raise DistFairError(f"{self.out} cannot be written ({error.strerror}): choose another out=") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DistFairError(f"{self.out}: another `dist-fair sweep` is at work there: wait for it") from None
            except OSError as error:
                say(f"{self.out}: no locks on this file system ({error.strerror}): start no second sweep there")
            yield

    def states(self) -> dict[Run, str]:
        """What would happen to each run: `runs.state`, or its job where one waits or runs."""
        waiting = Jobs(self.out).waiting() if self.resources else {}
        found = {}
        for run in self.all:
            job, state = waiting.get(run.folder.name, ("", ""))
            found[run] = f"{state.lower()} as job {job}" if job else training.state(run)
        return found

    def train(self) -> list[Failure]:
        """Trains what is not finished; what failed of it."""
        if self.resources is None:
            return training.train_missing(self.all, self.parallel, self.ranks)
        waiting = training.missing(self.all)
        return train_on_slurm(self.all, waiting, Jobs(self.out), self.resources) if waiting else []

    def entries(self) -> list[Entry]:
        """The settings with what their finished runs came to."""
        return [
            Entry(setting.name, {ROWS: setting.row, **setting.varied} if setting.row else setting.varied,
                  [training.results(run) for run in same if training.finished(run)], len(same))
            for setting, same in self.runs.items()
        ]  # fmt: skip

    def attributes(self, wanted: Sequence[str] | None) -> str:
        """The name of the attribute set that runs are judged by: all attributes if not given, or one of them."""
        known = [*next(iter(self.all)).resolved.recipe.data.attributes]
        for name in wanted or []:
            if name not in known:
                raise DistFairError(f"--attributes {name}: {nearest(name, known)}")
        if wanted and len(wanted) not in (1, len(known)):
            raise DistFairError(f"--attributes {' '.join(wanted)}: runs are judged by one attribute or by all of them, "
                                f"{', '.join(known)}")  # fmt: skip
        return wanted[0] if wanted and len(wanted) == 1 else " x ".join(known)


def planned(arguments: Sequence[str]) -> Sweep:
    """The sweep of a command line. Raises DistFairError for what is no sweep; recipes are looked at by `check`."""
    own, rest = _own([parse(text) for text in arguments])
    overrides, rows = read(own["sweep"], rest) if "sweep" in own else ([], {"": []})
    settings, seeds = expand([*PLAIN, *overrides], rows, rest)
    name = own.get("sweep") or next((text for text in settings[0].arguments if text.startswith("recipe=")), "recipe=")
    name = Path(name.removeprefix("recipe=")).stem
    out = Path(own.get("out") or f"runs/sweep/{name}")
    cluster = own.get("cluster", "local")
    if cluster not in CLUSTERS:
        raise DistFairError(f"cluster={cluster}: {nearest(cluster, [*CLUSTERS])}")
    if cluster == "local" and (idle := [key for key in own if key in ON_SLURM or key.startswith("sbatch.")]):
        raise DistFairError(f"{idle[0]}={own[idle[0]]} has no effect without cluster=slurm: leave it out")
    gpus = _count(own, "gpus", 0, least=0)
    ranks = _count(own, "ranks", gpus or 1)
    if gpus and ranks != gpus:
        raise DistFairError(f"ranks={ranks} gpus={gpus}: one rank a GPU: leave out ranks")
    runs = {setting: [setting.run(out, seed) for seed in seeds] for setting in settings}
    resources = None if cluster == "local" else _resources(own, ranks, gpus)
    return Sweep(name, out, runs, resources.parallel if resources else _count(own, "parallel", 2), ranks, resources)


def read(choice: str, further: Sequence[str] = ()) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides and settings of a sweep file: a shipped one's name, or a path. further: of the command line."""
    path, source = cards.shipped(FOLDER) / f"{choice}.yaml", f"{FOLDER}/{choice}.yaml"
    if "/" in choice or choice.endswith((".yaml", ".yml")):
        path, source = Path(choice), choice
    elif choice not in names():
        raise DistFairError(f"sweep={choice}: no such sweep: {nearest(choice, names())} (your own: "
                            "sweep=path/to/file.yaml)")  # fmt: skip
    content = cards.read_yaml(path, source)
    for key in content:
        if key not in ("overrides", "settings", "ablation"):
            raise DistFairError(f"{source}: unknown key {key}: {nearest(key, ['overrides', 'settings', 'ablation'])}")
    overrides = _texts(content.get("overrides"), f"{source}: overrides")
    if "ablation" not in content:
        settings = content.get("settings", {"": []})
        if not isinstance(settings, dict) or not settings:
            raise DistFairError(f"{source}: settings={inline(settings)}: expected NAME: [key=value, ...] for each")
        return overrides, {str(name): _texts(one, f"{source}: settings.{name}") for name, one in settings.items()}
    if "settings" in content:
        raise DistFairError(f"{source}: settings beside ablation: one of them")
    single = [text for text in (*overrides, *further) if not parse(text).is_sweep_override()]
    recipe = load(_last_choices(single), interventions()).recipe
    table = rows_of(str(content["ablation"]), recipe.recipe, [*recipe.interventions])
    return overrides, {row.name: row.arguments for row in table}


def names() -> list[str]:
    """Names of the shipped sweep files."""
    return sorted(path.stem for path in cards.shipped(FOLDER).glob("*.yaml"))


def minutes(text: str) -> int:
    """Minutes of "90", "1:30:00" or "1-12:00:00", rounded up; raises DistFairError for other forms."""
    found = re.fullmatch(r"(\d+)|(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not found:
        raise DistFairError(f"time={text}: minutes, H:MM:SS or D-HH:MM:SS")
    whole, days, hours, minute, second = (int(part or 0) for part in found.groups())
    total = whole + 60 * (24 * days + hours) + minute + bool(second)
    if not total:
        raise DistFairError(f"time={text}: at least a minute")
    return total


def _own(overrides: Sequence[Override]) -> tuple[dict[str, str], list[str]]:
    """The sweep's own keys, and the overrides of its runs as they were given."""
    own: dict[str, str] = {}
    rest = []
    for one in overrides:
        key = one.key_or_group
        if key not in KEYS and not key.startswith("sbatch."):
            rest.append(str(one.input_line))
            continue
        if key in own:
            raise DistFairError(f"{one.input_line}: {key} is given twice")
        own[key] = one_value(one)
    return own, rest


def _resources(own: Mapping[str, str], ranks: int, gpus: int) -> Resources:
    return Resources(
        nodes=_count(own, "nodes", 1),
        ranks=ranks,
        gpus=gpus,
        cpus=_count(own, "cpus", 1) if "cpus" in own else None,
        minutes=minutes(own.get("time", str(Resources.minutes))),
        parallel=_count(own, "parallel", Resources.parallel),
        partition=own.get("partition"),
        sbatch={key.removeprefix("sbatch."): value for key, value in own.items() if key.startswith("sbatch.")},
    )


def _count(own: Mapping[str, str], key: str, default: int, least: int = 1) -> int:
    text = own.get(key, str(default))
    if not text.isdecimal() or int(text) < least:
        raise DistFairError(f"{key}={text}: a whole number, at least {least}")
    return int(text)


def _texts(value, place: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DistFairError(f"{place}={inline(value)}: expected [key=value, ...], in quotes where there is a comma")
    for text in value:
        if (key := parse(text).key_or_group) in KEYS or key.startswith("sbatch."):
            raise DistFairError(f"{place}: {text}: {key} says where runs are trained: leave it to the command line")
    return value


def _last_choices(texts: Sequence[str]) -> list[str]:
    """Of several choices of a file (recipe=, data=, detector=) the last; overrides as they are."""
    keys = [parse(text).key_or_group for text in texts]
    return [text for place, text in enumerate(texts)
            if keys[place] not in cards.GROUPS or keys[place] not in keys[place + 1 :]]  # fmt: skip
