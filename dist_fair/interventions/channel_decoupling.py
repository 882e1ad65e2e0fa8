"""Channel decoupling (SFD): channels that cluster by demographic group are cut out of the detector."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dist_fair.collectives import Communicator
from dist_fair.detectors.base import Detector
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Intervention, ScoringData, Settings, register

DISTANCES, KEEPS = ("normalised", "cosine", "raw"), ("all", "last")
CHUNK = 2**22  # distances in memory at once: 16 MiB in fp32


@register("channel_decoupling")
class ChannelDecoupling(Intervention):
    """Structural Fairness Decoupling of "Decoupling Bias, Aligning Distributions" (CVPR 2026).

    Channel k of the last feature map is scored by its soft nearest neighbour loss on global batches of b samples with
    groups a_i and maps m_ki (H W numbers), in evaluation mode:

        l_k = -mean over i of log( sum_{x != i, a_x = a_i} exp(-D_ix / T) / sum_{y != i} exp(-D_iy / T) )
        F_k = mean of l_k over batches

    A low F_k means that the channel clusters by group. At each iteration the floor(part C) lowest (at least one) that
    are still open are masked after normalisation and activation. Rows whose group is unknown are left out, then those
    without a partner in their group. Channels that are zero on a whole batch score infinity and are never chosen.

    Exact over ranks: an all-to-all turns rows of all channels into all rows of C / W channels; the C scores are
    gathered, every rank takes the same lowest (value, then number), and a digest of the mask is compared.
    """

    @dataclass
    class Settings(Settings):
        """at: parts of the run after which an iteration happens, ascending, in [0, 1). part: of C, per iteration.

        batch_size: b, global. batches: how many. distance D: normalised (squared Euclid of maps scaled to norm 1, which
        is 2 (1 - cosine)), cosine (1 - cosine), or raw (squared Euclid over its mean of all pairs). temperature: T.
        keep: all (iterations add up), or last (each iteration opens what the one before it closed, and scores anew).
        """

        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        at: list[float] = field(default_factory=lambda: [0.15, 0.25, 0.35])
        part: float = 0.02
        batch_size: int = 128
        batches: int = 8
        temperature: float = 1.0
        distance: str = "normalised"
        keep: str = "all"

        def __post_init__(self):
            place = "channel_decoupling: "
            if not self.at or list(self.at) != sorted(set(self.at)) or not 0 <= self.at[0] <= self.at[-1] < 1:
                raise DistFairError(f"{place}at={list(self.at)}: ascending parts of the run, in [0, 1)")
            if not 0 < self.part * len(self.at) < 1:
                raise DistFairError(f"{place}part={self.part}: positive, below 1 over all {len(self.at)} iterations")
            if self.batch_size < 2 or self.batches < 1:
                raise DistFairError(f"{place}batch_size={self.batch_size}, batches={self.batches}: at least 2 and 1")
            if self.temperature <= 0:
                raise DistFairError(f"{place}temperature={self.temperature}: must be positive")
            if self.distance not in DISTANCES:
                raise DistFairError(f"{place}distance={self.distance}: one of {', '.join(DISTANCES)}")
            if self.keep not in KEEPS:
                raise DistFairError(f"{place}keep={self.keep}: one of {', '.join(KEEPS)}")

    couples = False
    settings: Settings

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.groups, self.seed = facts.groups(settings.attributes), facts.seed
        self.steps: list[int] = []  # before which an iteration happens; in a short run, one step apart at least
        for part in settings.at:
            self.steps.append(max(round(part * facts.steps), self.steps[-1] + 1 if self.steps else 0))
        if self.steps[-1] >= facts.steps:
            raise DistFairError(
                f"channel_decoupling: at={list(settings.at)}: no room for {len(self.steps)} iterations in a run of "
                f"{facts.steps} steps; train longer or list fewer"
            )

    def restructures(self, step: int) -> bool:
        return step in self.steps

    def restructure(self, step: int, detector: Detector, data: ScoringData, comm: Communicator) -> dict[str, object]:
        """An iteration: masks `detector.channel_mask` in place; what was masked, the mask's hash, the scores."""
        iteration, mask = self.steps.index(step), detector.channel_mask
        if self.settings.keep == "last":
            mask.fill_(1)
        scores = self.scores(iteration, detector, data, comm)
        scores = torch.where(mask.cpu() > 0, scores, torch.inf)
        chosen = lowest(scores, self.settings.part)
        new = mask.cpu().index_fill(0, chosen, 0)
        code = hashlib.blake2b((new > 0).numpy().tobytes(), digest_size=16)
        comm.agree(code.digest(), "channel_decoupling/mask")
        mask.copy_(new)
        return {
            "iteration": iteration,
            "masked": sorted(chosen.tolist()),
            "masked_in_all": int((new == 0).sum()),
            "hash": code.hexdigest(),
            "scores": _summary(scores, chosen),
        }

    def scores(self, iteration: int, detector: Detector, data: ScoringData, comm: Communicator) -> torch.Tensor:
        """F_k of every channel, (C,) fp64 on the CPU, the same on all ranks; infinity for dead ones."""
        total, counted, channels = torch.zeros(()), 0, detector.channels
        width = -(-channels // comm.world)  # channels per rank; the last rank's may be padding
        settings = self.settings
        with _scoring(detector), torch.no_grad():
            for batch in data.batches(settings.batch_size, settings.batches, self.seed, "snnl", iteration):
                with torch.autocast(batch.images.device.type, enabled=False):
                    maps = detector.extract(batch.images).feature_map.flatten(2)
                    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
                maps = torch.nn.functional.pad(maps, (0, 0, 0, width * comm.world - channels))
                maps = comm.exchange_columns(maps, "channel_decoupling/maps", batch.sizes)
                codes = torch.where(batch.valid, self.groups.codes(batch.attributes), -1)
                codes = comm.gather(codes, "channel_decoupling/groups", batch.sizes)
                kept = _partnered(codes)
                if kept.any():
                    total = total.to(maps.device) + self._losses(maps[codes >= 0], codes[codes >= 0])
                    counted += 1
        if not counted:
            raise DistFairError(
                f"channel_decoupling: no scoring batch has two samples of one group of {self.groups.label}; "
                f"raise batch_size={settings.batch_size} or choose other attributes"
            )
        return comm.gather(total / counted, "channel_decoupling/scores").cpu()[:channels]

    def _losses(self, maps: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """l_k of maps (b, c, HW), (c,) fp64, in chunks of channels."""
        chunk = max(1, CHUNK // len(maps) ** 2)
        return torch.cat([
            soft_nearest_neighbour_loss(part.transpose(0, 1), codes, self.settings.temperature, self.settings.distance)
            for part in maps.split(chunk, dim=1)
        ])  # fmt: skip


def soft_nearest_neighbour_loss(
    maps: torch.Tensor, codes: torch.Tensor, temperature: float, distance: str
) -> torch.Tensor:
    """l_k of every channel, (c,) fp64, from maps (c, b, HW) and group codes (b,) >= 0; infinity where maps are all 0.

    At least one row must have a partner in its group.
    """
    apart = ~torch.eye(len(codes), dtype=torch.bool, device=codes.device)
    exponents = -_distances(maps, distance, apart) / temperature
    together = (codes[:, None] == codes) & apart
    every = exponents.masked_fill(~apart, -torch.inf).logsumexp(2)
    same = exponents.masked_fill(~together, -torch.inf).logsumexp(2)
    kept = together.any(1)
    losses = (every[:, kept] - same[:, kept]).double().mean(1)
    return torch.where(maps.abs().amax((1, 2)) > 0, losses, torch.inf)


def lowest(scores: torch.Tensor, part: float) -> torch.Tensor:
    """Numbers of the floor(part C) lowest finite scores (C,), at least one, ties by number."""
    count = max(1, int(part * len(scores) + 1e-9))  # 0.29 * 100 is 28.999999999999996
    chosen = scores.argsort(stable=True)[:count]
    chosen = chosen[scores[chosen].isfinite()]
    if not len(chosen):
        raise DistFairError(
            f"channel_decoupling: all {len(scores)} channels are masked or zero on the scoring batches; "
            "iterate later (at) or mask a smaller part"
        )
    return chosen


def _distances(maps: torch.Tensor, distance: str, apart: torch.Tensor) -> torch.Tensor:
    """D (c, b, b) of maps (c, b, HW)."""
    if distance != "raw":
        maps = maps / maps.norm(dim=2, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    squares = maps.square().sum(2)
    products = maps @ maps.mT
    if distance == "cosine":
        return 1 - products
    distances = (squares[:, :, None] + squares[:, None, :] - 2 * products).clamp_min(0)
    if distance == "raw":
        mean = distances[:, apart].mean(1)[:, None, None]
        return distances / torch.where(mean > 0, mean, 1)
    return distances


def _partnered(codes: torch.Tensor) -> torch.Tensor:
    """Which rows (b,) have a known group and a partner in it."""
    return ((codes[:, None] == codes).sum(1) > 1) & (codes >= 0)


def _summary(scores: torch.Tensor, chosen: torch.Tensor) -> dict[str, float | int]:
    finite = scores[scores.isfinite()]
    return {
        "lowest": finite.min().item(),
        "highest_masked": scores[chosen].max().item(),
        "median": finite.median().item(),
        "highest": finite.max().item(),
        "never_chosen": len(scores) - len(finite),
    }


@contextmanager
def _scoring(detector: Detector) -> Iterator[None]:
    """Evaluation mode, then every module's own mode again."""
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
