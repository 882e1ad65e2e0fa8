"""What checks may look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_fair.diagnosis.ranks import Ranks
from dist_fair.recipe.resolved import Resolved


@dataclass
class Site:
    """This rank, its environment and, if one was named, the recipe.

    fault: why the recipe does not resolve. apart: why this rank looks alone, without the others that were launched.
    hosts: rank -> node, on rank 0 only. stuck: is this rank still in a process group where it failed, or hangs?
    """

    ranks: Ranks
    environment: Mapping[str, str]
    resolved: Resolved | None = None
    fault: str | None = None
    apart: str | None = None
    hosts: dict[int, str] = field(default_factory=dict)
    stuck: bool = False

    @property
    def out(self) -> Path:
        """The run folder, or where run folders go by default."""
        return Path(self.resolved.recipe.out if self.resolved else "runs")

    @property
    def local_world(self) -> int:
        """Ranks on this node."""
        return int(self.environment.get("LOCAL_WORLD_SIZE", 1))

    @property
    def local_rank(self) -> int:
        """This rank's number on its node."""
        return int(self.environment.get("LOCAL_RANK", 0))

    @property
    def workers(self) -> int:
        """Loading processes of this rank."""
        return self.resolved.recipe.data.workers if self.resolved else 0
