"""Small trained modules of every kind that exports differently, and the recipes they belong to."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.detectors import build_detector
from dist_fair.engine.exporting import deploy
from dist_fair.engine.module import TrainingModule
from dist_fair.interventions.base import Facts, registered
from dist_fair.interventions.base import build as build_interventions
from dist_fair.interventions.subgroup_norm import SubgroupNorm
from dist_fair.recipe.schema import Data, DetectorSettings, Recipe, Train
from tests.data.making import bare_index
from tests.detectors.pg_fdd_detectors import ALL, TINY

SIZE = 32
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 12]}
NORM, PROJECTION = ("subgroup_norm", {"attributes": ["gender"]}), ("low_rank_projection", {"rank": 5})
UNIT = ("low_rank_projection", {"rank": 5, "normalise": True})
HARD = ("low_rank_projection", {"rank": 5, "hard": True, "weight": 0.0})

# detector, its arguments
DETECTORS = {
    "relu": ("resnet18", RESNET),
    "smooth": ("resnet18", RESNET | {"smooth": True}),
    "adjusted": ("resnet18", RESNET | {"adjust_channels": 12}),
    "adjusted, group norm": ("vit_tiny_patch16_224", {"img_size": SIZE, "depth": 1, "embed_dim": 12, "num_heads": 2,
                                                      "adjust_channels": 12}),
    "efficientnet": ("mobilenetv3_small_050", {}),
    "pg_fdd": ("pg_fdd", TINY | {"width": 24}),
    "pg_fdd with kinks": ("pg_fdd", TINY | {"width": 24, "smooth": False}),
    "pg_fdd, average": ("pg_fdd", TINY | {"width": 24, "pooling": "average"}),
}  # fmt: skip
STEPS = {
    "nothing": (),
    "norm": (NORM,),
    "norm not used": (("subgroup_norm", {"attributes": ["gender"], "inference": "none"}),),
    "projection": (PROJECTION,),
    "unit": (UNIT,),
    "norm, projection": (NORM, PROJECTION),
    "norm, unit": (NORM, UNIT),
    "norm, hard": (NORM, HARD),
    "projection, norm": (PROJECTION, NORM),
}


def trained(detector="relu", steps="nothing", masked=(), precision="fp32", seed=0) -> tuple[Recipe, TrainingModule]:
    """A recipe, and its module with weights, statistics and moments as if it had learned; some channels masked."""
    name, arguments = DETECTORS[detector]
    torch.manual_seed(seed)
    built = build_detector(name, False, "synced", arguments, Communicator(), ALL if name == "pg_fdd" else {})
    kinds = registered()
    chosen = {"cross_entropy": kinds["cross_entropy"].Settings()}
    chosen |= {kind: kinds[kind].Settings(**settings) for kind, settings in STEPS[steps]}
    index = bare_index([8])
    facts = Facts(index, torch.full((8,), 1 / 8).double().numpy(), seed=0, steps=10, channels=built.channels)
    interventions, width = build_interventions(chosen, facts, built.features)
    if width != built.features:
        built.resize_classifier(width)
    module = TrainingModule(built, interventions, Communicator(), precision)
    _learn(module, masked, torch.Generator().manual_seed(seed + 1))
    recipe = Recipe(
        detector=DetectorSettings(name=name, arguments=arguments),
        interventions=chosen,
        data=Data(image_size=SIZE, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]),
        train=Train(precision=precision),
    )
    return recipe, module.eval()


@torch.no_grad()
def _learn(module: TrainingModule, masked: Sequence[int], generator: torch.Generator) -> None:
    """Statistics and moments of images, masks, and then a classifier that tells these images apart."""
    images, detector = batch(), module.detector
    for layer in detector.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = None  # so that one batch is all it takes
    detector.train()
    detector.extract(images.images)
    module.eval()
    _move_moments(module, detector.extract(images.images).features, images, generator)
    detector.channel_mask[list(masked)] = 0
    features = detector.extract(images.images).features
    for part in module.interventions.values():
        features = part.transform(features, images, module.comm)
    first = detector.features_layer()
    nn.init.normal_(first.weight, generator=generator)
    first.weight /= (features @ first.weight.T.to(features)).std(0).mean().clamp_min(1e-3)
    first.bias.copy_(-(first.weight.to(features) @ features.mean(0)))


def _move_moments(module: TrainingModule, features: torch.Tensor, images: Batch, generator: torch.Generator) -> None:
    for part in module.interventions.values():
        if isinstance(part, SubgroupNorm):
            drawn = 0.5 + torch.rand((2, 2, features.shape[1]), generator=generator, dtype=torch.float64)
            part.running_count += torch.tensor([[3.0], [5.0]])
            part.running_mean.copy_(features.mean(0) * drawn[0])
            part.running_variance.copy_(features.var(0) * drawn[1])
        features = part.transform(features, images, module.comm)


def batch(count=5, seed=3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator) * torch.linspace(0.2, 3, count)[:, None, None, None]
    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch(images, zeros, {"gender": zeros - 1}, zeros - 1, zeros, zeros == 0, zeros, (count,), 0)


def deployed(recipe: Recipe, module: TrainingModule):
    return deploy(recipe, module.state_dict(), {"recipe": "tiny"}, "here")
