"""Heads: a relief of the face, skin, eyes, brows, mouth and hair, lit from one side; seen from the front.

A Portrait keeps what lasts (relief, skin, hair) and draws one expression under one light at a time.
"""

from dataclasses import dataclass

import numpy as np

from dist_fair import keyed
from dist_fair.data.demo import canvas, features
from dist_fair.data.demo.canvas import X, Y
from dist_fair.data.demo.hair import grow
from dist_fair.data.demo.person import Expression, Person


@dataclass(frozen=True)
class Light:
    """A key light from `direction` (3,) (z towards the viewer) of colour `key` (3,) over a soft light `fill` (3,)."""

    direction: np.ndarray
    key: np.ndarray
    fill: np.ndarray


@dataclass(frozen=True)
class Head:
    """A head from the front, before it is turned.

    colour (3, SIDE, SIDE): lit, gamma 2; opacity: where the head is; depth: towards the viewer, in head units.
    """

    colour: np.ndarray
    opacity: np.ndarray
    depth: np.ndarray


class Portrait:
    """One person's face, ready to be drawn with any expression and light."""

    def __init__(self, person: Person):
        self.person = person
        self.outline = _outline(person)
        self.face = canvas.shape(self.outline, blur=0.006)
        ears = [
            canvas.ellipse(sign * (person.width + 0.005), 0.08, 0.075 * person.ears, 0.17 * person.ears)
            for sign in (-1, 1)
        ]
        self.ears = canvas.shape(*ears, blur=0.006)
        self.relief = self._lasting_relief()
        self.skin = self._skin()
        self.hair = grow(person, self.outline)
        # Smooth depth, without folds, for turning the head: hair and skull are one egg, with the nose on top.
        egg = 0.62 * np.clip(1 - (X / 0.95) ** 2 - (Y / 1.3) ** 2, 0, None)
        self.depth = (egg + canvas.bumps([(0, 0.26, 0.11, 0.16, 0.13)])).astype(np.float32)

    def draw(self, expression: Expression, light: Light) -> Head:
        """The head with this expression in this light."""
        person = self.person
        eyes, mouth = features.eyes(person, expression), features.mouth(person, expression)
        relief = self.relief + canvas.bumps(eyes.bumps + mouth.bumps)
        colour = self.skin.copy()
        features.paint_brows(colour, person, expression)
        features.paint_beard(colour, person, mouth)
        features.paint_mouth(colour, person, mouth)
        self._shade(colour, relief, light, person.oiliness)
        features.paint_eyes(colour, person, eyes, light.fill + 0.55 * light.key)
        hair = self.hair.colour.copy()
        self._shade(hair, self.hair.relief + 0.5 * self.relief, light, 0.15)
        # Hair throws a soft shadow on the skin just below it.
        shadow = canvas.soften(self.hair.front, 0.05) * (1 - self.hair.front)
        colour *= 1 - 0.38 * shadow
        canvas.paint(colour, self.hair.front, hair)
        if person.glasses:
            features.paint_glasses(colour, person)
        opacity = np.maximum(np.maximum(self.face, self.ears), self.hair.front)
        return Head(np.clip(colour, 0, 1), opacity, self.depth)

    def back_hair(self, light: Light) -> tuple[np.ndarray, np.ndarray]:
        """Hair behind neck and shoulders: lit colour and mask."""
        return np.sqrt(
            np.clip(self.hair.colour**2 * canvas.planes(0.75 * light.fill + 0.22 * light.key), 0, 1)
        ), self.hair.back

    def _shade(self, colour: np.ndarray, relief: np.ndarray, light: Light, shine: float) -> None:
        """Light falls on a relief, in place: soft diffuse light that bleeds red into skin's shadows, and a sheen."""
        x, y, z = canvas.normals(relief)
        lx, ly, lz = (float(part) for part in light.direction)
        facing = x * lx + y * ly + z * lz
        shadow = canvas.cast_shadow(relief, light.direction)
        hollow = np.clip(canvas.soften(relief, 0.07) - relief, 0, 0.04) * 9
        half = (np.array([lx, ly, lz + 1]) / np.linalg.norm([lx, ly, lz + 1])).astype(np.float32)
        sheen = np.clip(x * half[0] + y * half[1] + z * half[2], 0, 1)
        sheen = sheen**2
        sheen = sheen**2
        sheen = (sheen**2) ** 2 * (1 - shadow) * 0.10 * shine
        sky = (0.72 - 0.28 * y) * (1 - hollow)
        for channel, wrap in enumerate((0.42, 0.28, 0.24)):
            diffuse = np.clip((facing + wrap) / (1 + wrap), 0, None) * (1 - (0.75 - 0.15 * (channel == 0)) * shadow)
            lit = colour[channel] ** 2 * (light.fill[channel] * sky + light.key[channel] * diffuse)
            colour[channel] = np.sqrt(lit + sheen * light.key[channel])

    def _lasting_relief(self) -> np.ndarray:
        person = self.person
        skull = 0.72 * np.sqrt(np.clip(1 - (X / 0.82) ** 2 - (Y / 1.14) ** 2, 0, None))
        rounded = canvas.soften(self.face, 0.10) * 0.30 + canvas.soften(self.face, 0.035) * 0.07
        d, w, bridge = person.eye_distance, person.nose_width, person.nose_bridge
        tip = person.nose_length - 0.04
        rows = [
            (0, 0.02, 0.055, 0.17, bridge * 0.8), (0, 0.17, 0.06, 0.13, bridge * 1.25), (0, tip, 0.07, 0.06, 0.15),
            (0, -0.86, 0.4, 0.2, -0.05), (0, 0.86, 0.13, 0.09, 0.06), (0, 0.57, 0.25, 0.13, 0.06),
            (0, 0.72, 0.14, 0.035, -0.025),
        ]  # fmt: skip
        for side in (-1, 1):
            rows += [
                (side * w * 0.85, tip + 0.035, 0.040, 0.042, 0.085), (side * d, -0.03, 0.13, 0.085, -0.095),
                (side * d * 0.62, -0.02, 0.05, 0.08, -0.05), (side * d, -0.17, 0.17, 0.05, 0.03),
                (side * 0.42, 0.20, 0.14, 0.12, person.cheeks), (side * 0.47, 0.50, 0.12, 0.14, -0.03),
                (side * 0.24, 0.44, 0.028, 0.08, -0.016 * (0.3 + person.age)),
                (side * d, 0.09, 0.10, 0.03, 0.014 * person.age),
            ]  # fmt: skip
        if person.age > 0.5:
            rows += [(0, y, 0.3, 0.012, -0.010 * (person.age - 0.4)) for y in (-0.42, -0.34, -0.50)]
        ears = canvas.soften(self.ears, 0.03) * 0.1
        pores = canvas.noise(keyed.generator(*person.key, "pores"), 90) * (0.0006 + 0.0010 * person.age)
        return (skull + rounded + ears + canvas.bumps(rows) + pores).astype(np.float32)

    def _skin(self) -> np.ndarray:
        """Skin without light: tone, ruddy cheeks, nose and ears, mottling, freckles, nostrils and shaved chin."""
        person, random = self.person, keyed.generator(*self.person.key, "skin")
        fair = float(person.skin.mean())
        blood = canvas.bumps(
            [(s * 0.40, 0.24, 0.15, 0.13, 0.8 + 0.8 * person.makeup) for s in (-1, 1)] + [(0, 0.30, 0.09, 0.07, 0.7)]
        )
        blood += 0.8 * canvas.soften(self.ears, 0.02) * (np.abs(X) > person.width) + 0.22 * canvas.noise(random, 14)
        mottle = 0.018 * canvas.noise(random, 9) + 0.016 * canvas.noise(random, 45)
        around_eyes = canvas.bumps([(s * person.eye_distance, 0.0, 0.14, 0.085, 1.0) for s in (-1, 1)])
        value = 1 + mottle - (0.07 + 0.10 * person.makeup * random.random()) * around_eyes
        skin = canvas.planes(person.skin) * value.astype(np.float32)
        skin *= 1 + blood * canvas.planes((0.02, -0.055, -0.045)) * np.float32(0.5 + 0.6 * fair)
        if person.freckles:
            spots = np.clip(canvas.noise(random, 75) - 1.6, 0, 1) * canvas.bumps(
                [(0, 0.18, 0.4, 0.16, 0.5 * person.freckles)]
            )
            skin *= 1 - spots * canvas.planes((0.3, 0.5, 0.6))
        if random.random() < 0.3:
            mole = canvas.shape(
                canvas.ellipse(random.uniform(-0.45, 0.45), random.uniform(0.2, 0.75), 0.014, 0.014), blur=0.006
            )
            canvas.paint(skin, mole * 0.7, person.skin * 0.35)
        tip, w = person.nose_length - 0.04, person.nose_width
        nostrils = [canvas.ellipse(s * w * 0.48, tip + 0.062, w * 0.25, 0.017) for s in (-1, 1)]
        canvas.paint(skin, canvas.shape(*nostrils, blur=0.008) * 0.8, person.skin * (0.36, 0.24, 0.22))
        inner_ear = canvas.shape(
            *[canvas.ellipse(s * (person.width + 0.03), 0.08, 0.022, 0.09) for s in (-1, 1)], blur=0.014
        )
        canvas.paint(skin, inner_ear * 0.4, person.skin * (0.6, 0.45, 0.42))
        return np.clip(skin, 0.02, 1).astype(np.float32)


def _outline(person: Person) -> np.ndarray:
    """The outline (n, 2) of skull and jaw: an ellipse above, a rounder (small jaw) or squarer curve below."""
    angle = np.linspace(0, np.pi, 40)
    y = -np.cos(angle)
    upper = np.sqrt(np.clip(1 - np.abs(y) ** 2.4, 0, 1))
    lower = np.clip(1 - np.clip(y, 0, 1) ** person.jaw, 0, 1) ** 0.62
    half = person.width * np.where(y < 0, upper, lower)
    height = np.where(y < 0, 0.95 * y, person.chin * y)
    right = np.stack([half, height], 1)
    return np.concatenate([right, (right * (-1, 1))[::-1]])
