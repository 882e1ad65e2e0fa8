"""How fast the loader is, as a ratio to the least that has to be done: pread, cv2.imdecode, cv2.resize, in a loop.

    python benchmarks/data_loading.py [--samples 2048] [--repeats 7]

Makes textured JPEGs in a temporary folder and reads the same samples, on the same core, in turns. Prints a Markdown
table. One process, batches of 64; the files are in the page cache, so this is the cost of the code, not of the disk.
"""

import argparse
import io
import os
import platform
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch

from dist_fair.data.index import Column, Index, Shard
from dist_fair.data.loading import training_loader
from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.data.reading import Reader

BATCH = 64
SIZES = ((96, 64), (96, 96), (256, 224))  # stored -> read, pixels
FLIP = SimpleNamespace(flip=0.5, shift=0, brightness=0, contrast=0, noise=0, blur=0, jpeg=0, jpeg_quality=(50, 95))


def texture(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG with about as many bytes per pixel as a photograph of a face."""
    field = np.zeros((size, size, 3), np.float32)
    for cells, strength in ((4, 60), (12, 30), (size // 4, 12), (size, 4)):
        coarse = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        field += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    image = np.clip(field + 128, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def make_index(folder: Path, samples: int, size: int) -> Index:
    """One shard of textures and its index, without the indexer: this script measures reading alone."""
    from zlib import crc32

    rng, path = np.random.default_rng(0), folder / "00000.tar"
    codes = [texture(rng, size) for _ in range(samples)]
    with tarfile.open(path, "w") as archive:
        for number, code in enumerate(codes):
            member = tarfile.TarInfo(f"{number:06}.jpg")
            member.size = len(code)
            archive.addfile(member, io.BytesIO(code))
    with tarfile.open(path) as archive:
        offsets = [member.offset_data for member in archive]
    none, side = Column.unknown(samples), np.full(samples, size, dtype=np.int32)
    return Index(
        names=("textures",), folders=(str(folder),), shards=(Shard(path.name, path.stat().st_size, ""),),
        shard_folders=np.zeros(1, np.int32), keys=np.arange(samples).astype(str), labels=np.zeros(samples, np.int8),
        attributes={"gender": none, "race": none}, videos=none, identities=none, manipulations=none,
        shard=np.zeros(samples, np.int32), image_offset=np.array(offsets), image_size=np.array([*map(len, codes)]),
        image_crc=np.array([*map(crc32, codes)], dtype=np.uint32), width=side, height=side,
    )  # fmt: skip


def bare(index: Index, plan: TrainingPlan, size: int, steps: int) -> None:
    """The samples of the same steps in the same order, and nothing but system call, decoder and resize."""
    file = os.open(Path(index.folders[0]) / index.shards[0].path, os.O_RDONLY)
    for step in range(steps):
        for sample in plan[step].samples.tolist():
            data = os.pread(file, int(index.image_size[sample]), int(index.image_offset[sample]))
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if image.shape[0] != size:
                cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    os.close(file)


def measure(samples: int, repeats: int, stored: int, size: int) -> list[str]:
    """Rows of the table for one pair of sizes. Repeats are interleaved, so drift of the machine hits all alike."""
    with tempfile.TemporaryDirectory() as folder:
        index = make_index(Path(folder), samples, stored)
        plan, steps = TrainingPlan(index, [TapeSpec("all")], BATCH), samples // BATCH
        reader = Reader(index, size)

        def ours(augmentation: SimpleNamespace | None) -> None:
            for _ in training_loader(plan, reader, 0, 1, 0, steps, augmentation=augmentation):
                pass

        ways = {"bare loop": lambda: bare(index, plan, size, steps), "loader": lambda: ours(None),
                "loader with flip": lambda: ours(FLIP)}  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, taken in seconds.items():
        ratio = statistics.median(base / own for base, own in zip(seconds["bare loop"], taken, strict=True))
        rate = steps * BATCH / statistics.median(taken)
        rows.append(f"| {stored} -> {size} | {name} | {rate:,.0f} | {ratio:.3f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048, help="images per pair of sizes, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds; the table shows medians")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print("| pixels | way | images/s | ratio to bare loop |\n|---|---|---|---|")
    for stored, size in SIZES:
        print("\n".join(measure(arguments.samples, arguments.repeats, stored, size)), flush=True)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores (one used), Python {platform.python_version()}, "
          f"OpenCV {cv2.__version__}, NumPy {np.__version__}, torch {torch.__version__}")  # fmt: skip


if __name__ == "__main__":
    main()
