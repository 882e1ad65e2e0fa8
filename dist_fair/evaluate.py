"""`dist-fair evaluate RUN_OR_CHECKPOINT ... [data.eval=[...] ...]`: scores data sets with trained detectors."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_fair.cli import guarded
from dist_fair.engine.invocation import Invocation
from dist_fair.errors import DistFairError, on_all_ranks


def main(arguments: list[str]) -> int:
    """Writes predictions/, evaluation.{json,md,csv} and figures/ of each run; of several, a comparison.

    Exit codes: `errors.Exit`.
    """
    options = _parser().parse_intermixed_args(arguments)
    # A run may be called "seed=1": what is there is a source.
    sources = [word for word in options.words if "=" not in word or Path(word).exists()]
    overrides = [word for word in options.words if word not in sources]
    with on_all_ranks():
        _check(options, sources, overrides)
    if options.from_predictions:
        return _draw([Path(source) for source in sources], options.out)
    from dist_fair.engine.launch import launch_ranks

    if options.ranks is not None:
        options.words += [f"--out={options.out}"] if options.out else []
        return launch_ranks("evaluate", options.ranks, options.words)
    with Invocation() as invocation:
        return _evaluate(options, sources, overrides, invocation)


def _evaluate(
    options: argparse.Namespace, sources: Sequence[str], overrides: Sequence[str], invocation: Invocation
) -> int:
    from dist_fair.engine.launch import check_world

    check_world("evaluate", None)
    from dist_fair.engine.checkpoint import find
    from dist_fair.reporting.side_by_side import check_out, names_of
    from dist_fair.session import Session

    with on_all_ranks():
        found = [find(Path(source).absolute()) for source in sources]
        runs = [*names_of([checkpoint.parent.parent for checkpoint in found]).values()]
        if len(found) > 1:
            check_out(Path(options.out))
        outs = runs if len(found) > 1 or not options.out else [Path(options.out)]
        work = [_read(run, checkpoint.name, overrides, out)
                for run, checkpoint, out in zip(runs, found, outs, strict=True)]  # fmt: skip
    for (resolved, folder), checkpoint in zip(work, found, strict=True):
        session = Session(resolved, folder, invocation)
        session.load(checkpoint)
        tests = session.tests()
        session.evaluate(dict(zip(tests, session.staged([*tests.values()]), strict=True)), checkpoint.name)
    return _draw(runs, options.out) if session.leader and len(found) > 1 else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-fair evaluate", description=__doc__,
                                     usage="%(prog)s RUN_OR_CHECKPOINT [...] [key=value ...] [options]")  # fmt: skip
    parser.add_argument("words", nargs="+", metavar="RUN_OR_CHECKPOINT | key=value",
                        help="run folders (the newest checkpoint of each) or step-N folders; and changes that leave "
                        "the detector as it is, such as data.eval=[...]")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where results go, by default the run folder; of several runs: "
                        "where they are compared")  # fmt: skip
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--from-predictions", action="store_true", help="score nothing: draw and compare what is there")
    return parser


def _check(options: argparse.Namespace, sources: Sequence[str], overrides: Sequence[str]) -> None:
    if not sources:
        raise DistFairError(f"{' '.join(overrides)}: name a run folder or a checkpoint to evaluate")
    if len(sources) > 1 and not options.out:
        raise DistFairError(f"{len(sources)} runs: say where they are to be compared, with --out DIR")
    if options.from_predictions and (overrides or options.ranks is not None):
        raise DistFairError(f"--from-predictions scores nothing: leave out {' '.join([*overrides]) or '--ranks'}")
    if options.from_predictions and options.out and len(sources) == 1:
        raise DistFairError("--from-predictions draws one run into its own folder: leave out --out")


def _read(run: Path, checkpoint: str, overrides: Sequence[str], out: Path) -> tuple:
    """The recipe of a run with overrides, and the folder for the results of its checkpoint, checked."""
    from dist_fair.engine.assembly import dataset_names
    from dist_fair.engine.run_folder import RunFolder
    from dist_fair.recipe.composition import read
    from dist_fair.recipes import interventions
    from dist_fair.session import origin

    folder = RunFolder(out)
    folder.refuse_other_run(run)
    resolved = read(run / "recipe.yaml", interventions(), overrides)
    folder.refuse_mixture(origin(resolved, checkpoint), dataset_names(resolved.recipe.data.eval).values())
    resolved.recipe.detector.pretrained, resolved.recipe.detector.init_from = False, None  # the checkpoint has all
    return resolved, folder


def _draw(runs: Sequence[Path], out: str | None) -> int:
    """Tables and figures of what the runs' folders have, side by side where they are several."""
    from dist_fair.reporting.progress import say
    from dist_fair.reporting.side_by_side import names_of, side_by_side, write_up

    written = side_by_side(names_of(runs), Path(out)) if len(runs) > 1 else write_up(runs[0])
    say("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
