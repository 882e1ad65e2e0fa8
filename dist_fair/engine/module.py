"""The one module that a backend wraps: detector and interventions together, forward returns the loss.

DDP, FSDP2 and DeepSpeed see an ordinary nn.Module. Every rank passes its own rows and gets the same global loss back;
see dist_fair.collectives for why the averaged gradients are then the gradients of the global batch.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.detectors.base import Detector, Outputs
from dist_fair.interventions.base import Intervention, Summary, exchange


@dataclass
class Losses:
    """What a forward pass gives.

    loss: the scalar to differentiate, equal on all ranks. numbers: what there is to log: `loss/TERM`, each term before
    its weight, and each measure by its name; None while the weight is 0. logits: (B, 2) of this rank's rows, detached.
    """

    loss: torch.Tensor
    numbers: dict[str, torch.Tensor | None]
    logits: torch.Tensor


class TrainingModule(nn.Module):
    """Detector and interventions of a recipe.

    precision: "fp32", "bf16" or "fp64". bf16 covers the detector's feature extraction only: features, logits,
    statistics and losses are fp32 then. fp64 is for proofs: whatever
    differs there between two ways of splitting a batch is a bug.
    """

    def __init__(self, detector: Detector, interventions: nn.ModuleDict, comm: Communicator, precision: str = "fp32"):
        super().__init__()
        self.detector, self.interventions, self.comm, self.precision = detector, interventions, comm, precision
        if precision == "fp64":
            self.double()

    def outputs(self, batch: Batch, progress: float = 1.0) -> Outputs:
        """Outputs for this rank's rows: detector, feature transforms in recipe order, classifier."""
        half = self.precision == "bf16"
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=half):
            outputs = self.detector.extract(batch.images)
        if half:
            outputs.features, outputs.feature_map = outputs.features.float(), outputs.feature_map.float()
        for intervention in self._begun(progress):
            outputs.features = intervention.transform(outputs.features, batch, self.comm)
        outputs.logits = self.detector.classify(outputs.features)
        return outputs

    def forward(self, batch: Batch, progress: float) -> Losses:
        """The global loss at `progress`, the part of the run that is done, in [0, 1)."""
        outputs = self.outputs(batch, progress)
        weights = outputs.logits.new_ones(len(batch))
        for intervention in self._begun(progress):
            own = intervention.weigh(batch)
            weights = weights if own is None else weights * own
        active = {name: weight for name, part in self.interventions.items() if (weight := part.weight(progress)) > 0}
        summaries: dict[str, Summary] = {
            name: self.interventions[name].summarise(outputs, batch, weights) for name in active
        }
        summaries = {name: summary for name, summary in summaries.items() if summary}
        loss, numbers = self._objectives(exchange(summaries, self.comm, batch.sizes), active)
        # A recipe may train on terms that this rank's rows do not reach; the graph must hold every parameter anyway.
        return Losses(loss + 0.0 * outputs.logits.sum(), numbers, outputs.logits.detach())

    @torch.no_grad()
    def score(self, batch: Batch) -> torch.Tensor:
        """Probability of fake, (B,) fp32, softmax(logits)[:, 1]."""
        return self.outputs(batch).logits.softmax(dim=1)[:, 1].float()

    def _objectives(
        self, summaries: dict[str, dict[str, torch.Tensor]], active: dict[str, float]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        loss: torch.Tensor | float = 0.0
        numbers: dict[str, torch.Tensor | None] = {}
        for name, part in self.interventions.items():
            found = part.objective(summaries.get(name, {})) if name in active else {}
            for term in part.terms:
                numbers[f"loss/{term}"] = found[term].detach() if found else None
                loss = loss + active[name] * found[term] if found else loss
            numbers |= {measure: found[measure].detach() if found else None for measure in part.measures}
        return torch.as_tensor(loss), numbers

    def _begun(self, progress: float) -> list[Intervention]:
        return [part for part in self.interventions.values() if part.begun(progress)]
