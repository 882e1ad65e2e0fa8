"""`dist-fair sweep recipe=NAME key=VALUE,VALUE seed=0,1,2 [cluster=slurm ...]`: every combination, every seed.

Values are listed by Hydra's grammar, or in a file: sweep=NAME. Finished runs are kept, half-done ones go on, and jobs
in the queue are watched again: the same command as often as needed. It ends in a leaderboard: leaderboard.md, .csv,
.parquet, .png, .svg. Settings go before the options.
"""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from dist_fair.cli import guarded

if TYPE_CHECKING:
    from dist_fair.studies.sweep import Sweep


def main(arguments: list[str]) -> int:
    """Trains what is missing and writes the leaderboard. Exit code 0, or 2 if a run failed."""
    options = _parser().parse_intermixed_args(arguments)
    from dist_fair.reporting.progress import say
    from dist_fair.studies.runs import failed
    from dist_fair.studies.sweep import planned

    sweep = planned(options.overrides)
    sweep.check()
    judged = sweep.attributes(options.attributes), options.utility, options.fairness, options.sort or options.utility
    seeds = len(sweep.all) // len(sweep.runs)
    say(f"{len(sweep.all)} runs in {sweep.out}: {len(sweep.runs)} settings, {seeds} seed{'s' * (seeds > 1)}")
    if options.dry_run:
        print(*(f"{run.folder.name}: {state}" for run, state in sweep.states().items()), sep="\n")
        return 0
    with sweep.claimed():
        failures = sweep.train()
    _rank(sweep, judged, shlex.join(["dist-fair", "sweep", *arguments]), [str(one) for one in failures])
    if failures:
        raise failed(failures, len(sweep.all))
    return 0


def _parser() -> argparse.ArgumentParser:
    from dist_fair.reporting.leaderboard import METRICS
    from dist_fair.reporting.tables import FAIRNESS, UTILITY
    from dist_fair.studies.sweep import KEYS

    own = "".join(f"\n  {key:14}{meaning}" for key, meaning in KEYS.items())
    parser = argparse.ArgumentParser(
        prog="dist-fair sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys of the sweep itself, key=value; all other keys are the recipe's:{own}",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value,value", help="recipe=NAME or sweep=NAME, and more")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list runs and their states")
    parser.add_argument("--attributes", nargs="+", metavar="NAME", help="judged by one of them; default: all, crossed")
    parser.add_argument("--utility", choices=UTILITY, default="AUC", metavar="METRIC", help="of the front; default AUC")
    parser.add_argument("--fairness", choices=FAIRNESS, default="F_EO", metavar="METRIC",
                        help=f"of the front: {', '.join(FAIRNESS)}; default F_EO")  # fmt: skip
    parser.add_argument("--sort", choices=METRICS, metavar="METRIC", help="best first; default: that of --utility")
    return parser


def _rank(sweep: "Sweep", judged: tuple[str, ...], command: str, failures: list[str]) -> None:
    """Writes and shows the leaderboard, from the runs that are finished."""
    import torch

    from dist_fair.reporting import front, leaderboard
    from dist_fair.reporting.progress import say

    board = leaderboard.Leaderboard(sweep.entries(), *judged)
    if not board.datasets:
        return
    device = "GPU" if torch.cuda.is_available() else "CPU"
    heading = f"# Sweep {sweep.name}\n\n`{command}` (torch {torch.__version__}, {device})\n"
    if failures:
        told = "\n".join(failures)
        heading += f"\nIncomplete: {len(failures)} of {len(sweep.all)} runs failed.\n\n```\n{told}\n```\n"
    written = [*leaderboard.write(board, sweep.out, heading), *front.draw(board, sweep.out)]
    say(leaderboard.leaderboard_table(board, board.datasets[0]))
    say("\n".join(map(str, [leaderboard.note(board), *written])))


if __name__ == "__main__":
    sys.exit(guarded(main))
