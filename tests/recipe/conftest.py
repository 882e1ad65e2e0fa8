"""Stand-ins for the interventions: recipes are tested without them, and without torch."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from dist_fair.errors import DistFairError
from dist_fair.recipe.composition import load
from dist_fair.recipe.resolved import Resolved


@dataclass
class CrossEntropy:
    weight: float = 1.0
    reduction: str = "mean"

    def __post_init__(self):
        if self.weight < 0:
            raise DistFairError(f"weight={self.weight}: must not be negative")


@dataclass
class ChannelDecoupling:
    attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
    at: list[float] = field(default_factory=lambda: [0.5])
    part: float = 0.05
    batches: int = 1


@dataclass
class DistributionAlignment:
    weight: float = 1.0
    delay: float = 0.0
    attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
    epsilon: float = 0.1
    bandwidth: float | str = 0.05


INTERVENTIONS = {
    "cross_entropy": CrossEntropy,
    "channel_decoupling": ChannelDecoupling,
    "distribution_alignment": DistributionAlignment,
}


@pytest.fixture
def resolve() -> Callable[..., Resolved]:
    """resolve("recipe=gda", "seed=1") -> Resolved."""
    return lambda *arguments: load(arguments, INTERVENTIONS)


@pytest.fixture(autouse=True)
def _no_data_variable(monkeypatch):
    monkeypatch.delenv("DIST_FAIR_DATA", raising=False)
