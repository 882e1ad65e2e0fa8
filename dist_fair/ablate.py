"""`dist-fair ablate recipe=NAME [key=value ...]`: a recipe with and without its interventions, over several seeds.

Rows come from recipes/ablation/NAME.yaml or --table; without one, each row leaves out one intervention. Finished runs
are kept and half-done ones go on: the same command again trains only what is missing. Settings go before the options.
"""

import argparse
import shlex
import sys
from pathlib import Path

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError, nearest


def main(arguments: list[str]) -> int:
    """Trains the rows; writes ablation.md, ablation.csv and side_by_side/ into --out. Exit code 0."""
    options = parse(arguments)
    from dist_fair.recipe.composition import load
    from dist_fair.recipes import interventions
    from dist_fair.studies import ablation
    from dist_fair.studies.runs import check_all, over_seeds, state, train_all

    ablation.refuse_own(options.overrides)
    recipe = load(options.overrides, interventions()).recipe
    rows = chosen(ablation.rows_of(options.table, recipe.recipe, [*recipe.interventions]), options.rows)
    out = Path(options.out or f"runs/ablation/{recipe.recipe}")
    # Tables over seeds have no use for intervals and pictures of each run; the command line comes later and wins.
    plain = ["evaluation.bootstrap=0", "evaluation.figures=false"]
    runs = {row.name: over_seeds(out, row.slug, [*plain, *options.overrides, *row.arguments], options.seeds)
            for row in rows}  # fmt: skip
    by_seed = [run for same_seed in zip(*runs.values(), strict=True) for run in same_seed]
    if options.dry_run:
        check_all(by_seed)
        for row in rows:
            print(f"{row.name}: {', '.join(row.kept)}\n  {' '.join(row.arguments) or '(the recipe as it is)'}")
            print(*(f"    {run.folder}: {state(run)}" for run in runs[row.name]), sep="\n")
        return 0
    train_all(by_seed, options.jobs, options.ranks)
    ablation.write(out, f"Ablation of {recipe.recipe}", shlex.join(["dist-fair", "ablate", *arguments]), rows, runs,
                   options.seeds)  # fmt: skip
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="dist-fair ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe=NAME, and overrides for all rows")
    parser.add_argument("--seeds", nargs="+", type=seed, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--table", metavar="NAME|FILE", help="rows of another recipe's table, or of your own")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs and tables; default: runs/ablation/RECIPE")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time; default: 2")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="local ranks of each run; default: 1")
    parser.add_argument("--dry-run", action="store_true", help="list rows, overrides and runs; train nothing")
    return parser.parse_intermixed_args(arguments)


def seed(text: str) -> int:
    """A seed of --seeds."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no seed (key=value goes before the options)")
    return int(text)


def chosen(rows: list, names: list[str] | None) -> list:
    """The rows asked for, in the order of the table."""
    known = [row.name for row in rows]
    for name in names or []:
        if name not in known:
            raise DistFairError(f"--rows '{name}': no such row: {nearest(name, known)}")
    return [row for row in rows if names is None or row.name in names]


if __name__ == "__main__":
    sys.exit(guarded(main))
