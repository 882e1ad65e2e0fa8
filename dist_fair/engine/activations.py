"""Activation checkpointing: a backbone keeps the inputs of its blocks, and runs each block again in backward."""

from torch import nn

from dist_fair.engine.accumulation import UNCOUNTED, batch_statistics
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Recipe


def checkpoint_activations(recipe: Recipe, detector: nn.Module) -> None:
    """Switches it on in the detector's backbones if the recipe wants it, by timm's own way.

    Raises DistFairError for a backbone without it, and for layers that keep statistics: a block that runs twice counts
    its batch twice.
    """
    if not recipe.train.checkpoint_activations:
        return
    setting, name = "train.checkpoint_activations=true", f"detector.name={recipe.detector.name}"
    backbones = {place: part for place, part in detector.named_modules() if hasattr(part, "set_grad_checkpointing")}
    for place, backbone in backbones.items():
        if layers := batch_statistics(backbone):
            raise DistFairError(
                f"{setting}: layer '{place}.{layers[0]}' of {name} keeps, with detector.norm={recipe.detector.norm}, "
                f"running statistics, which would count each batch twice: {UNCOUNTED}; or leave it out"
            )
        try:
            backbone.set_grad_checkpointing(True)
        except AssertionError:  # timm's answer for models that cannot
            backbones = {}
            break
    if not backbones:
        raise DistFairError(f"{setting}: the backbone of {name} cannot; leave it out, or choose another, such as "
                            "resnet50_gn")  # fmt: skip
