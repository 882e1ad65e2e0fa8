"""Small evaluated runs, made up: predictions with any attributes and holes, judged, and written as run folders."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dist_fair.engine.run_folder import RunFolder
from dist_fair.metrics import Predictions, evaluate
from dist_fair.reporting.judged import Judged

SIX = {"gender": ["female", "male"], "race": ["Asian", "Black", "White"]}


def judged(
    attributes: Mapping[str, Sequence[str]] = SIX,
    without: Sequence[tuple[str, int]] = (),
    count: int = 150,
    model: int = 0,
    seed: int = 0,
) -> Judged:
    """One dataset as one run judged it; runs of another `model` have other scores of the same samples.

    without: (group, label) pairs that the dataset has no samples of.
    """
    data, scores = np.random.default_rng(seed), np.random.default_rng(1000 + model)
    label = data.integers(2, size=count)
    columns = {name: data.choice(values, count) for name, values in attributes.items()}
    groups = ["/".join(values) for values in zip(*columns.values(), strict=True)] or [""] * count
    logit = 2 * label - 1 + scores.normal(0, 1.5, count)
    kept = np.array([(group, fake) not in without for group, fake in zip(groups, label, strict=True)])
    predictions = Predictions(
        sample_id=[f"{row:04d}" for row in np.flatnonzero(kept)],
        video=[f"v{row}" for row in np.flatnonzero(kept)],
        label=label[kept],
        score=np.round(1 / (1 + np.exp(-logit[kept])), 2),
        attributes={name: values[kept] for name, values in columns.items()},
    )
    return Judged(evaluate(predictions, attributes, bootstrap=0, seed=0), predictions)


def run_folder(folder: Path, **datasets: Judged) -> Path:
    """What an evaluation leaves behind."""
    run = RunFolder(folder)
    source = {"checkpoint": "step-00000004", "recipe": "0123456789ab", "unreadable": 0}
    for name, one in datasets.items():
        one.predictions.write(run.predictions(name))
    run.evaluation.write_text(json.dumps({name: source | one.report for name, one in datasets.items()}))
    return folder
