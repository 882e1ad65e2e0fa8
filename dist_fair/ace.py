"""`dist-fair ace --out DIR [--runs low/0=RUN low/1=RUN high/0=RUN high/1=RUN]`: does fairness cause generalisation?

Compares plain (F=0) with fair (F=1) training, group by group and at every capacity of the detector. With --runs, of
trained runs, also under torchrun, where ranks share the bootstrap; without, of OUT/runs/CAPACITY-F, trained first.
"""

import argparse
import sys
from pathlib import Path

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError, on_all_ranks

TRAINING = {"plain": "erm", "fair": "ipw", "capacities": ["low=small", "high=small_deep"], "jobs": 2, "ranks": 1}


def main(arguments: list[str]) -> int:
    """Writes ace.json, ace.md, ace.csv, ace-DATASET.png and .svg into --out, prints the table. Exit code 0."""
    options = _parser().parse_intermixed_args(arguments)
    from dist_fair.engine.launch import check_world
    from dist_fair.engine.run_folder import RunFolder
    from dist_fair.studies.ace_runs import named_runs, shared_datasets

    check_world("ace", None)
    with on_all_ranks():
        RunFolder(options.out).refuse_file()
        runs = named_runs(_taken(options)) if options.runs else _trained(options)
        datasets = shared_datasets(runs, options.datasets)
    _judge(options, runs, *datasets)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-fair ace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables and figures go")
    parser.add_argument("--runs", nargs="+", metavar="CAPACITY/F=RUN", help="trained runs: low/0=runs/a ...")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="default: all that every run has predicted")
    parser.add_argument("--attributes", nargs="+", metavar="NAME", help="whose intersections are strata; default: all")
    parser.add_argument("--replicates", type=int, default=1000, metavar="B", help="bootstrap draws; default 1000")
    parser.add_argument("--unit", choices=("video", "frame"), default="video", help="what is drawn; default video")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the runs' is the key seed=")
    training = parser.add_argument_group("training, without --runs")
    training.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, before the options")
    training.add_argument("--plain", metavar="RECIPE", help="of F=0; default erm")
    training.add_argument("--fair", metavar="RECIPE", help="of F=1; default ipw")
    training.add_argument("--capacities", nargs="+", metavar="NAME=DETECTOR", help="default low=small high=small_deep")
    training.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default 2")
    training.add_argument("--ranks", type=int, metavar="N", help="ranks of each run; default 1")
    return parser


def _taken(options: argparse.Namespace) -> list[str]:
    """The runs named; raises DistFairError for a setting that only matters in training."""
    idle = [f"--{name}" for name in TRAINING if getattr(options, name) is not None] + options.overrides
    if idle:
        raise DistFairError(f"{idle[0]} has no effect beside --runs, which takes trained runs: leave one of them out")
    return options.runs


def _trained(options: argparse.Namespace) -> dict:
    """The runs of the study, trained where they are not finished."""
    from dist_fair.studies.ace_runs import check_planned, named_capacities, planned_runs
    from dist_fair.studies.runs import train_all

    given = {name: getattr(options, name) for name in TRAINING}
    use = TRAINING | {name: value for name, value in given.items() if value is not None}
    cards = named_capacities(use["capacities"])
    runs = planned_runs(options.out, (use["plain"], use["fair"]), cards, options.overrides)
    check_planned([*runs.values()], options.datasets, options.attributes, options.replicates)
    train_all([*runs.values()], use["jobs"], use["ranks"])
    return {model: run.folder for model, run in runs.items()}


def _judge(options: argparse.Namespace, runs: dict, datasets: list[str], unshared: list[str]) -> None:
    """Estimates on every dataset, on all ranks; rank 0 writes and speaks."""
    from dist_fair.collectives import Communicator
    from dist_fair.engine.launch import accelerator
    from dist_fair.reporting import ace_report
    from dist_fair.reporting.progress import Progress, say
    from dist_fair.studies.ace_runs import judge

    with on_all_ranks():
        accelerator()
    comm = Communicator()
    say(f"left out, for not every run has predicted them: {', '.join(unshared)}", comm.rank == 0 and bool(unshared))
    share = len(range(0, options.replicates, comm.world))
    with Progress(len(datasets) * share, "bootstrap", comm.rank == 0, every=500) as progress, on_all_ranks():
        results = {name: judge(runs, name, options.attributes, options.replicates, options.unit, options.seed, comm,
                               progress.step) for name in datasets}  # fmt: skip
    if comm.rank == 0:
        ace_report.write(options.out, runs, results)
        say(ace_report.AceTable(results))
        say(f"ace.md, ace.json, ace.csv and figures lie in {options.out.resolve()}")


if __name__ == "__main__":
    sys.exit(guarded(main))
