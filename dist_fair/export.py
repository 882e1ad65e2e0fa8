"""`dist-fair export RUN_OR_CHECKPOINT [--out FOLDER]`: a trained detector as a folder that needs no recipe and no data.

Left out: all that only training needs, and masked channels. `dist-fair predict` and `dist_fair.load_detector` read it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError

if TYPE_CHECKING:
    import torch

    from dist_fair.engine.deployment import DeployedDetector


def main(arguments: list[str]) -> int:
    """Writes the folder and says what became of the detector. Exit code 0."""
    options = _parser().parse_intermixed_args(arguments)
    from dist_fair.engine.checkpoint import find
    from dist_fair.engine.exporting import refuse_occupied, write
    from dist_fair.reporting.progress import say

    checkpoint = find(Path(options.source).absolute())
    out = Path(options.out or checkpoint.parent.parent / "detector").resolve()
    refuse_occupied(out, options.replace)
    detector, tensors = from_checkpoint(checkpoint, options.overrides)
    write(out, detector, options.replace)
    say(_summary(checkpoint, tensors, detector, out))
    say(f"{out}\nscore images with: dist-fair predict {options.out or out} IMAGE_OR_FOLDER")
    return 0


def from_checkpoint(
    checkpoint: Path, overrides: Sequence[str] = ()
) -> tuple["DeployedDetector", dict[str, "torch.Tensor"]]:
    """The detector of a step-N folder of a run, and the tensors that it was made from.

    overrides: of what only matters at inference. Raises DistFairError for a checkpoint that is damaged, of another
    recipe than lies in the run folder, or cannot be exported.
    """
    import dist_fair
    from dist_fair.engine.checkpoint import read
    from dist_fair.engine.exporting import deploy
    from dist_fair.engine.run_folder import RunFolder, few
    from dist_fair.recipe import composition
    from dist_fair.recipe.resolved import differences
    from dist_fair.recipes import interventions

    recipe = RunFolder(checkpoint.parent.parent).recipe
    if not recipe.is_file():
        raise DistFairError(f"{recipe} is not there: a checkpoint is exported from within its run folder")
    resolved, found = composition.read(recipe, interventions(), overrides), read(checkpoint, ("model",))
    now = resolved.trajectory()
    known = found.recipe.keys() & now.keys()  # other versions have other settings
    if changed := differences({key: found.recipe[key] for key in known}, {key: now[key] for key in known}):
        raise DistFairError(f"{checkpoint} is of another recipe than {recipe} (checkpoint, file): {few(changed)}")
    provenance = {
        "recipe": resolved.recipe.recipe,
        "fingerprint": resolved.fingerprint(),
        "interventions": [*resolved.recipe.interventions],
        "checkpoint": checkpoint.name,
        "step": found.step,
        "dist_fair": dist_fair.__version__,
    }
    tensors = found.tensors("model")
    return deploy(resolved.recipe, tensors, provenance, str(checkpoint)), tensors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-fair export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder (its newest checkpoint) or step-N")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that only matter at inference: interventions.subgroup_norm.inference=none",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where it goes, by default RUN/detector")
    parser.add_argument("--replace", action="store_true", help="an exported detector may lie there, and goes")
    return parser


def _summary(checkpoint: Path, tensors: dict[str, "torch.Tensor"], detector: "DeployedDetector", out: Path):
    """What it was and what it is, as a table for `say`."""
    from rich import box
    from rich.table import Table

    description, removed = detector.description, len(detector.description.masked)
    files = [[*folder.glob("model*.safetensors")] for folder in (checkpoint, out)]
    rows = (
        (
            "parameters and statistics",
            *(f"{sum(one.numel() for one in each.values()):,}" for each in (tensors, detector.tensors())),
        ),
        ("MB on disk", *(f"{sum(one.stat().st_size for one in each) / 1e6:,.2f}" for each in files)),
        ("channels", str(description.channels), f"{description.channels - removed} ({removed} removed)"),
        ("between features and classifier", "", ", ".join(step["kind"] for step in description.steps) or "nothing"),
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in (description.name, checkpoint.name, "exported"):
        table.add_column(name, justify="left" if name == description.name else "right")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(guarded(main))
