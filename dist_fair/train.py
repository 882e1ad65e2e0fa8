"""`dist-fair train recipe=NAME [key=value ...]`, or `accelerate launch`/`torchrun` with `-m dist_fair.train`."""

import argparse
import sys

from dist_fair.cli import guarded
from dist_fair.engine.invocation import Invocation
from dist_fair.errors import Exit, on_all_ranks


def main(arguments: list[str]) -> int:
    """Trains, then evaluates. Exit codes: `errors.Exit`."""
    parser = argparse.ArgumentParser(
        prog="dist-fair train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`dist-fair train --keys` lists all keys; `dist-fair recipes` all recipes.",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe=NAME, then overrides: a.b=c, +a.b=c, ~a.b"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="check everything, take one real step (two, to time it) on this machine's devices, print what would run "
        "and what a step takes; nothing is written",
    )  # fmt: skip
    parser.add_argument("--no-step", action="store_true", help="with --dry-run, on a login node: without the step")
    parser.add_argument("--keys", action="store_true", help="list all keys with their types, defaults and meaning")
    options = parser.parse_intermixed_args(arguments)
    if options.keys:
        from dist_fair.recipes import schema_help

        print(schema_help())
        return 0
    from dist_fair.engine.launch import check_world, launch_ranks

    if options.ranks is not None:
        flags = [*["--dry-run"][: options.dry_run], *["--no-step"][: options.no_step]]
        return launch_ranks("train", options.ranks, [*options.overrides, *flags])
    with Invocation() as invocation:
        from dist_fair.recipe.composition import load
        from dist_fair.recipes import interventions

        with on_all_ranks():
            resolved = load(options.overrides, interventions())
        check_world("train", resolved.recipe.train.ranks)
        from dist_fair.training import Training

        training = Training(resolved, invocation)
        if not options.dry_run:
            training.run()
            return Exit.DONE
        trial = None if options.no_step else training.trial()
        if training.leader:
            print(training.describe(trial))
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(guarded(main))
