"""Predictions of four models made so that the answer is known: binormal scores, several frames a video.

A frame's score is d y + noise of variance 1, so that its AUC is Phi(d / sqrt 2) in every cell; half of the noise is
the video's and, over both halves, `shared` of it is the same for all models, as it is when they look at one face.
"""

import numpy as np

from dist_fair.metrics import Predictions
from dist_fair.studies.ace import average_causal_effect
from dist_fair.studies.ace_bootstrap import Draws

GROUPS = ("gender", "race")
RACES = ("Asian", "Black", "White")
STRATA = [(gender, race) for gender in ("female", "male") for race in RACES]
MODELS = [(mc, f) for mc in ("low", "high") for f in (0, 1)]
VIDEOS = (40, 25, 60, 20, 30, 50)  # of each label, by stratum
FRAMES = 4
SEPARATION = {model: np.linspace(0.6, 1.6, len(STRATA)) + 0.3 * place for place, model in enumerate(MODELS)}


def true_effect() -> tuple[float, float]:
    """ACE and mu_0."""
    from scipy.stats import norm

    share = np.array(VIDEOS) / sum(VIDEOS) / 2
    mean = {model: (norm.cdf(d / np.sqrt(2)) * share).sum() for model, d in SEPARATION.items()}
    mu = [sum(mean[mc, f] for mc in ("low", "high")) for f in (0, 1)]
    return mu[1] - mu[0], mu[0]


def draw(seed: int, shared: float = 0.7) -> dict[tuple[str, int], Predictions]:
    """A held-out set, and what every model says of it."""
    random = np.random.default_rng(seed)
    stratum = np.repeat(np.arange(len(STRATA)), 2 * np.array(VIDEOS))
    label = np.concatenate([np.repeat((0, 1), n) for n in VIDEOS])
    of_frame = np.repeat(np.arange(len(label)), FRAMES)

    def noise() -> np.ndarray:
        return np.sqrt(0.5) * (random.normal(size=len(label))[of_frame] + random.normal(size=len(of_frame)))

    common = noise()
    scores = {
        model: (d[stratum] * label)[of_frame] + np.sqrt(shared) * common + np.sqrt(1 - shared) * noise()
        for model, d in SEPARATION.items()
    }
    names = np.array([f"{'fake' if fake else 'real'}/{video:04d}" for video, fake in enumerate(label)])
    columns = {
        "video": names[of_frame],
        "label": label[of_frame],
        "attributes": {
            "gender": np.array([gender for gender, _ in STRATA])[stratum][of_frame],
            "race": np.array([race for _, race in STRATA])[stratum][of_frame],
        },
    }
    ids = [f"{row:05d}" for row in range(len(of_frame))]
    return {model: Predictions(ids, score=score - 0.5, **columns) for model, score in scores.items()}


def messy(seed: int = 0, rare: int = 0) -> dict[tuple[str, int], Predictions]:
    """Few and uneven samples with ties, unknown groups, a stratum without fakes, attributes that differ in a video.

    rare: so many videos of each label have one frame of a race that is nowhere else: draws of videos may miss it.
    """
    random = np.random.default_rng(seed)
    videos = 60
    label = random.integers(2, size=videos)
    frames = np.repeat(np.arange(videos), random.integers(1, 6, size=videos))
    gender = random.choice(["female", "male", "unknown"], videos, p=[0.5, 0.4, 0.1])
    race = random.choice(RACES, videos, p=[0.3, 0.2, 0.5]).astype("U8")[frames]
    race[random.random(len(frames)) < 0.1] = "White"
    label[(gender == "male") & (race[np.searchsorted(frames, np.arange(videos))] == "Black")] = 0
    race[(gender[frames] == "male") & (label[frames] == 1) & (race == "Black")] = "White"
    for fake in (0, 1):
        several = (label == fake) & (gender == "female") & (np.bincount(frames) > 2)
        race[np.searchsorted(frames, np.flatnonzero(several)[:rare])] = "Rare"
    columns = {
        "video": np.array([f"{'fake' if fake else 'real'}/{video}" for video, fake in enumerate(label)])[frames],
        "label": label[frames],
        "attributes": {"gender": gender[frames], "race": race},
    }
    ids = [f"{row:04d}" for row in range(len(frames))]
    return {
        model: Predictions(
            ids, score=np.round(random.normal(label[frames] * (1 + model[1]), 1) / 4 + 0.3, 1), **columns
        )
        for model in MODELS
    }


def on_a_rank(comm) -> dict:
    """What one of several ranks finds, and what it would find if its b-th draw were that of its own count."""
    observed, weights = [], Draws.weights
    found = {
        "many": average_causal_effect(messy(), GROUPS, 10, comm=comm, observe=observed.append),
        "few": average_causal_effect(messy(), GROUPS, 2, comm=comm),
        "observed": len(observed),
    }
    Draws.weights = lambda self, b: weights(self, b // comm.world)
    return found | {"draws_of_the_rank": average_causal_effect(messy(), GROUPS, 10, comm=comm)}
