"""Where and how somebody is filmed: pose, light, clothes, a blurred background, and the camera with its flaws."""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from dist_fair import keyed
from dist_fair.data.demo import canvas
from dist_fair.data.demo.canvas import SIDE, UNIT, X, Y
from dist_fair.data.demo.person import Expression
from dist_fair.data.demo.portrait import Light, Portrait

SIZE = 96
# Drawn larger and averaged down: smooth edges.
DRAWN = 144


@dataclass(frozen=True)
class Pose:
    """Turn of the head in radians (yaw, pitch, roll), its centre in image widths, and pixels per head unit."""

    yaw: float
    pitch: float
    roll: float
    x: float
    y: float
    unit: float


@dataclass(frozen=True)
class Moment:
    """One frame of a video: pose and expression."""

    pose: Pose
    expression: Expression


@dataclass(frozen=True)
class Scene:
    """What stays through a video: light, and the key of background and clothes."""

    key: tuple
    light: Light
    rest: Moment
    liveliness: float


@dataclass(frozen=True)
class Picture:
    """A drawn frame, (SIZE, SIZE, 3) float32 RGB in 0..1, and soft masks (SIZE, SIZE) of the parts a forger touches."""

    image: np.ndarray
    face: np.ndarray
    eyes: np.ndarray
    mouth: np.ndarray


def film(*key: keyed.Part) -> Scene:
    """The scene of a key: anything from a dim room to a bright window, frontal to half-turned heads."""
    random = keyed.generator(*key, "scene")

    def normal(deviation: float) -> float:
        return float(deviation * np.clip(random.standard_normal(), -2, 2))

    direction = np.array([normal(0.55), -0.25 + normal(0.3), 0.8])
    direction /= np.linalg.norm(direction)
    warmth = normal(0.05)
    tint = np.array([1 + warmth, 1.0, 1 - warmth])
    strength, balance = random.uniform(0.85, 1.25), random.uniform(0.35, 0.65)
    cool = np.array([1 - warmth * 0.6, 1.0, 1 + warmth * 0.6])
    key_light, fill = strength * balance * 1.15 * tint, strength * (1 - balance) * 1.15 * cool
    light = Light(direction, key_light.astype(np.float32), fill.astype(np.float32))
    unit = SIZE * random.uniform(0.375, 0.43)
    pose = Pose(normal(0.17), normal(0.08), normal(0.06), 0.5 + normal(0.018), 0.5 + normal(0.015), unit)
    expression = Expression(
        random.uniform(-0.4, 1.0), max(0.0, normal(0.35)), normal(0.3), normal(0.25), normal(0.4), normal(0.2)
    )
    return Scene(key, light, Moment(pose, expression), random.uniform(0.4, 1.0))


def moment(scene: Scene, frame: int) -> Moment:
    """Frame number `frame`: small changes around the pose and expression of the video."""
    random = keyed.generator(*scene.key, "frame", frame)
    step = scene.liveliness * np.clip(random.standard_normal(12), -2, 2)
    pose, face = scene.rest.pose, scene.rest.expression
    pose = Pose(
        pose.yaw + 0.09 * step[0], pose.pitch + 0.05 * step[1], pose.roll + 0.03 * step[2],
        pose.x + 0.010 * step[3], pose.y + 0.008 * step[4], pose.unit * (1 + 0.012 * step[5]),
    )  # fmt: skip
    face = Expression(
        face.smile + 0.25 * step[6], max(0.0, face.mouth_open + 0.4 * step[7]), face.brows + 0.3 * step[8],
        face.lids + 0.2 * step[9] - (1.2 if random.random() < 0.04 else 0.0), face.gaze_x + 0.3 * step[10],
        face.gaze_y + 0.15 * step[11],
    )  # fmt: skip
    return Moment(pose, face)


class Shot:
    """One person in one scene: what stays through the frames is drawn once."""

    def __init__(self, portrait: Portrait, scene: Scene):
        self.portrait, self.scene = portrait, scene
        self.background = _background(scene)
        body, mask = _body(portrait, scene)
        self.body = cv2.merge([*(body * mask), mask])
        self.parts = _parts(portrait)

    def picture(self, moment: Moment) -> Picture:
        """The frame at a moment, before any camera."""
        pose = moment.pose
        head = self.portrait.draw(moment.expression, _turned(self.scene.light, pose))
        columns, rows = _lookup(pose, head.depth)
        layers = cv2.merge([*(head.colour * head.opacity), head.opacity])
        layers = cv2.remap(layers, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        scale = pose.unit * DRAWN / SIZE / UNIT
        centre = (pose.x * DRAWN + 6 * pose.roll, pose.y * DRAWN)
        place = np.float32([[scale, -0.25 * pose.roll, 0], [0.25 * pose.roll, scale, 0]])
        place[:, 2] = centre - place[:, :2] @ (SIDE / 2, SIDE / 2)
        body = cv2.warpAffine(self.body, place, (DRAWN, DRAWN), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        image = self.background * (1 - body[..., 3:]) + body[..., :3]
        image = image * (1 - layers[..., 3:]) + layers[..., :3]
        image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        masks = cv2.remap(self.parts, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        face, eyes, mouth = cv2.split(cv2.resize(masks, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        return Picture(np.clip(image, 0, 1), face, eyes, mouth)


def _turned(light: Light, pose: Pose) -> Light:
    """The light as the turned head sees it."""
    x, y, z = light.direction
    (cy, sy), (cp, sp) = ((np.cos(a), np.sin(a)) for a in (pose.yaw, pose.pitch))
    x, z = cy * x - sy * z, sy * x + cy * z
    y, z = cp * y - sp * z, sp * y + cp * z
    return replace(light, direction=np.array([x, y, max(z, 0.05)]))


def _lookup(pose: Pose, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every drawn pixel, the board position (column, row) seen there: solves the turn by fixed-point steps."""
    scale = np.float32(SIZE / DRAWN / pose.unit)
    x = (np.arange(DRAWN, dtype=np.float32) + 0.5 - np.float32(pose.x * DRAWN)) * scale
    y = (np.arange(DRAWN, dtype=np.float32) + 0.5 - np.float32(pose.y * DRAWN)) * scale
    x, y = np.meshgrid(x, y)
    cos, sin = np.float32(np.cos(pose.roll)), np.float32(np.sin(pose.roll))
    x, y = x * cos + y * sin, y * cos - x * sin
    columns, rows = x, y
    for _ in range(4):
        z = cv2.remap(
            depth, (columns + canvas.EXTENT) * UNIT - 0.5, (rows + canvas.EXTENT) * UNIT - 0.5, cv2.INTER_LINEAR
        )
        columns = (x - z * np.float32(np.sin(pose.yaw))) / np.float32(np.cos(pose.yaw))
        rows = (y - z * np.float32(np.sin(pose.pitch))) / np.float32(np.cos(pose.pitch))
    return (columns + canvas.EXTENT) * UNIT - 0.5, (rows + canvas.EXTENT) * UNIT - 0.5


def _parts(portrait: Portrait) -> np.ndarray:
    """Soft masks on the board, (SIDE, SIDE, 3): inner face, eyes with brows, mouth. The last two lie in the first."""
    person = portrait.person
    face = canvas.shape(canvas.ellipse(0, 0.22, person.width * 0.80, 0.62, 40), blur=0.05) * (1 - portrait.hair.front)
    eyes = [canvas.ellipse(s * person.eye_distance, -0.08, person.eye_width * 1.35, 0.15) for s in (-1, 1)]
    mouth = canvas.ellipse(0, person.mouth_height + 0.02, person.mouth_width * 1.3, 0.16)
    return np.dstack([face, canvas.shape(*eyes, blur=0.03) * face, canvas.shape(mouth, blur=0.03) * face])


def _background(scene: Scene) -> np.ndarray:
    """A wall or a room far out of focus, (DRAWN, DRAWN, 3)."""
    random = keyed.generator(*scene.key, "background")
    low = random.uniform(0.0, 0.16, (1, 1, 3)) + random.uniform(0.12, 0.7)
    image = np.tile(low, (24, 24, 1)) + np.linspace(-0.12, 0.12, 24)[:, None, None] * random.uniform(-1, 1)
    for _ in range(int(random.integers(2, 9))):
        (x, y), (w, h) = random.integers(-4, 24, 2), random.integers(3, 16, 2)
        image[max(y, 0) : y + h, max(x, 0) : x + w] += random.uniform(-0.22, 0.22) + random.uniform(-0.05, 0.05, 3)
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), random.uniform(0.8, 2.2))
    image = cv2.resize(image, (DRAWN, DRAWN), interpolation=cv2.INTER_CUBIC)
    light = np.sqrt(np.clip(scene.light.key * 0.5 + scene.light.fill, 0, 1.3)).astype(np.float32)
    return np.clip(image * light, 0.02, 0.98)


def _body(portrait: Portrait, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Hair behind, neck and clothed shoulders, (3, SIDE, SIDE) lit, and their mask."""
    random, person, light = keyed.generator(*scene.key, "clothes"), portrait.person, scene.light
    male = person.gender == "male"
    neck = 0.36 + 0.07 * male
    glow = light.fill + light.key * np.clip(light.direction[2] * 0.8, 0, 1)
    shade = light.key.mean() * light.direction[0] * np.clip(X, -1, 1) * 0.35 + 1
    colour, hair = portrait.back_hair(light)
    colour = colour.copy()
    neck_mask = canvas.shape(
        np.array([(-neck, 0.5), (neck, 0.5), (neck + 0.03, 1.05), (0.62, 1.4), (-0.62, 1.4), (-neck - 0.03, 1.05)]),
        blur=0.01,
    )
    fall = np.clip((Y - 0.85) / 0.5, 0.0, 1) * 0.5 + 0.42
    rounded = 1 - 0.35 * np.clip(np.abs(X) / 0.5, 0, 1) ** 3
    skin = np.sqrt(np.clip(canvas.planes(person.skin**2 * glow) * (fall * rounded * shade), 0, 1))
    canvas.paint(colour, neck_mask, skin)
    drop, wide = random.uniform(1.16, 1.36), 0.40 + 0.1 * random.random()
    collar = (
        [(-wide, 1.06), (0, drop), (wide, 1.06)]
        if random.random() < 0.5
        else [(-wide, 1.08), (-0.25, 1.2), (0.25, 1.2), (wide, 1.08)]
    )
    shirt = canvas.shape(
        np.array([(-1.6, 1.6), (-1.5, 1.28), (-0.95, 1.17), *collar, (0.95, 1.17), (1.5, 1.28), (1.6, 1.6)]), blur=0.008
    )
    cloth = random.uniform(0.05, 0.85) * random.uniform(0.6, 1.0, 3)
    weave = 1 + 0.05 * canvas.noise(random, 60) + 0.12 * canvas.noise(random, 6)
    cloth = np.sqrt(np.clip(canvas.planes(cloth**2 * glow) * (weave * shade), 0, 1))
    canvas.paint(colour, shirt, cloth)
    if random.random() < 0.5 and person.haircut in ("long", "bob"):
        return colour, np.maximum(np.maximum(neck_mask, shirt), hair)
    front = hair * (np.abs(X) > 0.45) * (person.haircut in ("long",))
    canvas.paint(colour, canvas.soften(front.astype(np.float32), 0.02), portrait.back_hair(light)[0])
    return colour, np.maximum(np.maximum(neck_mask, shirt), hair)
