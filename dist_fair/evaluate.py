"""`dist-fair evaluate RUN_OR_CHECKPOINT [data.eval=[...] ...]`: scores data sets with a trained detector."""

import argparse
import sys
from pathlib import Path

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError, on_all_ranks


def main(arguments: list[str]) -> int:
    """Writes predictions/NAME.parquet and evaluation.json, prints the table. Exit code 0."""
    parser = argparse.ArgumentParser(prog="dist-fair evaluate", description=__doc__)
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder (its newest checkpoint) or a step-N")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="changes that leave the detector as it is, such as data.eval=[...]")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where results go; default: the run folder")
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    options = parser.parse_intermixed_args(arguments)
    from dist_fair.engine.launch import check_world, launch_ranks

    if options.ranks is not None:
        out = [f"--out={options.out}"] if options.out else []
        return launch_ranks("evaluate", options.ranks, [options.source, *options.overrides, *out])
    check_world("evaluate", None)
    from dist_fair.engine.checkpoint import find
    from dist_fair.engine.run_folder import RunFolder
    from dist_fair.recipe.composition import read
    from dist_fair.recipes import interventions
    from dist_fair.session import Session

    with on_all_ranks():
        source = find(Path(options.source).absolute())
        run = source.parent.parent
        folder = RunFolder(options.out or run)
        folder.refuse_file()
        if folder.recipe.is_file() and not folder.path.samefile(run):
            raise DistFairError(f"--out={options.out} is the folder of another run: choose another one")
        resolved = read(run / "recipe.yaml", interventions(), options.overrides)
        resolved.recipe.detector.pretrained, resolved.recipe.detector.init_from = False, None  # the checkpoint has all
    session = Session(resolved, folder)
    session.load(source)
    session.evaluate(session.tests(), source.name)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
