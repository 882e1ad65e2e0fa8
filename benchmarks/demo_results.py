"""Recipes against each other on the demo faces, over several seeds: `python benchmarks/demo_results.py`.

Runs what is not yet there into OUT/RECIPE-SEED (a finished run is kept), then prints the table and writes it to
benchmarks/results/demo.md. Numbers do not depend on --ranks, only time does.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dist_fair.cli import guarded
from dist_fair.engine.run_folder import write_text
from dist_fair.reporting.comparison import comparison_table
from dist_fair.reporting.tables import Results
from dist_fair.studies.runs import over_seeds, results, train_all

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """Exit code 0; a DistFairError, also of runs that failed, is left to the caller."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["erm", "gda", "sfd_gda"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_results"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of each run, one thread each")
    parser.add_argument("--attributes", nargs="+", default=["gender", "race", "gender x race"])
    parser.add_argument("overrides", nargs="*", default=[], help="further key=value for every run")
    options = parser.parse_intermixed_args(arguments)
    quiet = ["evaluation.bootstrap=0", "wandb.mode=disabled", *options.overrides]
    runs = {recipe: over_seeds(options.out, recipe, [f"recipe={recipe}", *quiet], options.seeds)
            for recipe in options.recipes}  # fmt: skip
    train_all([run for same_seed in zip(*runs.values(), strict=True) for run in same_seed], options.jobs, options.ranks)
    found = {recipe: [results(run) for run in same] for recipe, same in runs.items()}
    text = report(found, options.seeds, options.attributes, options.overrides)
    write_text(HERE / "results" / "demo.md", text)
    print(text)
    return 0


def report(
    found: Mapping[str, Sequence[Results]], seeds: list[int], attributes: list[str], overrides: list[str]
) -> str:
    """The tables of all attribute sets, with what was run."""
    command = shlex.join(["python", "benchmarks/demo_results.py", *overrides, "--recipes", *found,
                          "--seeds", *map(str, seeds)])  # fmt: skip
    parts = [f"# Demo faces, seeds {', '.join(map(str, seeds))}\n\n`{command}` (torch {torch.__version__}, CPU)\n"]
    parts += [f"## Fairness over {name}\n\n{comparison_table(found, name)}" for name in attributes]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(guarded(main))
