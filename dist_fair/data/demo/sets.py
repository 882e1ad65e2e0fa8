"""What is in each demo set: who is shown how often, filmed by what, forged how.

The training set carries two faults of real ones. Its groups are as unequal as those of FaceForensics++, and how often
a group's videos are fake depends on the group, so the group is a shortcut to the label. Evaluation sets hold every
group in numbers that allow a rate to be estimated, half of each group's videos fake.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from dist_fair import keyed
from dist_fair.data.demo.manipulations import SEEN, SWAPS, UNSEEN
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
    ("female", "Asian"): 0.66, ("female", "Black"): 0.66, ("female", "White"): 0.48,
    ("male", "Asian"): 0.35, ("male", "Black"): 0.66, ("male", "White"): 0.42,
}  # fmt: skip


@dataclass(frozen=True)
class DemoSet:
    """One folder. videos: how many, at scale 1; shares, fakes: per group; families: in turns; cameras: odds."""

    name: str
    videos: int
    shares: Mapping[Group, float]
    fakes: Mapping[Group, float]
    families: tuple[str, ...]
    cameras: Mapping[str, float]


@dataclass(frozen=True)
class Video:
    """One video. A fake one is a forged copy of a real one, as in FaceForensics++: same person, scene and frames.

    number: its place in the set; identity: the person, and the scene, within set and group; manipulation: None for a
    real video; donor: the identity that lends its face, or parts of it, where the manipulation needs one.
    """

    demo_set: str
    number: int
    group: Group
    identity: int
    manipulation: str | None
    donor: int
    camera: str

    @property
    def name(self) -> str:
        """Unique in the set, and readable."""
        return f"{self.number:04d}_{self.identity_name}"

    @property
    def identity_name(self) -> str:
        """Unique over all sets."""
        return f"{self.group[0]}_{self.group[1]}_{self.demo_set}_{self.identity:03d}"


def _floored(counts: Mapping[Group, float], floor: float) -> dict[Group, float]:
    total = sum(counts.values())
    shares = {group: max(counts[group] / total, floor) for group in GROUPS}
    return {group: share / sum(shares.values()) for group, share in shares.items()}


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

_ALL = (
    DemoSet("train", 600, _TRAINING, TRAINING_FAKES, SEEN, _HOME),
    DemoSet("in_domain", 160, _MILD, _HALF, SEEN, _HOME),
    # Stands for DFDC: methods nobody trained on.
    DemoSet("shift_unseen", 160, _MILD, _HALF, UNSEEN, _HOME),
    # Stands for Celeb-DF: the same methods after other, stronger compression.
    DemoSet("shift_compression", 160, _MILD, _HALF, SEEN, {"broadcast": 0.6, "messenger": 0.4}),
    # Stands for DFD: other people before other cameras, and swaps only, the whole face or a part.
    DemoSet("shift_demographics", 160, _OTHER, _HALF, SWAPS, {"night": 0.5, "cinema": 0.2, "denoiser": 0.3}),
)
SETS: dict[str, DemoSet] = {demo_set.name: demo_set for demo_set in _ALL}


def videos(demo_set: DemoSet, seed: int, scale: float) -> list[Video]:
    """The videos of a set, shuffled. Every group has at least two real ones and a fake one."""
    found = []
    for group, count in _counts(demo_set.shares, demo_set.videos * scale).items():
        fakes = min(max(1, round(demo_set.fakes[group] * count)), count - 2)
        identities = count - fakes
        cameras = [_camera(demo_set, group, identity, seed) for identity in range(identities)]
        found += [(group, identity, None, identity, cameras[identity]) for identity in range(identities)]
        for place in range(fakes):
            random = keyed.generator(seed, "demo", demo_set.name, *group, place, "forger")
            identity = place % identities
            donor = (identity + 1 + int(random.integers(identities - 1))) % identities
            # Families take turns, shifted from group to group and round to round, so that small sets hold them all.
            turn = place + place // identities + GROUPS.index(group)
            family = demo_set.families[turn % len(demo_set.families)]
            found.append((group, identity, family, donor, cameras[identity]))
    order = keyed.permutation(len(found), seed, "demo", demo_set.name, "order")
    return [Video(demo_set.name, number, *found[place]) for number, place in enumerate(order)]


def _counts(shares: Mapping[Group, float], videos: float) -> dict[Group, int]:
    """Videos per group, by largest remainder; at least three."""
    exact = {group: shares[group] * round(videos) for group in GROUPS}
    counts = {group: int(value) for group, value in exact.items()}
    for group in sorted(GROUPS, key=lambda group: counts[group] - exact[group])[: round(videos) - sum(counts.values())]:
        counts[group] += 1
    return {group: max(3, count) for group, count in counts.items()}


def _camera(demo_set: DemoSet, group: Group, identity: int, seed: int) -> str:
    random = keyed.generator(seed, "demo", demo_set.name, *group, identity, "camera")
    edges = np.cumsum(list(demo_set.cameras.values()))
    return list(demo_set.cameras)[int(np.searchsorted(edges[:-1], random.random() * edges[-1], side="right"))]
