"""What a recipe may not say: values out of range, settings that contradict each other, settings without effect."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Recipe, Sam, Schedule, walk

# Optimizers that step each element by itself and its own moments, whatever tensor it is part of.
_ELEMENTWISE = ("sgd", "adam", "adamw")


def check(recipe: Recipe, say: Callable[[str], str] = str) -> None:
    """Raises DistFairError for a value out of range, contradicting settings and settings without effect.

    say: dotted key -> "key=value (where it comes from)".
    """
    for key, value, field in walk(recipe):
        if fault := _out_of_range(value, field):
            raise DistFairError(f"{say(key)}: {fault}")
    data, train = recipe.data, recipe.train
    if not recipe.out:
        raise DistFairError("out is empty: name a run folder, such as out=runs/first")
    for key, value in (("data.root", data.root), ("data.train", data.train), ("detector.name", recipe.detector.name)):
        if not value:
            raise DistFairError(f"{say(key)} is empty: choose a card with {key.partition('.')[0]}=NAME, or set {key}")
    if len({*data.train}) < len(data.train):
        raise DistFairError(f"{say('data.train')}: a folder is listed twice")
    for key in ("data.mean", "data.std"):
        if len(getattr(data, key.removeprefix("data."))) != 3:
            raise DistFairError(f"{say(key)}: three numbers, for red, green and blue")
    quality = data.augment.jpeg_quality
    if len(quality) != 2 or quality[0] > quality[1]:
        raise DistFairError(f"{say('data.augment.jpeg_quality')}: two numbers, lowest first, such as [50, 95]")
    if (train.steps is None) == (train.epochs is None):
        raise DistFairError(f"{say('train.steps')} and {say('train.epochs')}: give one of the two, the other null")
    if train.batch_size % train.accumulate:
        raise DistFairError(f"{say('train.accumulate')} does not divide {say('train.batch_size')}")
    if train.accumulate_exact and train.accumulate == 1:
        raise DistFairError(f"{say('train.accumulate_exact')} has no effect with train.accumulate=1")
    if data.lanes and (train.batch_size // train.accumulate) % data.lanes:
        raise DistFairError(f"{say('data.lanes')} does not divide train.batch_size / train.accumulate "
                            f"= {train.batch_size // train.accumulate}")  # fmt: skip
    recipe.checkpoint.criterion()
    _check_effect(recipe, say)


def _out_of_range(value: Any, field: dataclasses.Field) -> str | None:
    """What is wrong with a value by the choices and the range of its field, which hold for each element of a list."""
    if (choices := field.metadata.get("choices")) and value not in choices:
        return "one of " + ", ".join("null" if choice is None else str(choice) for choice in choices)
    least, most = field.metadata.get("least", -math.inf), field.metadata.get("most", math.inf)
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if not math.isfinite(number):
            return "a finite number"
        if not least <= number <= most:
            return f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
    return None


def _check_effect(recipe: Recipe, say: Callable[[str], str]) -> None:
    """Settings that another setting makes idle."""
    users = {"floor": "cosine", "every": "step", "factor": "step"}
    for field in dataclasses.fields(Schedule):
        idle = field.name in users and users[field.name] != recipe.schedule.name
        if idle and getattr(recipe.schedule, field.name) != field.default:
            raise DistFairError(f"{say(f'schedule.{field.name}')} has no effect with {say('schedule.name')}: "
                                f"leave it at {field.default:g}")  # fmt: skip
    if recipe.schedule.name == "step" and recipe.schedule.every == 0:
        raise DistFairError(f"{say('schedule.every')}: a part of the run above 0, such as 0.3")
    _check_sam(recipe, say)
    _check_backend(recipe, say)
    _check_device(recipe, say)
    if recipe.optimizer.momentum is not None and "adam" in recipe.optimizer.name:
        raise DistFairError(f"{say('optimizer.momentum')} has no effect with {say('optimizer.name')}: set it to null; "
                            f"Adam's are optimizer.arguments={{betas: [0.9, 0.999]}}")  # fmt: skip
    if recipe.detector.norm == "frozen" and not (recipe.detector.pretrained or recipe.detector.init_from):
        raise DistFairError(f"{say('detector.norm')}: frozen statistics of an untrained detector mean nothing; "
                            f"set detector.pretrained or detector.init_from, or detector.norm=synced")  # fmt: skip
    if recipe.data.augment.jpeg == 0 and recipe.data.augment.jpeg_quality != [50, 95]:
        raise DistFairError(f"{say('data.augment.jpeg_quality')} has no effect with data.augment.jpeg=0")
    for name, tape in recipe.data.tapes.items():
        for attribute in tape.where:
            if attribute not in recipe.data.attributes:
                raise DistFairError(f"data.tapes.{name}.where.{attribute}: data.attributes has no '{attribute}'")


def _check_sam(recipe: Recipe, say: Callable[[str], str]) -> None:
    sam = recipe.optimizer.sam
    if isinstance(sam.scope, str) and sam.scope != "global":
        raise DistFairError(f"{say('optimizer.sam.scope')}: global, or a number of samples, such as 8")
    for field in dataclasses.fields(Sam):
        if sam.rho is None and getattr(sam, field.name) != field.default:
            raise DistFairError(f"{say(f'optimizer.sam.{field.name}')} has no effect with {say('optimizer.sam.rho')}: "
                                "set that to a number, such as 0.05")  # fmt: skip
    if sam.scope != "global" and recipe.train.accumulate_exact:
        raise DistFairError(f"{say('train.accumulate_exact')} has no effect with {say('optimizer.sam.scope')}: "
                            f"objectives see {sam.scope} samples at a time; leave one of the two out")  # fmt: skip


def _check_device(recipe: Recipe, say: Callable[[str], str]) -> None:
    """What is said of arithmetic and kernels."""
    train, compiled = recipe.train, say("train.compile")
    if train.tf32 and train.precision != "fp32":
        raise DistFairError(f"{say('train.tf32')} has no effect with {say('train.precision')}: leave one of them out")
    if train.compile == "none":
        return
    if train.backend != "ddp":
        raise DistFairError(f"{compiled}: {say('train.backend')} runs copies and parts of the module, which are not "
                            "what was compiled; set train.backend=ddp, or train.compile=none")  # fmt: skip
    if recipe.optimizer.sam.scope != "global":
        raise DistFairError(f"{compiled}: {say('optimizer.sam.scope')} takes the collectives away that were compiled "
                            "around; set optimizer.sam.scope=global, or train.compile=none")  # fmt: skip
    if train.checkpoint_activations or train.accumulate_exact:
        key = "train.checkpoint_activations" if train.checkpoint_activations else "train.accumulate_exact"
        raise DistFairError(f"{compiled}: {say(key)} runs the detector again in backward, in pieces; leave one of the "
                            "two out")  # fmt: skip


def _check_backend(recipe: Recipe, say: Callable[[str], str]) -> None:
    """What a backend that shares out tensors cannot do exactly."""
    train, sam, backend = recipe.train, recipe.optimizer.sam, say("train.backend")
    if train.backend == "ddp":
        if train.offload:
            raise DistFairError(f"{say('train.offload')} has no effect with {backend}: every rank holds everything; "
                                "set train.backend to fsdp, zero1, zero2 or zero3")  # fmt: skip
        return
    if recipe.optimizer.name not in _ELEMENTWISE:
        raise DistFairError(
            f"{say('optimizer.name')}: with {backend} an optimizer sees parts of tensors; that it then takes the same "
            f"step is known of {', '.join(_ELEMENTWISE)}: use one of these, or train.backend=ddp"
        )
    if train.backend != "fsdp" and train.precision == "fp64":
        raise DistFairError(f"{say('train.precision')}: {backend} keeps weights and moments in fp32; "
                            "set train.backend to ddp or fsdp")  # fmt: skip
    if sam.rho is not None and train.backend != "fsdp":
        raise DistFairError(f"{say('optimizer.sam.rho')}: {backend} hands out gradients to be stepped with, not to "
                            "climb by; set train.backend to ddp or fsdp, or optimizer.sam.rho=null")  # fmt: skip
    if sam.scope != "global":
        raise DistFairError(f"{say('optimizer.sam.scope')}: {backend} has no rank that climbs on its own; set "
                            "train.backend=ddp, or optimizer.sam.scope=global")  # fmt: skip
    if sam.rho is not None and train.offload:
        raise DistFairError(f"{say('train.offload')}: with {say('optimizer.sam.rho')} the weights move twice a step; "
                            "leave one of the two out")  # fmt: skip
