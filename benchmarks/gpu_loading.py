"""The section of benchmarks/gpu.py that trains from files: the program from its shards, timm's loader from a folder."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import timm
import timm.data
import timm.optim
import torch
from gpu_ways import OPTIMIZER, VALUES, Scale, timed, trained, wait
from torch.nn import functional

from dist_fair import shards, train
from dist_fair.data.writing import SHARD_NAME, Sample, write_shard
from dist_fair.engine.run_folder import RunFolder

SIDE, QUALITY, PER_SHARD = 256, 92, 256


def loader(scale: Scale, tell) -> None:
    """A whole training over its step alone, and over timm's loader with its usual loop."""
    role, (card, name, pixels) = next(iter(scale.models.items()))
    place = f"{role}, {pixels} px, batch {scale.batch}, {scale.precision}, {scale.workers} workers"
    with tempfile.TemporaryDirectory() as folder:
        root, began = Path(folder), time.perf_counter()
        kilobytes = draw(root, scale)
        tell("note", f"{scale.images:,} images of {SIDE} px, {kilobytes:.0f} kB each, made in "
                     f"{time.perf_counter() - began:.0f} s")  # fmt: skip
        window = trained(("recipe=erm", f"detector={card}", f"train.precision={scale.precision}"), pixels, scale.batch)
        window(scale.warmup)
        alone, whole, waits, folders = [], [], [], []
        for _ in range(2):  # in turns
            alone.append(np.median([timed(window, scale) for _ in range(scale.rounds)]))
            seconds, waited = training(root, f"detector={card}", pixels, scale)
            whole.append(seconds)
            waits.append(waited)
            folders.append(timm_training(root / "images", name, pixels, scale))
    for way, found in (
        ("step alone", alone),
        ("dist_fair train, from shards", whole),
        ("timm's loader and loop", folders),
    ):
        each = f"{scale.batch / np.mean(found):,.0f} images/s"
        tell("way", place, way, f"{np.mean(found) * 1e3:,.2f}", each, "-", "-")
    pace = np.mean(np.array(alone) / whole)
    tell("row", f"whole training from shards over the step alone, pace, {place}", ">= 0.97", f"{pace:.3f}")
    tell("row", f"data_wait of it, {place}", "<= 0.01", f"{np.mean(waits):.4f}")
    pace = np.mean(np.array(folders) / whole)
    tell("row", f"images/s over timm's loader and its usual loop (no train.py is in timm's wheel), {place}", ">= 1.0",
         f"{pace:.3f}")  # fmt: skip


# Files ----------------------------------------------------------------------------------------------------------------


def draw(root: Path, scale: Scale) -> float:
    """The same JPEGs in ROOT/shards and, one by one, in ROOT/images/CLASS; the mean size in kB."""
    for name in ("shards", "images/real", "images/fake"):
        (root / name).mkdir(parents=True)
    jobs = [(root, number, range(first, min(first + PER_SHARD, scale.images)))
            for number, first in enumerate(range(0, scale.images, PER_SHARD))]  # fmt: skip
    with ThreadPoolExecutor(scale.workers) as pool:  # drawing and encoding leave Python's lock
        list(pool.map(_write, *zip(*jobs, strict=True)))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        assert shards.main(["index", str(root / "shards"), "--workers", "1"]) == 0
    return np.mean([path.stat().st_size for path in (root / "images").rglob("*.jpg")]) / 1e3


def _write(root: Path, number: int, keys: range) -> None:
    samples = []
    for key in keys:
        random = np.random.default_rng(key)
        label, data = key % 2, cv2.imencode(".jpg", face(random), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        attributes = {name: str(random.choice(values)) for name, values in VALUES.items()}
        samples.append(
            Sample(f"{key:06d}", data, "jpg", {"label": label, "video": f"v{key // 8}", "attributes": attributes})
        )
        (root / "images" / ("real", "fake")[label] / f"{key:06d}.jpg").write_bytes(data)
    write_shard(root / "shards" / SHARD_NAME.format(number), samples)


def face(random: np.random.Generator) -> np.ndarray:
    """Structure from coarse to fine and a camera's noise, so that a JPEG of it is as large as that of a face crop."""
    image = np.zeros((SIDE, SIDE, 3), np.float32)
    for cells, strength in ((4, 60), (16, 25), (64, 10)):
        coarse = random.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    image += random.normal(0, 3, image.shape).astype(np.float32)
    cv2.ellipse(image, (SIDE // 2, SIDE // 2), (80, 110), 0, 0, 360, (90, 60, 40), 3)
    return (image + 127).clip(0, 255).astype(np.uint8)


# Trainings ------------------------------------------------------------------------------------------------------------


def training(root: Path, detector: str, pixels: int, scale: Scale) -> tuple[float, float]:
    """`dist-fair train`: seconds a step and data_wait, means over the second half of its steps."""
    attributes = "{" + ", ".join(f"{name}: [{', '.join(values)}]" for name, values in VALUES.items()) + "}"
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        arguments = ["recipe=erm", detector, *OPTIMIZER, "detector.pretrained=false",
                     f"train.precision={scale.precision}",
                     f"data.root={root}", "data.name=made", "data.train=[shards]", "data.eval=[]",
                     f"data.attributes={attributes}", f"data.image_size={pixels}", f"data.workers={scale.workers}",
                     f"train.batch_size={scale.batch}", f"train.steps={scale.whole}", "checkpoint.every=100000",
                     "evaluation.at_end=false", "wandb.mode=disabled", f"out={out}/run"]  # fmt: skip
        assert train.main(arguments) == 0
        lines = RunFolder(Path(out) / "run").metrics.read_text().splitlines()
    warm = [json.loads(line) for line in lines[scale.whole // 2 :]]
    return tuple(float(np.mean([values[key] for values in warm])) for key in ("seconds", "data_wait"))


def timm_training(folder: Path, name: str, pixels: int, scale: Scale) -> float:
    """timm's loader with its prefetcher, its optimizer and the loop of its train script; seconds a step."""
    device = torch.device(scale.device)
    images = timm.data.create_loader(
        timm.data.ImageDataset(str(folder)), (3, pixels, pixels), scale.batch, is_training=True, no_aug=True,
        mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=scale.workers, device=device, pin_memory=device.type == "cuda",
        use_prefetcher=device.type == "cuda", use_multi_epochs_loader=True,
    )  # fmt: skip
    model = timm.create_model(name, num_classes=2).to(device, memory_format=torch.channels_last).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.01)
    seconds, began = [], 0.0
    for number, (batch, labels) in enumerate(_again_and_again(images, scale.whole)):
        if number == scale.whole // 2:
            wait(scale.device)
            began = time.perf_counter()
        batch = batch.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=scale.precision == "bf16"):
            loss = functional.cross_entropy(model(batch), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wait(scale.device)
    seconds = time.perf_counter() - began
    return seconds / (scale.whole - scale.whole // 2)


def _again_and_again(loader, steps: int) -> Iterator:
    done = 0
    while done < steps:
        for item in loader:
            yield item
            done += 1
            if done == steps:
                return
