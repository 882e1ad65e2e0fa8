"""A small healthy data set, and the same with something wrong in it."""

from pathlib import Path

import cv2
import numpy as np

from dist_fair import cli
from dist_fair.data.writing import Sample, write_shards
from tests.command_line.runs import GENDERS, RACES, SIZE

COUNT = 24  # three batches of eight are one epoch: every sample is read once
RECIPE = """
defaults: [erm]
train: {steps: 3, batch_size: 8}
data: {window: 8}
optimizer: {lr: 0.02}
checkpoint: {every: 1}
evaluation: {bootstrap: 0, batch_size: 10}
wandb: {mode: disabled}
detector: {arguments: {layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}}
"""
ODD = 7  # the sample that is spoilt: a fake Black man


def jpeg(number: int, side: int = SIZE) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(coarse, (side, side)))[1].tobytes()


def folder_of(
    folder: Path,
    image: bytes | None = None,
    extension: str = "jpg",
    label: object = 1,
    without: str | None = None,
    without_group: tuple[str, str] | None = None,
) -> Path:
    """24 samples of two labels, two genders and three races in two shards.

    image, extension, label: of sample ODD. without: an attribute that no sample has. without_group: a gender and a
    race that no sample has together.
    """
    samples = []
    for number in range(COUNT):
        attributes = {"gender": GENDERS[number // 2 % 2], "race": RACES[number // 4 % 3]}
        if (attributes["gender"], attributes["race"]) == without_group:
            attributes["race"] = "White"
        attributes = {name: value for name, value in attributes.items() if name != without}
        metadata = {"label": label if number == ODD else number % 2, "attributes": attributes}
        own = (image, extension) if image and number == ODD else (jpeg(number), "jpg")
        samples.append(Sample(f"s{number:02d}", *own, metadata))
    write_shards(samples, folder, 12)
    return folder


def index(folder: Path) -> int:
    return cli.main(["shards", "index", str(folder), "--workers", "1"])


def data_set(root: Path, train: dict | None = None, near: dict | None = None) -> Path:
    """Folders `train` and `near` of `folder_of`, indexed, their card and a recipe."""
    for name, changes in (("train", train), ("near", near)):
        assert index(folder_of(root / name, **(changes or {}))) == 0
    (root / "quick.yaml").write_text(RECIPE)
    (root / "card.yaml").write_text(
        f"name: made\nroot: {root}\ntrain: [train]\neval: [near]\nimage_size: {SIZE}\n"
        "attributes:\n  gender: [female, male]\n  race: [Asian, Black, White]\n"
    )
    return root
