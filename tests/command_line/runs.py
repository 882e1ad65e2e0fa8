"""Runs of the program as a person starts them, on a small data set that the tests draw themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as parquet
from safetensors.torch import load_file

from dist_fair import shards
from dist_fair.data.writing import Sample, write_shards
from tests.command_line.several import Start, together

GENDERS, RACES = ("female", "male"), ("Asian", "Black", "White")
SIZE = 32
TOLERANCE = 1e-5  # relative, fp32, DESIGN 8.3
# Small enough for four ranks on two cores; three scoring batches and one rank more or less split unevenly.
QUICK = [
    "train.steps=32", "train.batch_size=32", "data.window=8", "data.image_size=64", "optimizer.lr=5e-4",
    "checkpoint.every=10",
    "interventions.channel_decoupling.batch_size=50", "interventions.channel_decoupling.batches=2",
    "interventions.distribution_alignment.grid=32", "interventions.distribution_alignment.weight=0.1",
    "evaluation.bootstrap=5", "evaluation.batch_size=24", "evaluation.figures=false", "wandb.mode=disabled",
    "detector.arguments={layers: [1, 1, 1, 1], channels: [16, 32, 64, 128]}",
]  # fmt: skip

QUICK_WITHOUT_METHODS = [one for one in QUICK if not one.startswith("interventions.")]


def draw(folder: Path, count: int, seed: int, per_shard: int = 40) -> None:
    """A folder of shards of coloured noise; fakes have a checkerboard in the middle, fainter in some groups."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        group, label = int(random.integers(6)), int(random.random() < 0.6)
        image = random.normal(90 + 20 * group, 30, (SIZE, SIZE, 3))
        image = cv2.GaussianBlur(image, (3, 3), 0)
        if label:
            image[8:24, 8:24] += (4 + 3 * group) * (np.indices((16, 16)).sum(0) % 2 * 2 - 1)[..., None]
        data = cv2.imencode(".png", image.clip(0, 255).astype(np.uint8))[1].tobytes()
        attributes = {"gender": GENDERS[group // 3], "race": RACES[group % 3]}
        metadata = {"label": label, "video": f"v{number // 4}_{label}", "attributes": attributes}
        metadata |= {"manipulation": ("blend", "swap")[number % 2]} if label else {}
        samples.append(Sample(f"{seed}_{number:04d}", data, "png", metadata))
    write_shards(samples, folder, per_shard)
    assert shards.main(["index", str(folder), "--workers", "1"]) == 0


def card(root: Path) -> Path:
    """A data set of one training and two test folders under `root`, and its card."""
    draw(root / "train", 150, seed=1)
    draw(root / "near", 53, seed=2)
    draw(root / "far", 30, seed=3, per_shard=100)
    path = root / "card.yaml"
    path.write_text(
        f"name: drawn\nroot: {root}\ntrain: [train]\neval: [near, far]\nimage_size: {SIZE}\n"
        "attributes:\n  gender: [female, male]\n  race: [Asian, Black, White]\n"
    )
    return path


def launch(ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess:
    """torchrun with `ranks` ranks of one thread each, on the CPU; any free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return call(*command, "-m", module, *arguments)


def on_ranks(worlds: tuple[int, ...], arguments: list[str], folder: Path) -> Path:
    """The same run on each number of ranks, into FOLDER/W."""
    for world in worlds:
        together(world, [Start(folder / str(world), arguments)])
    return folder


def call(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command, its output as text; one thread, no GPU."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(command, capture_output=True, text=True, env=kept | settings | environment, timeout=300)


def succeed(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """The finished process, or a failure with what it said."""
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def metrics(run: Path, steps: range | None = None) -> list[dict]:
    """The lines of metrics.jsonl, or of these steps alone, of which none may lack."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if steps is None:
        return lines
    chosen = [line for line in lines if line["step"] in steps]
    assert [line["step"] for line in chosen] == list(steps), f"{run} has steps {[line['step'] for line in lines]}"
    return chosen


def losses(run: Path, key: str = "loss", steps: range | None = None) -> np.ndarray:
    """One number a step; not-a-number where a term was not active."""
    return np.array([np.nan if line[key] is None else line[key] for line in metrics(run, steps)])


def final_model(run: Path) -> dict:
    """The tensors of the newest checkpoint."""
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def difference(one: Path, other: Path, steps: range | None = None) -> float:
    """Largest difference of the losses of two runs, relative to the loss; infinite where they cannot be compared."""
    worst = 0.0
    for key in (key for key in metrics(one)[0] if key.startswith("loss")):
        left, right = losses(one, key, steps), losses(other, key, steps)
        if left.shape != right.shape or not np.array_equal(np.isnan(left), np.isnan(right)):
            return np.inf
        worst = max(worst, float(np.nanmax(np.abs(left - right) / losses(one, "loss", steps))))
    return worst


def norm_difference(one: Path, other: Path, steps: range | None = None) -> float:
    """Largest difference of the gradient norms of two runs, relative to those of the first."""
    left, right = losses(one, "gradient_norm", steps), losses(other, "gradient_norm", steps)
    return float((np.abs(left - right) / left).max())


def predictions(run: Path, name: str) -> dict:
    """The columns of a predictions file."""
    return parquet.read_table(run / "predictions" / f"{name}.parquet").to_pydict()
