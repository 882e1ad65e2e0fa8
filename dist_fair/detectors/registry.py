"""Detectors by name: the registered ones, and every timm model."""

import hashlib
from collections.abc import Callable, Mapping

from dist_fair.collectives import Communicator
from dist_fair.detectors.base import Detector
from dist_fair.detectors.norm import convert_norms
from dist_fair.detectors.timm_backbone import build_timm
from dist_fair.errors import DistFairError

Factory = Callable[[bool | str, Mapping[str, object], Mapping[str, int]], Detector]

_registry: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Makes a detector known to recipes: the class or function is called as (pretrained, arguments, needs)."""

    def add(factory: Factory) -> Factory:
        _registry[name] = factory
        return factory

    return add


def registered() -> dict[str, Factory]:
    """The detectors that are not plain timm models, by name."""
    return dict(_registry)


def make_detector(
    name: str, pretrained: bool | str, arguments: Mapping[str, object], needs: Mapping[str, int]
) -> Detector:
    """A detector on this process alone, its norms as they are made; arguments as for `build_detector`.

    Without needs it has the parts that the score needs and no others.
    """
    if name in _registry:
        return _registry[name](pretrained, arguments, needs)
    return build_timm(name, pretrained, arguments, [*_registry])


def build_detector(
    name: str,
    pretrained: bool | str,
    norm: str,
    arguments: Mapping[str, object],
    comm: Communicator,
    needs: Mapping[str, int] | None = None,
) -> Detector:
    """The detector of a recipe, with the same weights on every rank. Called on all ranks.

    name: a registered detector or a timm model (unknown names: nearest known). pretrained: False, True (timm's default
    weights), a timm tag, or a file (see dist_fair.detectors.weights). norm: see convert_norms. arguments: passed on.
    needs: the extras that interventions read -> the number of classes of those that are logits, else 0. A detector has
    the parts for these and no others: every parameter takes part in the loss.
    Random weights come from torch's generator: the caller seeds it alike on all ranks. Raises DistFairError on every
    rank if any rank cannot build it, or if the ranks end up with different weights.
    """
    detector, problem = None, ""
    try:
        detector = make_detector(name, pretrained, arguments, needs or {})
        convert_norms(detector, norm, comm)
    except DistFairError as error:
        problem = str(error)
    problems = comm.objects(problem, "detector/problems")
    if any(problems):
        rank = next(rank for rank, text in enumerate(problems) if text)
        raise DistFairError(problems[rank] if comm.world == 1 or all(problems) else f"rank {rank}: {problems[rank]}")
    comm.agree(_digest(detector), "detector/weights")
    return detector


def _digest(detector: Detector) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in detector.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
