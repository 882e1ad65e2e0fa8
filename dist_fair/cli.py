"""`dist-fair VERB ...`: finds the verb's module and runs it. `python -m dist_fair.VERB ...` is the same program."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from dist_fair.errors import DistFairError, nearest

VERBS = {
    "train": "train a recipe on this machine's or this job's ranks",
    "evaluate": "score data sets with trained detectors; tables and pictures of utility and fairness",
    "ablate": "train a recipe with and without its interventions, over seeds; one table",
    "ace": "does fairness cause generalisation? plain against fair training, by group and capacity",
    "shards": "build, index and inspect data sets; draw the demo faces",
    "recipes": "list recipes, show one with where each value comes from",
}

USAGE = "usage: dist-fair VERB [...]\n\nverbs:\n" + "".join(
    f"  {verb:10}{text}\n" for verb, text in VERBS.items()
) + "\n`dist-fair VERB --help` tells more.\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Exit codes: 0 done, 2 an error the user can mend, others as the verb says."""
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
        return 2
    return guarded(importlib.import_module(f"dist_fair.{verb}").main, arguments)


def guarded(verb: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; a DistFairError becomes one line on stderr and exit code 2.

    Several ranks that meet the same error say it once: rank 0 speaks, the others only of errors of their own.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        return verb(list(sys.argv[1:] if arguments is None else arguments))
    except DistFairError as error:
        if rank == 0 or not error.everywhere:
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
