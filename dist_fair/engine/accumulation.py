"""Gradient accumulation: who notices that a step's batch came in parts, and who stands in the way of joining them."""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_fair.detectors.norm import FrozenBatchNorm
from dist_fair.engine.module import TrainingModule
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Recipe

UNCOUNTED = "detector.norm=frozen, or group norm (resnet50_gn; in ResNets +detector.arguments.norm_layer=groupnorm)"


def refuse_batch_statistics(recipe: Recipe, detector: nn.Module) -> None:
    """Raises DistFairError where train.accumulate_exact promises what the detector's batch norms cannot keep."""
    if not recipe.train.accumulate_exact or not (layers := batch_statistics(detector)):
        return
    more = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
    raise DistFairError(
        f"train.accumulate_exact=true: layer '{layers[0]}'{more} of detector.name={recipe.detector.name} has, with "
        f"detector.norm={recipe.detector.norm}, statistics of each smaller batch, so that {recipe.train.accumulate} of "
        f"them are not one batch: {UNCOUNTED}; or train.accumulate_exact=false"
    )


def batch_statistics(detector: nn.Module) -> list[str]:
    """Names of the layers that in training normalise by the batch they are given, or keep running statistics of it."""
    from timm.layers import FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    fixed = (FrozenBatchNorm, FrozenBatchNormAct2d, FrozenBatchNorm2d)
    return [
        name
        for name, layer in detector.named_modules()
        if not isinstance(layer, fixed)
        and (isinstance(layer, _BatchNorm) or getattr(layer, "running_var", None) is not None)
    ]


def accumulation_note(recipe: Recipe, module: TrainingModule) -> str | None:
    """What plain accumulation means to interventions that look at samples together; None where it means nothing."""
    train, end = recipe.train, math.nextafter(1.0, 0.0)  # weights only rise: who acts at all acts in the end
    names = [name for name, part in module.interventions.items() if part.couples and part.acts(end)]
    alone = recipe.optimizer.sam.scope != "global"  # each group of rows is a batch of its own, accumulated or not
    if train.accumulate == 1 or train.accumulate_exact or alone or not names:
        return None
    ways = f", with {UNCOUNTED}," if batch_statistics(module.detector) else ""
    return (
        f"train.accumulate={train.accumulate}: to {_listed(names)} each smaller batch of "
        f"{train.batch_size // train.accumulate} samples is a batch of its own, not a part of the step's "
        f"{train.batch_size}; train.accumulate_exact=true{ways} makes them one, at the price of a second forward pass"
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
