"""`dist-fair VERB ...`: finds the verb's module and runs it. `python -m dist_fair.VERB ...` is the same program."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from dist_fair.engine.invocation import SILENCE
from dist_fair.engine.preemption import GRACE
from dist_fair.errors import DistFairError, Exit, Preempted, RankLost, nearest

VERBS = {
    "train": "train a recipe on this machine's or this job's ranks",
    "evaluate": "score data sets with trained detectors; tables and pictures of utility and fairness",
    "export": "a trained detector as a folder that scores images without recipe, data or demographics",
    "predict": "score images with a trained detector",
    "ablate": "train a recipe with and without its interventions, over seeds; one table",
    "sweep": "train a grid of settings and seeds, here or on Slurm; a leaderboard with its Pareto front",
    "ace": "does fairness cause generalisation? plain against fair training, by group and capacity",
    "checkpoint": "what is in a checkpoint, and in what two of them differ",
    "shards": "build, index and inspect data sets; draw the demo faces",
    "doctor": "what a run needs of this machine or cluster, a real step included, looked at on every rank",
    "profile": "where the time of a step goes and what would make it faster; a trace for Perfetto",
    "recipes": "list recipes, show one with where each value comes from",
}

USAGE = "usage: dist-fair VERB [...]\n\nverbs:\n" + "".join(
    f"  {verb:12}{text}\n" for verb, text in VERBS.items()
) + "\n`dist-fair VERB --help` tells more.\n\nexit codes:\n" + "".join(
    f"  {code:<10}{code.meaning}\n" for code in Exit
) + f"""
environment:
  DIST_FAIR_GRACE    seconds from SIGUSR1, SIGUSR2 or SIGTERM until a rank that hangs is forced out: {GRACE:g}
  DIST_FAIR_SILENCE  seconds without a heartbeat until a rank counts as lost: {SILENCE:g}; 0: no heartbeats
"""  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Exit codes: `errors.Exit`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(importlib.import_module("dist_fair").__version__)
        return 0
    verb = arguments.pop(0)
    if verb not in VERBS:
        print(f"error: no verb '{verb}': {nearest(verb, [*VERBS])}\n\n{USAGE}", end="", file=sys.stderr)
        return Exit.REFUSED
    return guarded(importlib.import_module(f"dist_fair.{verb}").main, arguments)


def guarded(verb: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; the exceptions of dist_fair.errors become one line on stderr and an exit code.

    Several ranks that meet the same error say it once: rank 0 speaks, the others only of errors of their own.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        return verb(list(sys.argv[1:] if arguments is None else arguments))
    except DistFairError as error:
        if rank == 0 or not error.everywhere:
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return Exit.REFUSED
    except Preempted as stopped:
        if rank == 0:
            print(f"{stopped}; the same command goes on", file=sys.stderr, flush=True)
        return Exit.PREEMPTED
    except RankLost as lost:
        print(f"{lost}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(Exit.RANK_LOST)  # what torch does when it ends may wait for the lost rank
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # `dist-fair ... | head`: Python would say so once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.UNREAD
