"""How the ranks of a diagnosis talk: by torch's key-value store alone, since collectives are what may not work."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dist_fair.errors import DistFairError

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = 120.0  # seconds that ranks wait for one another: they may start, and look at a slow disk, so far apart


class Ranks:
    """All ranks as seen from one of them. Every call is made on every rank, in the same order.

    lost: ranks that did not answer in time. Nobody waits for them again.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: "Store | None" = None, patience: float = PATIENCE):
        self.rank, self.world, self.store, self.patience = rank, world, store, patience
        self.lost: set[int] = set()

    def tell(self, key: str, value: Any = None) -> Any:
        """Rank 0's value (JSON) on every rank. Raises TimeoutError on a rank that does not hear from rank 0."""
        if self.world == 1:
            return value
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        if 0 in self.lost:
            raise TimeoutError("rank 0 was silent before")
        return self._heard(0, key, self.patience)

    def collect(self, key: str, value: Any = None) -> dict[int, Any]:
        """On rank 0 the values (JSON) of all ranks that answer in time; {} on the others."""
        if self.rank > 0:
            self.store.set(f"{key}/{self.rank}", json.dumps(value))
            return {}
        found, until = {0: value}, time.monotonic() + self.patience
        for rank in range(1, self.world):
            if rank not in self.lost:
                with suppress(TimeoutError):
                    found[rank] = self._heard(rank, f"{key}/{rank}", max(0.01, until - time.monotonic()))
        return found

    def pairwise(self, key: str) -> dict[int, tuple[float, float]]:
        """On rank 0, rank -> (seconds its clock is ahead, seconds of the round trip); {} on the others."""
        if self.rank > 0:
            self._heard(0, f"{key}/ask/{self.rank}", self.patience)
            self.store.set(f"{key}/{self.rank}", json.dumps(time.time()))
            return {}
        found = {}
        for rank in range(1, self.world):
            if rank not in self.lost:
                asked = time.time()
                self.store.set(f"{key}/ask/{rank}", json.dumps(None))
                with suppress(TimeoutError):
                    answer = self._heard(rank, f"{key}/{rank}", self.patience)
                    heard = time.time()
                    found[rank] = (answer - (asked + heard) / 2, heard - asked)
        return found

    def _heard(self, rank: int, key: str, seconds: float) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except RuntimeError:  # DistStoreError and DistNetworkError are, in words that differ between versions
            self.lost.add(rank)
            raise TimeoutError(f"rank {rank} said nothing within {seconds:.0f} s") from None


def meet(environment: Mapping[str, str], patience: float = PATIENCE) -> Ranks:
    """The ranks that a launcher started, by the names that torchrun uses; one rank where there are none.

    Raises DistFairError where rank 0 cannot open the store, or another rank cannot reach it.
    """
    world = int(environment.get("WORLD_SIZE", 1))
    if world == 1:
        return Ranks()
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]:
        raise DistFairError(f"WORLD_SIZE={world} without {', '.join(missing)}: launch with torchrun, `dist-fair doctor "
                            "--ranks N`, or slurm/rank.sh")  # fmt: skip
    from torch.distributed import PrefixStore, TCPStore

    rank, address, port = int(environment["RANK"]), environment["MASTER_ADDR"], environment["MASTER_PORT"]
    opens = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun has opened it
    try:
        store = TCPStore(address, int(port), None, opens, timedelta(seconds=patience), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        fix = "is the port taken? choose another MASTER_PORT" if opens else (
            "is MASTER_ADDR the node of rank 0, as this node knows it, and does a firewall let the port through?"
        )  # fmt: skip
        raise DistFairError(f"rank {rank} cannot meet the others at {address}:{port} ({reason}): {fix}") from None
    return Ranks(rank, world, PrefixStore("doctor", store), patience)
