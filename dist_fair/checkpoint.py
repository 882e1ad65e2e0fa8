"""`dist-fair checkpoint inspect PATH` and `diff A B`: what is in a checkpoint, and in what two of them differ."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError

if TYPE_CHECKING:  # torch takes seconds, and --help needs none of it
    import torch

    from dist_fair.engine.checkpoint import Checkpoint

INSPECT = """Shows what is in a checkpoint, or in all checkpoints of a run and more of the newest one.

Exit codes: 0, 1 if a file is missing or not what was written, 2 for an error."""

DIFF = """Shows in what two checkpoints differ, in recipe, step and tensors, the largest difference first.

The difference of two tensors is the largest of any two elements; relative: as part of the largest element of either.
Exit codes: 0 for equal within --tolerance, 1 for different, 2 for an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; raises DistFairError for whatever the user can mend."""
    parser = argparse.ArgumentParser(prog="dist-fair checkpoint", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    inspect = _verb(verbs, "inspect", INSPECT, _inspect)
    inspect.add_argument("path", type=Path, metavar="PATH", help="a run folder, or a step-N folder in one")
    inspect.add_argument("--tensors", action="store_true", help="list all tensors: shape, type and norm")
    diff = _verb(verbs, "diff", DIFF, _diff)
    diff.add_argument("one", type=Path, metavar="A", help="a run folder (its newest checkpoint) or a step-N folder")
    diff.add_argument("other", type=Path, metavar="B", help="another one")
    diff.add_argument("--tolerance", type=float, default=0.0, metavar="T", help="largest relative difference that "
                      "counts as equal (default: 0)")  # fmt: skip
    options = parser.parse_args(arguments)
    return options.run(options)


def _verb(verbs: argparse._SubParsersAction, name: str, text: str, run: object) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=raw)
    parser.set_defaults(run=run)
    return parser


# inspect --------------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    from dist_fair.engine.checkpoint import complete, find, look
    from dist_fair.reporting.progress import say

    chosen = find(options.path)
    folders = [chosen] if chosen == options.path else complete(chosen.parent)
    found = [look(folder) for folder in folders]
    faults = {checkpoint.step: _fault(checkpoint) for checkpoint in found}
    say(_table(("checkpoint", "format", "written by", "files", "MiB", "hashes"),
               [_summary(checkpoint, faults[checkpoint.step]) for checkpoint in found], left=3))  # fmt: skip
    for fault in filter(None, faults.values()):
        say(f"damaged: {fault}")
    newest = next(checkpoint for checkpoint in found if checkpoint.folder == chosen)
    if not faults[newest.step]:
        say("")
        say(_table((newest.folder.name, ""), _contents(newest), left=2))
        if options.tensors:
            say("")
            say(_table(("tensor", "type", "shape", "norm"), _tensors(newest), left=3))
    return int(any(faults.values()))


def _fault(checkpoint: "Checkpoint") -> str | None:
    """What is wrong with its files, or None."""
    try:
        checkpoint.check()
    except DistFairError as error:
        return str(error)
    return None


def _summary(checkpoint: "Checkpoint", fault: str | None) -> tuple[str, ...]:
    writer, files = checkpoint.writer, [checkpoint.folder / name for name in checkpoint.files]
    ranks, backend, version = (writer.get(key, "?") for key in ("ranks", "backend", "torch"))
    by = f"{ranks} x {backend}, torch {version}" if writer else "-"
    size = sum(path.stat().st_size for path in files if path.is_file()) / 2**20
    form, count = str(checkpoint.format), str(len(files))
    return checkpoint.folder.name, form, by, count, f"{size:,.1f}", "damaged" if fault else "ok"


def _contents(checkpoint: "Checkpoint") -> Iterable[tuple[str, str]]:
    """What a checkpoint says of itself, as pairs of words."""
    model, moments, masked = Counter(), Counter(), []
    for name, tensor in checkpoint.each("model"):
        model.update(tensors=1, numbers=tensor.numel())
        if name.endswith("channel_mask"):
            masked.append(f"{int((tensor == 0).sum()):,} of {tensor.numel():,} channels ({name})")
    for name, _ in checkpoint.each("optimizer"):
        moments[name.partition("/")[0]] += 1
    recipe = checkpoint.recipe
    shown = ("data.name", "detector.name", "interventions", "optimizer.name", "train.steps", "train.epochs", "seed")
    yield "step", f"{checkpoint.step:,}"
    yield "recipe", f"{len(recipe)} settings that shape it; `diff` compares them"
    yield from ((f"  {key}", _inline(recipe[key])) for key in shown if recipe.get(key) is not None)
    yield "parameters and buffers", f"{model['tensors']:,} tensors of {model['numbers']:,} numbers"
    yield "moments", ", ".join(f"{kind} of {count:,}" for kind, count in sorted(moments.items())) or "none"
    yield "masked", "; ".join(masked) or "no channel_mask in it"
    yield "told with its step", ", ".join(f"{name} {value:.4g}" for name, value in checkpoint.values.items()) or "-"


def _tensors(checkpoint: "Checkpoint") -> Iterable[tuple[str, ...]]:
    for part in ("model", "optimizer"):
        for name, tensor in checkpoint.each(part):
            yield name, *_kind(tensor), f"{float(tensor.double().norm()):.6g}"


# diff -----------------------------------------------------------------------------------------------------------------


def _diff(options: argparse.Namespace) -> int:
    from dist_fair.engine.checkpoint import PARTS, find, read
    from dist_fair.recipe.resolved import differences
    from dist_fair.reporting.progress import say

    if not 0 <= options.tolerance < math.inf:
        raise DistFairError(f"--tolerance={options.tolerance}: a relative difference, such as 1e-5")
    one, other = (read(find(path)) for path in (options.one, options.other))
    lines = [f"step: {one.step}, {other.step}"] if one.step != other.step else []
    lines += differences(one.recipe, other.recipe)
    rows, equal = [], 0
    for part in PARTS:
        left, right = dict(one.each(part)), dict(other.each(part))
        for name in sorted({*left, *right}):
            row = _difference(left.get(name), right.get(name))
            if row[1] <= options.tolerance and (options.tolerance or not row[2]):
                equal += 1
            else:
                rows.append((name, *row))
    rows.sort(key=lambda row: (-row[2], -row[1], row[0]))
    for line in lines:
        say(line)
    if rows:
        shown = [(name, f"{most:.3g}", f"{relative:.3g}", note) for name, most, relative, note in rows]
        say(_table(("tensor", "difference", "relative", ""), shown, left=1))
    say(f"{equal:,} of {equal + len(rows):,} tensors are equal"
        + (f" within {options.tolerance:g}" if options.tolerance else ""))  # fmt: skip
    return int(bool(lines or rows))


def _difference(one: "torch.Tensor | None", other: "torch.Tensor | None") -> tuple[float, float, str]:
    """Largest difference, absolute and relative, and a note; infinite where the tensors cannot be compared."""
    import torch

    if one is None or other is None:
        return math.inf, math.inf, f"only in {'B' if one is None else 'A'}"
    if one.shape != other.shape:
        return math.inf, math.inf, f"{tuple(one.shape)}, {tuple(other.shape)}"
    note = f"{_kind(one)[0]}, {_kind(other)[0]}" if one.dtype != other.dtype else ""
    one, other = one.double().flatten(), other.double().flatten()
    apart = torch.where(one.isnan() & other.isnan() | (one == other), 0.0, (one - other).abs())
    most = float(apart.nan_to_num(math.inf).max()) if len(apart) else 0.0
    largest = max(float(values.nan_to_num(0.0).abs().max()) for values in (one, other)) if most else 1.0
    return most, most / largest if math.isfinite(most) else math.inf, note


# What both print ------------------------------------------------------------------------------------------------------


def _kind(tensor: "torch.Tensor") -> tuple[str, str]:
    return str(tensor.dtype).removeprefix("torch."), " x ".join(map(str, tensor.shape)) or "1"


def _inline(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int):
    """A table whose first `left` columns are words, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < left else "right", overflow="fold", no_wrap=place >= left)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


if __name__ == "__main__":
    sys.exit(guarded(main))
