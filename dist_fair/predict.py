"""`dist-fair predict DETECTOR IMAGE_OR_FOLDER ... [--out scores.csv]`: how likely images are to be fake.

DETECTOR: a folder that `dist-fair export` made, or a run folder or checkpoint, which is exported in memory. Images:
jpg, png and webp; folders are searched. A face should fill the image as it did in training: nothing here finds faces.
Exit code 3: some images could not be scored, and are listed.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_fair.cli import guarded
from dist_fair.errors import DistFairError, Exit

if TYPE_CHECKING:
    import numpy as np

    from dist_fair.engine.deployment import DeployedDetector

SUFFIXES, TABLES = (".jpg", ".jpeg", ".png", ".webp"), (".csv", ".parquet")
SCREEN = 30  # images that are shown without --out
READERS = 8  # threads; decoding leaves Python's lock
COLUMNS = ("image", "score", "verdict", "problem")


@dataclass(frozen=True)
class Scored:
    """score: probability of fake, or None and the problem."""

    image: Path
    score: float | None
    problem: str = ""

    def row(self, threshold: float) -> tuple[str, float | None, str, str]:
        """COLUMNS. verdict: fake where score >= threshold, else real; "" without a score."""
        verdict = "" if self.score is None else "fake" if self.score >= threshold else "real"
        name = str(self.image).encode("utf-8", "backslashreplace").decode()  # Linux lets names be no text
        return name, self.score, verdict, self.problem


def main(arguments: list[str]) -> int:
    """Exit code 0 if all images were scored, else 3."""
    options = _parser().parse_args(arguments)
    images = found_images(options.images)
    _check(options, len(images))
    from dist_fair.reporting.progress import Progress, say

    detector = _detector(Path(options.detector), options.device)
    scored: list[Scored] = []
    with Progress(len(images), "predict", unit="images") as progress:
        for part in score(detector, images, options.batch_size):
            scored += part
            progress.step(len(part))
    rows = [one.row(options.threshold) for one in scored]
    if options.out:
        _write(Path(options.out), rows)
    else:
        say(_table(rows))
    problems = [f"warning: {image}: {problem}" for image, _, _, problem in rows if problem]
    say("\n".join(problems[:SCREEN] + [f"and {len(problems) - SCREEN} more"][: len(problems) > SCREEN]), bool(problems))
    bad, fakes = len(problems), sum(row[2] == "fake" for row in rows)
    where = f"; scores in {options.out}" if options.out else ""
    say(f"{len(rows) - bad} of {len(rows)} images scored, {fakes} of them fake (score >= {options.threshold}), "
        f"{bad} could not be read{where}")  # fmt: skip
    return Exit.LISTED if bad else Exit.DONE


def found_images(words: Sequence[str]) -> list[Path]:
    """The images that are meant, each once: files as named, and what looks like an image in folders, sorted by path.

    Raises DistFairError for a path that is not there, and a folder without images.
    """
    images: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        found = [path]
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
        if not found or not path.exists():
            raise DistFairError(
                f"{word}: {'no jpg, png or webp image in this folder' if path.exists() else 'not there'}"
            )
        images |= dict.fromkeys(found)
    return [*images]


def score(detector: "DeployedDetector", images: Sequence[Path], batch_size: int) -> Iterator[list[Scored]]:
    """All images in order, a batch at a time; while one is scored, threads read the next."""
    from concurrent.futures import Future, ThreadPoolExecutor

    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    with ThreadPoolExecutor(READERS) as pool:

        def begun(number: int) -> list[Future]:
            return [pool.submit(_read, image, detector) for image in batches[number : number + 1] for image in image]

        ahead = begun(0)
        for number, batch in enumerate(batches):
            read, ahead = [future.result() for future in ahead], begun(number + 1)
            yield _scored(detector, batch, read)


def _read(image: Path, detector: "DeployedDetector") -> "np.ndarray | str":
    """The pixels (S, S, 3), or what is wrong."""
    import numpy as np

    from dist_fair.data.reading import file_into

    side = detector.description.image_size
    pixels = np.empty((side, side, 3), np.uint8)
    return file_into(image, pixels) or pixels


def _scored(detector: "DeployedDetector", images: Sequence[Path], read: Sequence["np.ndarray | str"]) -> list[Scored]:
    import numpy as np

    pixels = [one for one in read if not isinstance(one, str)]
    scores = detector(detector.normalised(np.stack(pixels))).tolist() if pixels else []
    if not np.isfinite(scores).all():
        raise DistFairError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores from {images[0]} on are not "
                            "finite: the weights of the detector are broken")  # fmt: skip
    left = iter(scores)
    return [Scored(image, None, one) if isinstance(one, str) else Scored(image, next(left))
            for image, one in zip(images, read, strict=True)]  # fmt: skip


def _detector(path: Path, device: str | None) -> "DeployedDetector":
    import torch

    from dist_fair.engine.checkpoint import find
    from dist_fair.engine.deployment import CONFIG, load_detector, usable
    from dist_fair.engine.device.numerics import set_numerics

    place = usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    set_numerics(place)
    if (path / CONFIG).is_file() or not any((path / part).exists() for part in ("checkpoints", "state.json")):
        return load_detector(path, place)
    from dist_fair.export import from_checkpoint

    return from_checkpoint(find(path.absolute()))[0].to(place)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-fair predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("detector", metavar="DETECTOR", help="an exported folder, a run folder or a checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="jpg, png, webp; folders are searched")
    parser.add_argument("--out", metavar="FILE", help="scores.csv or scores.parquet: image, score, verdict, problem")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per forward pass (64)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default cuda where there is a GPU")
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="P", help="called fake from this score on (0.5)"
    )
    return parser


def _check(options: argparse.Namespace, count: int) -> None:
    if options.batch_size < 1:
        raise DistFairError(f"--batch-size={options.batch_size}: at least 1")
    if not 0 <= options.threshold <= 1:
        raise DistFairError(f"--threshold={options.threshold}: a probability, between 0 and 1")
    if options.out and Path(options.out).suffix not in TABLES:
        raise DistFairError(f"--out={options.out}: a file that ends in {' or '.join(TABLES)}")
    if not options.out and count > SCREEN:
        raise DistFairError(f"{count} images are more than the screen shows: say where the scores go, --out scores.csv")


def _table(rows: Sequence[tuple]):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for image, value, verdict, _ in rows:
        # Text is not markup: a file may be called [red].
        table.add_row(Text(image), "" if value is None else f"{value:.4f}", verdict or "not scored")
    return table


def _write(path: Path, rows: Sequence[tuple]) -> None:
    from dist_fair.data.storage import replacing

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(_csv(rows) if path.suffix == ".csv" else _parquet(rows))
    except OSError as error:
        raise DistFairError(f"--out={path} cannot be written: {error}") from None


def _csv(rows: Sequence[tuple]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: Sequence[tuple]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    kinds = [pyarrow.float64() if name == "score" else pyarrow.string() for name in COLUMNS]
    columns = [pyarrow.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, COLUMNS), data)
    return data.getvalue()


if __name__ == "__main__":
    sys.exit(guarded(main))
