"""Made-up predictions with groups of very different sizes and scores, ties, and unknown attributes."""

import numpy as np

from dist_fair.metrics import Predictions

VOCABULARY = {"gender": ["female", "male"], "race": ["Asian", "Black", "White"]}


def make(videos: int = 80, frames: int = 3, seed: int = 0, decimals: int = 2, unknown: float = 0.1) -> Predictions:
    """`videos` videos of `frames` frames; scores rounded to `decimals`, so that many tie."""
    random = np.random.default_rng(seed)
    label = random.integers(2, size=videos)
    gender = random.choice(VOCABULARY["gender"], videos)
    race = random.choice(VOCABULARY["race"], videos, p=[0.2, 0.3, 0.5])
    gender[random.random(videos) < unknown] = "other"
    of_frame = np.repeat(np.arange(videos), frames)
    logit = (2 * label - 1 + 0.8 * (race == "Asian"))[of_frame] + random.normal(0, 1.2, len(of_frame))
    names = np.array([f"{'fake' if fake else 'real'}/{video:03d}" for video, fake in enumerate(label)])
    return Predictions(
        sample_id=[f"{index:05d}" for index in range(len(of_frame))],
        video=names[of_frame],
        label=label[of_frame],
        score=np.round(1 / (1 + np.exp(-logit)), decimals),
        attributes={
            "gender": np.where(gender == "other", "unknown", gender.astype("U8"))[of_frame],
            "race": race[of_frame],
        },
    )


def take(predictions: Predictions, rows: np.ndarray, video: np.ndarray | None = None) -> Predictions:
    """The given rows, in that order; a row taken again gets an id of its own, and its video the name in `video`."""
    return Predictions(
        sample_id=[
            f"{predictions.sample_id[row]}-{place if video is not None else 0}" for place, row in enumerate(rows)
        ],
        video=predictions.video[rows] if video is None else video,
        label=predictions.label[rows],
        score=predictions.score[rows],
        attributes={name: values[rows] for name, values in predictions.attributes.items()},
    )
