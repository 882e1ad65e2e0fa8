"""`dist-fair shards build | index | inspect | demo`: data sets as WebDataset shards with an index."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_fair.cli import guarded
from dist_fair.data.parallel import Progress
from dist_fair.errors import DistFairError

BUILD = """Builds shards from a folder of images and a table, then indexes them.

The table is CSV or Parquet. Columns: path (relative to --images), label (0 real, 1 fake) and, if wanted, video,
identity, manipulation and split (one sub-folder each); every other column is an attribute (gender, race, age, ...).
Empty values are unknown. Stopped anywhere, the same command goes on; the same input gives the same bytes."""

INDEX = """Indexes folders of WebDataset shards, yours or those that others wrote: FOLDER/index.parquet.

A sample is KEY.jpg (png, webp) beside KEY.json: {"label": 0 or 1, "video": ..., "identity": ..., "manipulation": ...,
"attributes": {"gender": ..., "race": ...}}; all but the label may be missing. KEY.cls may hold the label instead."""

INSPECT = """Shows what is in indexed folders: samples, videos, groups, manipulations, image sizes."""

DEMO = """Draws the demo faces (no photographs): a training set, a test set like it, and three shifted ones."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; raises DistFairError for whatever the user can mend."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-fair shards", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_build(_verb(verbs, "build", BUILD, _build))
    _add_index(_verb(verbs, "index", INDEX, _index))
    _add_inspect(_verb(verbs, "inspect", INSPECT, _inspect))
    _add_demo(_verb(verbs, "demo", DEMO, _demo))
    return parser


def _verb(verbs: argparse._SubParsersAction, name: str, text: str, run: object) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = verbs.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=raw)
    parser.set_defaults(run=run)
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", nargs="+", metavar="TABLE", help="CSV or Parquet file; several are one data set")
    add("--images", required=True, metavar="DIR", help="folder that the paths of the table start from")
    add("--out", required=True, metavar="DIR", help="folder to build in")
    add("--layout", default="plain", help="plain (default), or pg_fdd: the CSV files of PG-FDD's authors")
    add("--attributes", type=_names, metavar="A,B", help="the columns that are attributes (default: all that are left)")
    add("--rename", type=_renames, default={}, metavar="THEIRS=OURS,...", help="columns to rename: img_path=path")
    add("--video-pattern", metavar="REGEX", help="finds the video in a path, for tables without column video")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="at most N samples a shard (1000)")
    add("--keep-order", action="store_true", help="keep the table's order; default: mixed by a digest of seed and key")
    add("--seed", type=int, default=0, help="seed of the mixing (0)")
    add("--name", help="the data set's name (default: that of the folder)")
    add("--overwrite", action="store_true", help="replace the shards that another table made in --out")
    _add_workers(parser)


def _add_index(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="folder with 00000.tar, ...")
    add("--attributes", type=_names, metavar="A,B", help='attributes (default: the fields in "attributes")')
    for field in ("label", "video", "identity", "manipulation"):
        add(f"--{field}-field", default=field, metavar="NAME", help=f"the .json field that holds it ({field})")
    add("--name", help="the data set's name (default: that of the folder)")
    _add_workers(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="indexed folder")
    add("--verify", action="store_true", help="read every shard and compare its checksum")
    add("--sample", metavar="KEY", help="write one sample's image to --save instead, and print what is known of it")
    add("--save", metavar="FILE", help="where --sample goes")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder to draw in, one folder a set")
    add("--seed", type=int, default=0, help="another seed draws other people (0)")
    add("--scale", type=float, default=1.0, help="multiplies the number of videos (1.0)")
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes ({cores}: all cores)")


def _build(options: argparse.Namespace) -> int:
    from dist_fair.data.build import build
    from dist_fair.data.tables import TableOptions

    with _progress("building, then indexing") as progress:
        indexes = build(
            options.tables,
            options.images,
            options.out,
            layout=options.layout,
            options=TableOptions(options.attributes, options.rename, options.video_pattern),
            samples_per_shard=options.samples_per_shard,
            shuffle=not options.keep_order,
            seed=options.seed,
            name=options.name,
            overwrite=options.overwrite,
            workers=options.workers,
            progress=progress,
        )
    for index in indexes:
        _report(index)
    return 0


def _index(options: argparse.Namespace) -> int:
    from dist_fair.data.index import write_index
    from dist_fair.data.indexing import index_folder
    from dist_fair.data.values import Fields

    if options.name and len(options.folders) > 1:
        raise DistFairError(f"--name {options.name}: it names one data set; index one folder at a time")
    fields = Fields(
        options.label_field, options.video_field, options.identity_field, options.manipulation_field, options.attributes
    )
    for folder in options.folders:
        with _progress(f"indexing {folder}") as progress:
            index = index_folder(folder, fields, options.name, options.workers, progress)
        write_index(index, [*fields.options(), *(["--name", options.name] if options.name else [])])
        _report(index)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from dist_fair.data.index import Index, read_index
    from dist_fair.data.inspecting import save_image, show, verify

    if (options.sample is None) != (options.save is None) or (options.sample and options.verify):
        raise DistFairError("--sample KEY and --save FILE go together, and without --verify")
    indexes = [read_index(folder) for folder in options.folders]
    if options.sample is not None:
        print(save_image(Index.concatenate(indexes), options.sample, Path(options.save)))
        return 0
    for index in indexes:
        show(index)
        if options.verify:
            with _progress(f"verifying {index.folders[0]}") as progress:
                verify(index, progress)
            print(f"{len(index.shards)} shards verified: every checksum is right")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from dist_fair.data.demo import make

    make(Path(options.out), seed=options.seed, scale=options.scale, workers=options.workers)
    return 0


def _report(index) -> None:
    fakes = int(index.labels.sum())
    print(
        f"{index.names[0]}: {len(index)} samples ({len(index) - fakes} real, {fakes} fake) in {len(index.shards)} "
        f"shards of {index.folders[0]}; attributes: {', '.join(index.attributes) or 'none'}"
    )
    unreadable = (index.width == 0).nonzero()[0]
    if len(unreadable):
        print(
            f"warning: {len(unreadable)} images have no readable JPEG, PNG or WebP header, the first is "
            f"{index.place(unreadable[0])}; training will treat them as bad samples",
            file=sys.stderr,
        )


@contextmanager
def _progress(text: str) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line for every tenth of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if Console().is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(text)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return

    def line(done: int, total: int) -> None:
        if done and done * 10 // total > (done - 1) * 10 // total:
            print(f"{text}: {done} of {total}", flush=True)

    yield line


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"'{text}' names one twice")
    return names


def _renames(text: str) -> dict[str, str]:
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is not THEIRS=OURS,...")
    return {theirs.strip(): ours.strip() for theirs, ours in pairs}


if __name__ == "__main__":
    sys.exit(guarded(main))
