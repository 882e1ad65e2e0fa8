"""Recipes against each other on the demo faces, over several seeds: `python benchmarks/demo_results.py`.

Runs what is not yet there into OUT/RECIPE-SEED (a finished run is kept), then prints the table and writes it to
benchmarks/results/NAME.md. Numbers do not depend on --ranks, only time does. A recipe may have overrides and a name of
its own in the table: --recipes erm "PG-FDD without SAM: pg_fdd optimizer.sam.rho=null".
"""

import argparse
import re
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
    parser.add_argument("--recipes", nargs="+", default=["erm", "gda", "sfd_gda"], metavar="RECIPE|NAME: RECIPE ...")
    parser.add_argument("--name", default="demo", help="of the file in benchmarks/results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_results"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of each run, one thread each")
    parser.add_argument("--attributes", nargs="+", default=["gender", "race", "gender x race"])
    parser.add_argument("overrides", nargs="*", default=[], help="further key=value for every run")
    options = parser.parse_intermixed_args(arguments)
    quiet = ["evaluation.bootstrap=0", "wandb.mode=disabled", *options.overrides]
    runs = {}
    for entry in options.recipes:
        name, _, words = entry.rpartition(": ")
        recipe, *own = words.split()
        slug = re.sub(r"\W+", "_", (name or recipe).lower())
        runs[name or recipe] = over_seeds(options.out, slug, [f"recipe={recipe}", *quiet, *own], options.seeds)
    train_all([run for same_seed in zip(*runs.values(), strict=True) for run in same_seed], options.jobs, options.ranks)
    found = {name: [results(run) for run in same] for name, same in runs.items()}
    command = shlex.join(["python", "benchmarks/demo_results.py", *arguments])
    text = report(found, command, options.seeds, options.attributes)
    write_text(HERE / "results" / f"{options.name}.md", text)
    print(text)
    return 0


def report(found: Mapping[str, Sequence[Results]], command: str, seeds: list[int], attributes: list[str]) -> str:
    """The tables of all attribute sets, with what was run."""
    parts = [f"# Demo faces, seeds {', '.join(map(str, seeds))}\n\n`{command}` (torch {torch.__version__}, CPU)\n"]
    parts += [f"## Fairness over {name}\n\n{comparison_table(found, name)}" for name in attributes]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(guarded(main))
