"""The one module that a backend wraps: detector and interventions together, forward returns the loss.

DDP, FSDP2 and DeepSpeed see an ordinary nn.Module. Every rank passes its own rows and gets the same global loss back;
see dist_fair.collectives for why the averaged gradients are then the gradients of the global batch.

Several micro-batches may form one global batch (train.accumulate_exact; GradCache, Gao et al. 2021). The detector runs
on one after the other and keeps nothing but its outputs; the interventions see all rows at once; in backward each
micro-batch is run again, with the gradient of its outputs at hand. That is activation checkpointing with a micro-batch
for a segment: one forward, one backward, one gradient all-reduce, and the memory of a micro-batch. The last one, with
which backward begins, keeps its activations and is not run again.

Randomness in a re-run must be that of the run. Ours is: it is drawn from the keys of the rows. checkpoint also puts
torch's generators back, for detectors that draw from them; that costs 0.1 ms a micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.window import Window
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.interventions.base import Intervention, Summary, exchange


@dataclass
class Losses:
    """What a forward pass gives.

    loss: the scalar to differentiate, equal on all ranks. numbers: what there is to log: `loss/TERM`, each term before
    its weight, and each measure by its name; None while the weight is 0. logits: (B, 2) of this rank's rows, detached.
    samples: (B,) their index rows.
    """

    loss: torch.Tensor
    numbers: dict[str, torch.Tensor | None]
    logits: torch.Tensor
    samples: torch.Tensor


class TrainingModule(nn.Module):
    """Detector and interventions of a recipe.

    layout: the memory format that images are given to the detector in; None for that in which they come.
    precision: "fp32", "bf16" or "fp64". bf16 covers the detector's feature extraction only: features, extras, logits,
    statistics and losses are fp32 then. fp64 is for proofs: whatever
    differs there between two ways of splitting a batch is a bug.
    """

    def __init__(self, detector: Detector, interventions: nn.ModuleDict, comm: Communicator, precision: str = "fp32"):
        super().__init__()
        self.detector, self.interventions, self.comm, self.precision = detector, interventions, comm, precision
        self.layout: torch.memory_format | None = None
        if precision == "fp64":
            self.double()

    def couples(self, progress: float) -> bool:
        """Whether the loss at `progress` looks at samples together: micro-batches then are not the batch they form."""
        return any(part.couples and part.acts(progress) for part in self.interventions.values())

    def forward(self, window: Window, progress: float) -> Losses:
        """The global loss at `progress`, the part of the run that is done, in [0, 1)."""
        outputs, batch = self._extract(window), window.merged()
        self._decide(outputs, batch, progress)
        weights = outputs.logits.new_ones(len(batch))
        for intervention in self._begun(progress):
            own = intervention.weigh(batch)
            weights = weights if own is None else weights * own
        weight = {name: part.weight(progress) for name, part in self.interventions.items()}
        active = {name: weight[name] for name, part in self.interventions.items() if weight[name] > 0 or part.reads}
        summaries: dict[str, Summary] = {
            name: self.interventions[name].summarise(outputs, batch, weights) for name in active
        }
        summaries = {name: summary for name, summary in summaries.items() if summary}
        loss, numbers = self._objectives(exchange(summaries, self.comm, batch.sizes), active)
        # A recipe may train on terms that this rank's rows do not reach; the graph must hold every parameter anyway.
        return Losses(loss + 0.0 * outputs.logits.sum(), numbers, outputs.logits.detach(), batch.samples)

    @torch.no_grad()
    def score(self, batch: Batch) -> torch.Tensor:
        """Probability of fake, (B,) fp32, softmax(logits)[:, 1]."""
        outputs = self._extract(Window([batch]))
        self._decide(outputs, batch, progress=1.0)
        return outputs.logits.softmax(dim=1)[:, 1].float()

    def _extract(self, window: Window) -> Outputs:
        """The detector's outputs for this rank's rows of a window, in canonical order; no logits yet."""
        if window.order is None:
            return self._extract_one(window.batches[0])
        *batches, last = window.batches
        parts = [checkpoint(self._extract_one, batch, use_reentrant=False) for batch in batches]
        return merged_outputs([*parts, self._extract_one(last)], window)

    def _extract_one(self, batch: Batch) -> Outputs:
        half, images = self.precision == "bf16", batch.images
        images = images if self.layout is None else images.contiguous(memory_format=self.layout)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
            outputs = self.detector.extract(images, batch.keys if self.training else None)
        if half:
            outputs.features, outputs.feature_map = outputs.features.float(), outputs.feature_map.float()
            outputs.extras = {name: extra.float() for name, extra in outputs.extras.items()}
        return outputs

    def _decide(self, outputs: Outputs, batch: Batch, progress: float) -> None:
        """Features as the interventions transform them, in recipe order, and logits."""
        for intervention in self._begun(progress):
            outputs.features = intervention.transform(outputs.features, batch, self.comm)
        outputs.logits = self.detector.classify(outputs.features, batch.keys if self.training else None)

    def _objectives(
        self, summaries: dict[str, dict[str, torch.Tensor]], active: dict[str, float]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        parts: list[torch.Tensor] = []  # not a zero to add to: it would come from the host, which waits for that
        numbers: dict[str, torch.Tensor | None] = {}
        for name, part in self.interventions.items():
            if name not in active:
                numbers |= dict.fromkeys([f"loss/{term}" for term in part.terms] + [*part.measures])
                continue
            found = part.objective(summaries.get(name, {}))
            for term in part.terms:
                numbers[f"loss/{term}"] = found[term].detach()
                parts.append(active[name] * found[term])
            numbers |= {measure: found[measure].detach() for measure in part.measures}
        return sum(parts[1:], parts[0]), numbers

    def _begun(self, progress: float) -> list[Intervention]:
        return [part for part in self.interventions.values() if part.begun(progress)]


def merged_outputs(parts: list[Outputs], window: Window) -> Outputs:
    """Outputs of a window's micro-batches as those of one batch. A decoder takes as many rows at a time as each had."""
    first, rows = parts[0], len(parts[0].features)
    extras = {name: window.arranged([part.extras[name] for part in parts]) for name in first.extras}
    features, maps = (window.arranged([getattr(part, name) for part in parts]) for name in ("features", "feature_map"))

    def decode(*columns: torch.Tensor) -> torch.Tensor:
        pieces = zip(*(column.split(rows) for column in columns), strict=True)
        return torch.cat([checkpoint(first.decode, *piece, use_reentrant=False) for piece in pieces])

    return Outputs(features[:, :0], features, maps, extras, decode if first.decode else None)
