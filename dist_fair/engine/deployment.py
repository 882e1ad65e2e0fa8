"""A trained detector in use: images in, scores out, without recipe, training data or demographics.

    DETECTOR/config.json         what to build, how images are prepared, where it comes from, SHA-256 of the other file
             model.safetensors   the tensors that the score needs

Loading executes nothing that the files say, and reads no other file: what they do not fit is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from dist_fair.data.batch import normalised
from dist_fair.data.reading import file_into, resize_into
from dist_fair.detectors.base import Detector
from dist_fair.detectors.registry import make_detector
from dist_fair.detectors.weights import load_state
from dist_fair.errors import DistFairError
from dist_fair.interventions.at_inference import STEPS, Step, others

FORMAT, CONFIG, MODEL = 1, "config.json", "model.safetensors"
PRECISIONS = ("fp32", "bf16", "fp64")


@dataclass(frozen=True)
class Description:
    """What config.json says of a detector, apart from the hash.

    name, arguments: of the detector, as in a recipe. channels: of its feature map, of which `masked` are removed.
    steps: [{"kind": name, option: value, ...}]. image_size: S. mean, std: of RGB in 0..1. precision: fp32, bf16 (of the
    feature map alone) or fp64. provenance: recipe, fingerprint, checkpoint, step, dist_fair (its version), ...
    """

    name: str
    arguments: dict
    channels: int
    masked: list[int]
    steps: list[dict]
    image_size: int
    mean: list[float]
    std: list[float]
    precision: str
    provenance: dict

    def __post_init__(self):
        """Raises ValueError for what no export has written."""
        kinds = {"name": str, "arguments": dict, "channels": int, "masked": list, "steps": list, "image_size": int,
                 "mean": list, "std": list, "precision": str, "provenance": dict}  # fmt: skip
        for name, kind in kinds.items():
            _require(type(getattr(self, name)) is kind, name, getattr(self, name))
        numbers = all(type(number) in (int, float) for number in (*self.mean, *self.std))
        _require(numbers and len(self.mean) == len(self.std) == 3 and min(self.std) > 0, "mean, std", self.std)
        _require(self.precision in PRECISIONS, "precision", self.precision)
        _require(self.image_size > 0, "image_size", self.image_size)
        _require(all(type(step) is dict and step.get("kind") in STEPS for step in self.steps), "steps", self.steps)
        channels = range(self.channels)
        known = all(type(channel) is int and channel in channels for channel in self.masked)
        _require(known and self.masked == sorted({*self.masked}) and len(self.masked) < self.channels, "masked", "")

    def kept(self) -> torch.Tensor:
        """The channels that are not masked, (k,)."""
        return others(torch.tensor(self.masked, dtype=torch.int64), self.channels)


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name}={value} is not what an export writes")


class DeployedDetector(nn.Module):
    """A trained detector that scores. Always in evaluation mode; its parameters take no gradient, images may.

        detector = dist_fair.load_detector("runs/a/detector", device="cuda")
        scores = detector(detector.preprocess(["one.jpg", "two.png"]))      # (2,) probability of fake

    detector: made for the score alone, without masked channels. steps: what interventions do between features and
    classifier. description: image size, normalisation, provenance. On a GPU torch lets convolutions round to TF32 and
    scores are off by 1e-3 from the CPU's, until you set torch.backends.cudnn.allow_tf32 = False.
    """

    def __init__(self, detector: Detector, steps: Sequence[Step], description: Description):
        super().__init__()
        self.detector, self.steps, self.description = detector, nn.ModuleList(steps), description
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) as `preprocess` makes them -> (B,) fp32 in [0, 1], softmax(logits)[:, 1]."""
        half = self.description.precision == "bf16"
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
            features = self.detector.extract(images).features
        features = features.float() if half else features
        for step in self.steps:
            features = step(features)
        return self.detector.classify(features).softmax(dim=1)[:, 1].float()

    def preprocess(self, images: Sequence[str | Path | np.ndarray]) -> torch.Tensor:
        """Files (jpg, png, webp) or RGB arrays (H, W, 3) uint8 -> (B, 3, S, S), as in training, on its device.

        Raises DistFairError naming the first that is no such image. A face should be cropped as the training data were.
        """
        if isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim == 3):
            raise DistFairError("preprocess takes several images: put a single one into a list")
        side = self.description.image_size
        pixels = np.empty((len(images), side, side, 3), np.uint8)
        for number, (image, out) in enumerate(zip(images, pixels, strict=True)):
            if not isinstance(image, np.ndarray):
                if fault := file_into(image, out):
                    raise DistFairError(f"{image}: {fault}")
            elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise DistFairError(f"image {number}: an array of {image.dtype} {image.shape}; wanted: uint8 (H, W, 3)")
            else:
                resize_into(image, out)
        return self.normalised(pixels)

    def normalised(self, pixels: np.ndarray) -> torch.Tensor:
        """RGB (B, S, S, 3) uint8 -> (B, 3, S, S) float on its device."""
        device = next(self.parameters()).device
        return normalised(torch.from_numpy(pixels).to(device), self.description.mean, self.description.std)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What its file holds, by name, on the CPU."""
        state = {name: tensor for name, tensor in self.state_dict().items() if not _counts_batches(name)}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def built(name: str, arguments: Mapping[str, object], precision: str) -> Detector:
    """A detector with the parts that the score needs, its weights still to be loaded."""
    detector = make_detector(name, False, arguments, {})
    return detector.double() if precision == "fp64" else detector


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> DeployedDetector:
    """The detector in a folder that `dist-fair export` made.

    Raises DistFairError if it is none, if a file is damaged, or if they do not fit each other.
    """
    folder, device = Path(path), usable(device)
    if not (folder / CONFIG).is_file():
        raise DistFairError(f"{folder} is no exported detector (it has no {CONFIG}): `dist-fair export RUN` makes one")
    try:
        content = json.loads((folder / CONFIG).read_text())
        found, digest = content.pop("format"), content.pop("sha256")[MODEL]
        if found != FORMAT:
            raise DistFairError(f"{folder / CONFIG} has format {found}; this version reads {FORMAT}")
        description = Description(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(error, folder / CONFIG, "not what `dist-fair export` writes") from None
    tensors = _read_tensors(folder / MODEL, digest)
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded; the caller's draws stay
            detector = _assembled(description, tensors, str(folder / MODEL))
    except Exception as error:  # what timm and torch say of arguments and tensors that make no detector
        raise _refusal(error, folder, "no detector can be made of it") from error
    return detector.to(device)


def usable(device: torch.device | str) -> torch.device:
    """A device that is there. Raises DistFairError for one that is not."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise DistFairError(f"device={device}: {str(error).splitlines()[0]}") from None


def _refusal(error: Exception, place: Path, text: str) -> DistFairError:
    if isinstance(error, DistFairError):
        return error if str(place) in str(error) else DistFairError(f"{place}: {error}")
    return DistFairError(f"{place}: {text} ({type(error).__name__}: {error}); export it again")


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DistFairError(f"{path} cannot be read ({error.strerror}); export the detector again") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise DistFairError(f"{path} is damaged (its SHA-256 is not the one in {CONFIG}); export the detector again")
    try:
        return load(data)
    except SafetensorError as error:
        raise DistFairError(f"{path} is no safetensors file: {error}") from None


def _assembled(description: Description, tensors: Mapping[str, torch.Tensor], place: str) -> DeployedDetector:
    """The detector of a description, its steps made of their tensors, everything checked against everything."""
    detector = built(description.name, description.arguments, description.precision)
    if detector.channels != description.channels:
        raise DistFairError(f"{description.name} has {detector.channels} channels, not {description.channels}")
    detector.prune(description.kept())
    steps, width = [], detector.features
    for number, options in enumerate(description.steps):
        prefix = f"steps.{number}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        step = STEPS[options["kind"]](**own, **{name: value for name, value in options.items() if name != "kind"})
        if step.features != width:
            raise DistFairError(f"{place}: '{prefix}' takes {step.features} features, and {width} come to it")
        steps.append(step)
        width = step.width
    detector.resize_classifier(width)
    deployed = DeployedDetector(detector, steps, description)
    load_state(deployed, tensors, place)
    return deployed


def _counts_batches(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def config_text(description: Description, model: bytes) -> str:
    """config.json for a detector whose tensors are the bytes of model.safetensors."""
    content = {"format": FORMAT, **asdict(description), "sha256": {MODEL: hashlib.sha256(model).hexdigest()}}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
