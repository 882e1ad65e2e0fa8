"""A few faces of a data set as a detector with a decoder rebuilds them: for people to look at. No collectives."""

from collections.abc import Sequence

import numpy as np
import torch

from dist_fair.data.batch import normalised
from dist_fair.data.index import Index
from dist_fair.data.reading import Reader
from dist_fair.engine.evaluation import named
from dist_fair.engine.module import TrainingModule

PAIRS = 3


def reconstructions(
    module: TrainingModule, reader: Reader, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[np.ndarray], list[str]] | None:
    """Columns and names for `reporting.gallery`: PAIRS reals and as many fakes, each pair giving each other's forgery.

    The faces are spread evenly over the reals and the fakes of the reader's index; unreadable ones are left out with
    their partners. None for a detector without a decoder, and for data without a real or a fake.
    """
    if getattr(module.detector, "decoder", None) is None:
        return None
    index = reader.index
    halves = [np.flatnonzero(index.labels == label) for label in (0, 1)]
    count = min(PAIRS, *map(len, halves))
    chosen = [half[((np.arange(count) + 0.5) / max(count, 1) * len(half)).astype(int)] for half in halves]
    samples = np.stack(chosen, axis=1).reshape(-1)
    read = reader.read(samples, np.zeros_like(samples), replace=False)
    pairs = (read.samples.reshape(-1, 2) >= 0).all(axis=1).repeat(2)
    samples, pixels = samples[pairs], torch.from_numpy(read.images[pairs])
    if not len(samples):
        return None
    partners = torch.arange(len(samples)).view(-1, 2).flip(1).reshape(-1)
    device, training = next(module.parameters()).device, module.training
    images = normalised(pixels, mean, std).to(device)
    module.eval()
    made = module.detector.reconstruct(images, partners.to(device))
    module.train(training)
    own, cross = (_pixels(rebuilt, mean, std) for rebuilt in made)
    return [pixels.numpy(), own, cross, pixels[partners].numpy()], [_name(index, sample) for sample in samples]


def _pixels(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(B, 3, H, W) as a detector gets them -> (B, H, W, 3) uint8."""
    values = images.float().cpu().permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    return (values * 255).round().clamp(0, 255).byte().numpy()


def _name(index: Index, sample: int) -> str:
    """What a face is: real, or how it was forged; and its attributes."""
    manipulation = named(index.manipulations)[sample] if index.labels[sample] else "real"
    return "\n".join([str(manipulation), *(str(named(column)[sample]) for column in index.attributes.values())])
