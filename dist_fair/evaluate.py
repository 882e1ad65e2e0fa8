"""`dist-fair evaluate RUN_OR_CHECKPOINT ... [data.eval=[...] ...]`: scores data sets with trained detectors."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError, on_all_ranks


def main(arguments: list[str]) -> int:
    """Writes predictions/, evaluation.{json,md,csv} and figures/ of each run; of several, a comparison. Exit code 0."""
    options = _parser().parse_intermixed_args(arguments)
    # A run may be called "seed=1": what is there is a source.
    sources = [word for word in options.words if "=" not in word or Path(word).exists()]
    overrides = [word for word in options.words if word not in sources]
    with on_all_ranks():
        _check(options, sources, overrides)
    if options.from_predictions:
        return _draw([Path(source) for source in sources], options.out)
    from dist_fair.engine.launch import check_world, launch_ranks

    if options.ranks is not None:
        out = [f"--out={options.out}"] if options.out else []
        return launch_ranks("evaluate", options.ranks, [*sources, *overrides, *out])
    check_world("evaluate", None)
    from dist_fair.engine.checkpoint import find
    from dist_fair.reporting.side_by_side import names_of

    with on_all_ranks():
        found = [find(Path(source).absolute()) for source in sources]
        folders = [checkpoint.parent.parent for checkpoint in found]
        names_of(folders)
    for checkpoint, run in zip(found, folders, strict=True):
        leader = _evaluate(checkpoint, overrides, Path(options.out) if options.out and len(found) == 1 else run)
    return _draw(folders, options.out) if leader and len(found) > 1 else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-fair evaluate", description=__doc__,
                                     usage="%(prog)s RUN_OR_CHECKPOINT [...] [key=value ...] [options]")  # fmt: skip
    parser.add_argument("words", nargs="+", metavar="RUN_OR_CHECKPOINT | key=value",
                        help="run folders (the newest checkpoint of each) or step-N folders; and changes that leave "
                        "the detector as it is, such as data.eval=[...]")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where results go, by default the run folder; for several runs, "
                        "where they are compared (the results of each go to its own folder)")  # fmt: skip
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--from-predictions", action="store_true",
                        help="score nothing: draw and compare what the runs' evaluation.json and predictions/ have")
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


def _evaluate(checkpoint: Path, overrides: Sequence[str], out: Path) -> bool:
    """Scores the data sets of a run, with overrides, and writes to `out`; whether this rank is the leader."""
    from dist_fair.engine.run_folder import RunFolder
    from dist_fair.recipe.composition import read
    from dist_fair.recipes import interventions
    from dist_fair.session import Session

    with on_all_ranks():
        folder, run = RunFolder(out), checkpoint.parent.parent
        folder.refuse_file()
        if folder.recipe.is_file() and not folder.path.samefile(run):
            raise DistFairError(f"--out={out} is the folder of another run: choose another one")
        resolved = read(run / "recipe.yaml", interventions(), overrides)
        resolved.recipe.detector.pretrained, resolved.recipe.detector.init_from = False, None  # the checkpoint has all
    session = Session(resolved, folder)
    session.load(checkpoint)
    tests = session.tests()
    with on_all_ranks():
        folder.refuse_mixture(session.source(checkpoint.name), tests)
    session.evaluate(tests, checkpoint.name)
    return session.leader


def _draw(runs: Sequence[Path], out: str | None) -> int:
    """Tables and figures of what the runs' folders have, side by side where they are several."""
    from dist_fair.reporting.progress import say
    from dist_fair.reporting.side_by_side import names_of, side_by_side, write_up

    for path in side_by_side(names_of(runs), Path(out)) if len(runs) > 1 else write_up(runs[0]):
        say(str(path))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
