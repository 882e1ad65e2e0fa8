"""Small PG-FDD detectors, images, and all that they give."""

import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors import build_detector
from dist_fair.detectors.norm import convert_norms
from dist_fair.detectors.pg_fdd import PGFDD, Encoder
from dist_fair.detectors.pg_fdd_arguments import chosen_arguments
from dist_fair.keyed_rows import mixed
from tests.detectors.images import loaded

# With fewer than 8 channels the program ends at times ("free(): invalid next size"): where 2 to 7 are channels_last,
# torch 2.15 on a CPU writes the fp32 weight gradient of a 1x1 convolution with stride 2 beyond its memory.
NARROW = {"backbone": "resnet18", "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 16}
TINY = NARROW | {"width": 16, "heads": {"hidden": 8}, "smooth": True}
ALL = {"shared_logits": 2, "specific_logits": 5, "demographic_logits": 6, "shared": 0, "specific": 0,
       "reconstruction": 0}  # fmt: skip


def build(needs=ALL, norm="frozen", comm=None, seed=0, double=True, **arguments) -> PGFDD:
    torch.manual_seed(seed)
    detector = build_detector("pg_fdd", False, norm, TINY | arguments, comm or Communicator(), needs)
    # Convolutions start without a pattern to speak of: give the blocks one, so that nothing here is tiny.
    for parameter in (*detector.blocks.parameters(), *detector.classifier.parameters()):
        nn.init.normal_(parameter, std=0.5)
    return detector.double() if double else detector


class Patches(nn.Module):
    """A backbone that takes no time: a patch, a position."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 16, 16)

    def forward_features(self, images):
        return self.convolution(images)


def of_patches(needs=ALL, seed=0, **arguments) -> PGFDD:
    """Without norms that couple rows: the adjustments' are frozen."""
    torch.manual_seed(seed)
    chosen = chosen_arguments({"backbone": "patches", "width": 16} | arguments)[0]
    detector = PGFDD(lambda: Encoder(Patches(), 6, 16), chosen, needs).double()
    return convert_norms(detector, "frozen", Communicator())


def pictures(count=4, pixels=64, layout="channels_last"):
    return loaded(count, pixels, layout).double()


def everything(detector, images, keys):
    """All that can enter a loss, (B, ...) each: extras, both reconstructions, features, logits."""
    outputs = detector.extract(images, keys)
    found = dict(outputs.extras) | {"features": outputs.features, "map": outputs.feature_map}
    if outputs.decode is not None:
        code, condition = outputs.extras["code"], outputs.extras["condition"]
        found["self"] = outputs.decode(code, condition, None if keys is None else mixed(keys, 1))
        found["cross"] = outputs.decode(code * 2, condition, None if keys is None else mixed(keys, 2))
    return found | {"logits": detector.classify(outputs.features, keys)}


def loss_of(found):
    return sum(value.tanh().square().mean() for value in found.values())
