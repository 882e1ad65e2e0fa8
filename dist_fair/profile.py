"""`dist-fair profile recipe=NAME [key=value ...]`: where the time of a step goes, and what would make it faster.

Takes real steps of a recipe, which nothing is kept of, and leaves FOLDER/trace.json.gz, which https://ui.perfetto.dev
and chrome://tracing open, and FOLDER/profile.md. The run folder of the recipe is not touched.
"""

import argparse
import sys
from pathlib import Path

from dist_fair.cli import guarded
from dist_fair.engine.invocation import Invocation
from dist_fair.errors import DistFairError, Exit, on_all_ranks

STEPS = 10


def main(arguments: list[str]) -> int:
    """Prints the tables on rank 0. Exit codes: `errors.Exit`."""
    parser = argparse.ArgumentParser(
        prog="dist-fair profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N",
        help=f"steps to time, after a few to warm up; {STEPS} if left out. The trace is of three",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="where the results go; runs/profile/RECIPE if left out")
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    options = parser.parse_intermixed_args(arguments)
    from dist_fair.engine.launch import launch_ranks

    if options.ranks is not None:
        flags = [f"--steps={options.steps}", *([f"--out={options.out}"] if options.out else [])]
        return launch_ranks("profile", options.ranks, [*options.overrides, *flags])
    with Invocation() as invocation:
        _profile(options, invocation)
    return Exit.DONE


def _profile(options: argparse.Namespace, invocation: Invocation) -> None:
    from dist_fair.engine.launch import check_world
    from dist_fair.recipe.composition import load
    from dist_fair.recipes import interventions

    with on_all_ranks():
        if options.steps < 1:
            raise DistFairError(f"--steps {options.steps}: at least 1")
        resolved = load(options.overrides, interventions())
        folder = Path(options.out or Path("runs/profile") / Path(resolved.recipe.recipe).stem)
    check_world("profile", resolved.recipe.train.ranks)
    resolved.recipe.out = str(folder / "run")  # nothing is there, and nothing will be

    from dist_fair.engine.run_folder import write_text
    from dist_fair.reporting.profile_table import Setting, cores_per_rank, drawn, profile_markdown
    from dist_fair.reporting.progress import say
    from dist_fair.training import Training

    training = Training(resolved, invocation)
    trace, leads = folder / "trace.json.gz", training.leader
    with on_all_ranks():
        make_folder(folder)
    profile = training.profile(options.steps, trace if leads else None, lambda what: say(what, leads))
    if leads:
        setting = Setting(resolved.recipe, training.comm.world, training.device, training.peak, cores_per_rank())
        write_text(folder / "profile.md", profile_markdown(profile, setting))
        for part in drawn(profile, setting):
            say(part)
        say(f"{folder / 'profile.md'}, and {trace} for https://ui.perfetto.dev")


def make_folder(folder: Path) -> None:
    """Raises DistFairError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DistFairError(f"--out={folder} cannot be made ({error.strerror}): choose another one") from None


if __name__ == "__main__":
    sys.exit(guarded(main))
