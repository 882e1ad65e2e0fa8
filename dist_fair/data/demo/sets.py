"""What is in each demo set: who is shown how often, filmed by what, forged how.

The training set carries two faults of real ones. Its groups are as unequal as those of FaceForensics++, and how often
a group's videos are fake depends on the group, so the group is a shortcut to the label. Evaluation sets hold every
group in numbers that allow a rate to be estimated, half of each group's videos fake.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from dist_fair import keyed
from dist_fair.data.demo.manipulations import SEEN, UNSEEN
from dist_fair.data.demo.person import GENDERS, RACES

Group = tuple[str, str]
GROUPS: tuple[Group, ...] = tuple(product(GENDERS, RACES))
FRAMES = 5

# Images per group of FaceForensics++ as annotated by the authors of PG-FDD, without the value "others".
FFPP_COUNTS = {
    ("male", "Asian"): 2475, ("male", "White"): 25443, ("male", "Black"): 1468,
    ("female", "Asian"): 8013, ("female", "White"): 31281, ("female", "Black"): 1111,
}  # fmt: skip
# No group of the training set is smaller than this share: at the demo's size some would be two videos.
SMALLEST_SHARE = 0.04
# The shortcut: the share of each group's training videos that is fake.
TRAINING_FAKES = {
    ("female", "Asian"): 0.72, ("female", "Black"): 0.70, ("female", "White"): 0.48,
    ("male", "Asian"): 0.35, ("male", "Black"): 0.72, ("male", "White"): 0.42,
}  # fmt: skip


@dataclass(frozen=True)
class DemoSet:
    """One folder. videos: how many, at scale 1; shares, fakes: per group; families, cameras: name -> odds."""

    name: str
    videos: int
    shares: Mapping[Group, float]
    fakes: Mapping[Group, float]
    families: Mapping[str, float]
    cameras: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Video:
    """One video: whose it is and what happens to it. manipulation is None for a real one, donor too where none is needed."""

    demo_set: str
    number: int
    group: Group
    identity: int
    manipulation: str | None
    donor: int
    camera: str

    @property
    def name(self) -> str:
        return f"{self.number:04d}_{self.identity_name}"

    @property
    def identity_name(self) -> str:
        return f"{self.group[0]}_{self.group[1]}_{self.demo_set}_{self.identity:03d}"


def _floored(counts: Mapping[Group, float], floor: float) -> dict[Group, float]:
    total = sum(counts.values())
    shares = {group: max(counts[group] / total, floor) for group in GROUPS}
    return {group: share / sum(shares.values()) for group, share in shares.items()}


_EVEN = dict.fromkeys(GROUPS, 1 / len(GROUPS))
_HALF = dict.fromkeys(GROUPS, 0.5)
_TRAINING = _floored(FFPP_COUNTS, SMALLEST_SHARE)
_MILD = {group: (_TRAINING[group] + 2 / len(GROUPS)) / 3 for group in GROUPS}
_OTHER = _floored(
    {
        ("female", "Asian"): 12, ("female", "Black"): 26, ("female", "White"): 10,
        ("male", "Asian"): 16, ("male", "Black"): 24, ("male", "White"): 12,
    },
    0,
)  # fmt: skip
_HOME = {"studio": 0.4, "phone": 0.3, "webcam": 0.2, "denoiser": 0.1}
_SEEN = dict.fromkeys(SEEN, 1.0)

_ALL = (
    DemoSet("train", 600, _TRAINING, TRAINING_FAKES, _SEEN, _HOME),
    DemoSet("in_domain", 160, _MILD, _HALF, _SEEN, _HOME),
    # Stands for DFDC: methods nobody trained on.
    DemoSet("shift_unseen", 160, _MILD, _HALF, dict.fromkeys(UNSEEN, 1.0), _HOME),
    # Stands for Celeb-DF: the same methods after other, stronger compression.
    DemoSet("shift_compression", 160, _MILD, _HALF, _SEEN, {"broadcast": 0.6, "messenger": 0.4}),
    # Stands for DFD: other people before other cameras.
    DemoSet("shift_demographics", 160, _OTHER, _HALF, _SEEN, {"night": 0.4, "cinema": 0.4, "denoiser": 0.2}),
)
SETS: dict[str, DemoSet] = {demo_set.name: demo_set for demo_set in _ALL}


def videos(demo_set: DemoSet, seed: int, scale: float) -> list[Video]:
    """The videos of a set, shuffled. Every group has at least two, one real and one fake."""
    found = []
    for group in GROUPS:
        count = max(2, round(demo_set.shares[group] * demo_set.videos * scale))
        fakes = min(max(1, round(demo_set.fakes[group] * count)), count - 1)
        identities = max(2, (count + 1) // 2)
        for place in range(count):
            random = keyed.generator(seed, "demo", demo_set.name, *group, place, "plan")
            fake = place < fakes
            identity = (place if fake else place - fakes) % identities
            donor = (identity + 1 + int(random.integers(identities - 1))) % identities
            # Families take turns, so that small sets hold them all.
            family = _in_turn(demo_set.families, place) if fake else None
            found.append((group, identity, family, donor, _one_of(demo_set.cameras, random)))
    order = keyed.permutation(len(found), seed, "demo", demo_set.name, "order")
    return [
        Video(demo_set.name, number, group, identity, family, donor, camera)
        for number, (group, identity, family, donor, camera) in enumerate(found[place] for place in order)
    ]


def _in_turn(odds: Mapping[str, float], place: int) -> str:
    return list(odds)[place % len(odds)]


def _one_of(odds: Mapping[str, float], random: np.random.Generator) -> str:
    edges = np.cumsum(list(odds.values()))
    return list(odds)[int(np.searchsorted(edges[:-1], random.random() * edges[-1], side="right"))]
