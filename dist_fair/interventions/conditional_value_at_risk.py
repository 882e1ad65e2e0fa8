"""Conditional value at risk (DAG-FDD, DAW-FDD, PG-FDD): the loss of the worst part of the batch, or of its groups."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from dist_fair.data.batch import Batch
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Gather, Intervention, Summary, Weighted, register
from dist_fair.interventions.order_statistics import smoothed_worst_part, worst_part_weights

OUTERS = ("hinge", "smoothed", "guarded")


@register("conditional_value_at_risk")
class ConditionalValueAtRisk(Intervention):
    """Mean cross-entropy of the worst part: L_DAG and L_DAW of "Improving Fairness in Deepfake Detection" (WACV 2024),
    L_fuse of "Preserving Fairness Generalization in Deepfake Detection" (CVPR 2024, PG-FDD).

        without attributes   CVaR_alpha of all w_i l_i                                              DAG-FDD
        with attributes      CVaR_alpha over the groups g of CVaR_inner_alpha of their w_i l_i      DAW-FDD, PG-FDD

    CVaR_alpha is the mean of the alpha n largest, see `order_statistics`; l_i is the cross-entropy of logits (B, 2).
    Groups are those that have samples in the global batch; a sample of unknown group is left out, and without a known
    one the loss is 0 and so are its gradients. Sample weights w_i scale the losses before they are sorted, so that
    alpha = 1 without attributes is the weighted mean of `cross_entropy`.

    outer: hinge      CVaR_alpha as defined, in closed form.
           smoothed   PG-FDD's, with tau_1 = 1e-3 in place of the hinge's corner and tau_2 = 1e-4: close to the former.
           guarded    what PG-FDD's released code computes. It searches lambda in fp32 and takes overflow for a bad
                      lambda, so lambda stays above the worst group's loss - 0.0887. Where losses differ by more, only
                      the worst group has a gradient, of weight 1 / (alpha G), and the loss is not the minimum over
                      lambda. Not a CVaR; to compare with that code.
    Without attributes `outer` is about samples: each is a group of its own.

    On the wire: 3 floats a sample. Each rank sorts the global batch, in canonical order, in fp64; equal losses go by
    their place in it. Term: conditional_value_at_risk.

    Measure: conditional_value_at_risk_at_chance, what a constant prediction would have got: the best one for w = 1. It
    is the entropy of that share of fakes, of all that the worst part may have, which is nearest to a half.
    """

    terms = ("conditional_value_at_risk",)
    measures = ("conditional_value_at_risk_at_chance",)

    @dataclass
    class Settings(Weighted):
        """attributes: [] for none. inner_alpha: the part of each group, null without attributes.

        alpha: the part of the groups that are there, or of the batch without attributes. outer: see above.
        """

        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        inner_alpha: float | None = 0.9
        alpha: float = 0.5
        outer: str = "hinge"

        def __post_init__(self):
            super().__post_init__()
            place = "conditional_value_at_risk: "
            if not 0 < self.alpha <= 1:
                raise DistFairError(f"{place}alpha={self.alpha}: a part, above 0 and at most 1")
            if self.outer not in OUTERS:
                raise DistFairError(f"{place}outer={self.outer}: one of {', '.join(OUTERS)}")
            if not self.attributes and self.inner_alpha is not None:
                raise DistFairError(f"{place}inner_alpha={self.inner_alpha} has no effect with attributes=[]: set "
                                    "inner_alpha=null, or name attributes")  # fmt: skip
            if self.attributes and (self.inner_alpha is None or not 0 < self.inner_alpha <= 1):
                raise DistFairError(f"{place}inner_alpha={self.inner_alpha}: the part of each group of "
                                    f"attributes={list(self.attributes)}, above 0 and at most 1")  # fmt: skip

    settings: Settings

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.groups = facts.groups(settings.attributes) if settings.attributes else None
        if self.groups is not None and len(self.groups) < 2:
            raise DistFairError(f"conditional_value_at_risk: the data has {len(self.groups)} value of "
                                f"{self.groups.label}, so there is no worst group: name other attributes, or "
                                "attributes=[] and inner_alpha=null")  # fmt: skip

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Per sample, (B, 3): w l, w, and 2 g + y."""
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        losses = functional.cross_entropy(logits, batch.labels, reduction="none")
        codes = torch.zeros_like(batch.labels) if self.groups is None else self.groups.codes(batch.attributes)
        weights, keys = weights.to(losses), (2 * codes + batch.labels).to(losses)
        return {"samples": Gather(torch.stack([weights * losses, weights, keys], dim=1))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        losses, weights, keys = summary["samples"].double().unbind(1)
        codes, labels = keys.detach().long() >> 1, keys.detach().long() & 1
        with torch.no_grad():
            chance = self._risk(weights * self._constant(codes, labels), codes, self.settings.outer)
        risk = self._risk(losses, codes, self.settings.outer)
        return {"conditional_value_at_risk": risk, "conditional_value_at_risk_at_chance": chance}

    def _risk(self, losses: torch.Tensor, codes: torch.Tensor, outer: str) -> torch.Tensor:
        """The scalar that is made of losses (n,) and group codes (n,)."""
        alpha, present = self.settings.alpha, codes >= 0
        if self.groups is not None:
            members = codes == torch.arange(len(self.groups), device=codes.device)[:, None]
            inner = worst_part_weights(losses, codes, len(self.groups), self.settings.inner_alpha)
            # Not by index_add, which rounds differently from rank to rank on a GPU: all must choose the same groups.
            losses, present = torch.where(members, inner * losses, 0).sum(1), members.any(1)
        if outer != "hinge":
            return smoothed_worst_part(losses, present, alpha, outer == "guarded")
        return (worst_part_weights(losses, torch.where(present, 0, -1), 1, alpha) * losses).sum()

    def _constant(self, codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses (n,) of the best constant prediction p, for the hinge and sample weights of 1.

        CVaR is the largest mean over some set of reweighted batches, whose shares of fakes q are an interval. min over
        p and max over q of -q log p - (1 - q) log(1 - p) may change places: the largest entropy, and p is its q.
        """
        most_fakes, most_reals = (self._risk((labels == label).double(), codes, "hinge") for label in (1, 0))
        p = torch.full_like(most_fakes, 0.5).clamp(1 - most_reals, most_fakes)
        return -torch.where(labels == 1, p, 1 - p).clamp_min(torch.finfo(p.dtype).tiny).log()
