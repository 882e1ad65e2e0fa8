"""Who is drawn: the lasting features of one invented person.

Every number is drawn from a distribution that overlaps widely between the groups; gender and race only move means
and odds (skin and hair colour, curl, haircuts, a little geometry). Nobody is copied: there is no photograph anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_fair import keyed

GENDERS = ("female", "male")
RACES = ("Asian", "Black", "White")

# Skin tones from light to dark, sRGB; a person's tone is a position on this scale, in colour space close to a line.
TONES = np.array([(244, 211, 192), (233, 188, 158), (212, 162, 126), (176, 124, 90), (128, 84, 60), (84, 55, 42)]) / 255
TONE_RANGE = {"Asian": (0.5, 2.3), "Black": (3.0, 4.9), "White": (0.0, 1.5)}

HAIR = {
    "black": (26, 23, 24),
    "dark brown": (52, 36, 28),
    "brown": (92, 62, 42),
    "light brown": (134, 98, 66),
    "blond": (196, 160, 104),
    "red": (138, 66, 36),
    "grey": (150, 148, 146),
}
HAIR_ODDS = {
    "Asian": (0.62, 0.22, 0.07, 0.02, 0.01, 0.01, 0.05),
    "Black": (0.68, 0.20, 0.04, 0.01, 0.01, 0.0, 0.06),
    "White": (0.10, 0.22, 0.22, 0.15, 0.16, 0.06, 0.09),
}
EYES = {
    "dark": (46, 28, 20),
    "brown": (88, 54, 32),
    "hazel": (112, 92, 54),
    "green": (92, 118, 92),
    "blue": (92, 128, 164),
}
EYE_ODDS = {
    "Asian": (0.62, 0.34, 0.04, 0.0, 0.0),
    "Black": (0.60, 0.34, 0.06, 0.0, 0.0),
    "White": (0.10, 0.30, 0.17, 0.14, 0.29),
}
# Mean curl of the hair, 0 straight to 1 coily.
CURL = {"Asian": 0.08, "Black": 0.85, "White": 0.25}
HAIRCUT_ODDS = {
    "female": {"long": 0.38, "bob": 0.24, "tied": 0.20, "round": 0.12, "short": 0.06},
    "male": {"short": 0.52, "crop": 0.24, "bald": 0.08, "round": 0.09, "bob": 0.04, "long": 0.03},
}


@dataclass(frozen=True)
class Expression:
    """What a face does in one frame; 0 is rest. smile, mouth_open, brows, lids: about -1..1; gaze: per eye size."""

    smile: float = 0.0
    mouth_open: float = 0.0
    brows: float = 0.0
    lids: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0


@dataclass(frozen=True)
class Person:
    """The lasting features of one person.

    key makes every texture of this person (pores, freckles, strands) the same in all frames. Colours are sRGB in
    0..1, (3,). Lengths are in head units: the chin lies 0.95 below the centre of the head, the crown 0.95 above.
    """

    key: tuple
    gender: str
    race: str
    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    lips: np.ndarray
    haircut: str
    curl: float
    volume: float
    hairline: float
    fringe: float
    part: float
    width: float
    jaw: float
    chin: float
    cheeks: float
    eye_distance: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    crease: float
    brow_height: float
    brow_weight: float
    brow_arch: float
    nose_width: float
    nose_length: float
    nose_bridge: float
    mouth_width: float
    mouth_height: float
    lip_upper: float
    lip_lower: float
    ears: float
    age: float
    freckles: float
    oiliness: float
    makeup: float
    beard: float
    moustache: float
    glasses: bool


class _Draws:
    """One person's random numbers. The order in which they are asked for is part of who is drawn."""

    def __init__(self, random: np.random.Generator):
        self.random = random

    def about(self, mean: float, deviation: float) -> float:
        """A normal number, cut at 2.2 deviations."""
        return float(mean + deviation * np.clip(self.random.standard_normal(), -2.2, 2.2))

    def one_of(self, odds: Sequence[float]) -> int:
        """A place, as often as its odds say."""
        return int(np.searchsorted(np.cumsum(odds)[:-1], self.random.random() * sum(odds), side="right"))

    def varied(self, colour: Sequence[float]) -> np.ndarray:
        """A colour, lighter or darker."""
        return np.array(colour) / 255 * np.exp(0.12 * self.random.standard_normal())


def invent(gender: str, race: str, *key: keyed.Part) -> Person:
    """The person of a key: the same arguments always give the same person."""
    draws = _Draws(keyed.generator(*key, "person"))
    random, male = draws.random, gender == "male"
    skin = _skin(draws, race)
    age = float(random.beta(1.4, 2.2))
    hair_odds = np.array(HAIR_ODDS[race])
    hair_odds[-1] *= 0.2 + 4 * age**2
    hair = draws.varied(list(HAIR.values())[draws.one_of(hair_odds)])
    iris = draws.varied(list(EYES.values())[draws.one_of(EYE_ODDS[race])])
    makeup = 0.0 if male else float(random.beta(1.2, 1.6))
    red = np.array((0.62, 0.16, 0.20)) * (0.45 + 0.55 * skin.mean())
    lips = skin * (0.86, 0.60, 0.60)
    lips = lips + (0.12 + 0.5 * makeup * random.random()) * (red - lips)
    curl = float(np.clip(draws.about(CURL[race], 0.17), 0, 1))
    haircut = _haircut(draws, gender, curl, age)
    bearded = male and random.random() < 0.42
    return Person(
        key=key,
        gender=gender,
        race=race,
        skin=skin.astype(np.float32),
        hair=np.clip(hair, 0.05, 0.9).astype(np.float32),
        iris=np.clip(iris, 0.05, 0.9).astype(np.float32),
        lips=lips.astype(np.float32),
        haircut=haircut,
        curl=curl,
        **_hairline(draws, male, curl, age),
        **_face(draws, male, race),
        age=age,
        freckles=float(random.random() < 0.25) * random.random() * (1.0 if race == "White" else 0.4),
        oiliness=float(random.uniform(0.3, 1.0)),
        makeup=makeup,
        beard=float(random.beta(1.2, 1.2)) if bearded else 0.0,
        moustache=float(random.random()) if bearded else 0.0,
        glasses=bool(random.random() < 0.14),
    )


def _skin(draws: _Draws, race: str) -> np.ndarray:
    tone = draws.random.uniform(*TONE_RANGE[race])
    low = min(int(tone), len(TONES) - 2)
    skin = TONES[low] + (tone - low) * (TONES[low + 1] - TONES[low])
    return np.clip(skin * (1 + 0.03 * draws.random.standard_normal(3)), 0.1, 0.98)


def _haircut(draws: _Draws, gender: str, curl: float, age: float) -> str:
    odds = dict(HAIRCUT_ODDS[gender])
    odds["round"] *= 0.2 + 3 * curl
    if gender == "male":
        odds["bald"] *= 0.4 + 2.5 * age
    return list(odds)[draws.one_of(list(odds.values()))]


def _hairline(draws: _Draws, male: bool, curl: float, age: float) -> dict[str, float]:
    """Where the hair begins and how it lies."""
    about, random = draws.about, draws.random
    return {
        "volume": about(0.10, 0.03) + 0.05 * curl,
        "hairline": about(-0.55 - 0.03 * (not male), 0.05) - (0.1 * age if male else 0),
        "fringe": float(random.random()) if not male or random.random() < 0.3 else 0.0,
        "part": about(0, 0.22),
    }


def _face(draws: _Draws, male: bool, race: str) -> dict[str, float]:
    """The geometry of the face."""
    about, asian, black = draws.about, race == "Asian", race == "Black"
    return {
        "width": about(0.675 + 0.02 * male, 0.03),
        "jaw": about(2.45 + 0.5 * male, 0.3),
        "chin": about(0.95 + 0.02 * male, 0.025),
        "cheeks": about(0.05, 0.015),
        "eye_distance": about(0.285, 0.014),
        "eye_width": about(0.135, 0.010),
        "eye_height": about(0.075 - 0.002 * asian + 0.004 * (not male), 0.006),
        "eye_tilt": about(0.04 + 0.02 * asian, 0.04),
        "crease": float(np.clip(about(0.75 - 0.35 * asian, 0.2), 0.1, 1)),
        "brow_height": about(0.190 - 0.015 * male, 0.018),
        "brow_weight": about(0.030 + 0.010 * male, 0.006),
        "brow_arch": about(0.030 - 0.012 * male, 0.012),
        "nose_width": about(0.116 + 0.022 * black + 0.006 * asian + 0.008 * male, 0.013),
        "nose_length": about(0.335, 0.025),
        "nose_bridge": about(0.115 - 0.02 * asian - 0.015 * black + 0.01 * male, 0.018),
        "mouth_width": about(0.225 + 0.01 * male, 0.018),
        "mouth_height": about(0.575, 0.018),
        "lip_upper": about(0.040 + 0.014 * black - 0.004 * male, 0.008),
        "lip_lower": about(0.058 + 0.016 * black - 0.004 * male, 0.009),
        "ears": about(1.0, 0.1),
    }
