"""Pair alignment (DAID): samples of one label and different demographics get features of one direction."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from dist_fair.data.batch import Batch
from dist_fair.demographics import Groups, combinations
from dist_fair.detectors.base import Outputs
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import Facts, Gather, Intervention, Sum, Summary, Weighted, register
from dist_fair.interventions.heads import forgery_labels
from dist_fair.interventions.pairs import hardest_partners, mean_of_all, mean_of_chosen, sums_by_code, unit_vectors

MATCHES, OPPOSITE = ("label", "manipulation"), "opposite:"


@register("pair_alignment")
class PairAlignment(Intervention):
    """Alignment loss of "Fair Deepfake Detectors Can Generalize", eq. 8 and 9, over pairs of the global batch.

        L_attr = mean over (i, j) in P of (1 - cos(h~_i, h~_j) + epsilon),     P = {(i, j): y_i = y_j, g_i != g_j}

    h~ (B, d) is what the classifier gets, g the combination of `attributes`; a sample of unknown g is in no pair.

    pairs: all                  every pair of P, in closed form from sums per group and label: 8 G M (d + 1) bytes on
                                the wire, whatever B and W are (G groups, M labels or manipulations).
           opposite:ATTRIBUTE   the pairs of P that differ in this attribute and agree in the others. (The authors'
                                code lets the others differ: attributes=[gender], pairs=all.)
           hardest              of every sample the k partners in P of smallest cosine, a mean over ordered pairs.
                                Gathers d + 2 floats per sample; each rank computes all B x B cosines, in chunks.
    match: label                as above.
           manipulation         fakes pair within their manipulation, reals with all reals, as in the authors' code.
                                Fakes of unknown manipulation are in no pair.

    Without pairs the loss is 0 and so are its gradients. A feature vector of norm below 1e-12 has cosine 0 with all
    others and no gradient. From the features on everything is fp64: where they are nearly aligned, the gradient is
    the small part of the sums that is not parallel to h~. At B = 8192, d = 256 and a loss of 1e-3 (1e-5) the fp32
    gradient was off by 1.3e-5 (1.3e-4), relative. Term: pair_alignment.
    """

    terms = ("pair_alignment",)

    @dataclass
    class Settings(Weighted):
        """weight: lambda_attr, the paper's 0.7. pairs, match: see above. hardest: k of pairs=hardest, else null.

        balanced: the mean over all present (match, group, other group) of their mean cosine: large groups count like
        small ones. epsilon: of eq. 9; a constant, without gradient.
        """

        weight: float = 0.7
        attributes: list[str] = field(default_factory=lambda: ["gender", "race"])
        match: str = "label"
        pairs: str = "all"
        hardest: int | None = None
        balanced: bool = False
        epsilon: float = 1e-6

        def __post_init__(self):
            super().__post_init__()
            place = "pair_alignment: "
            if self.match not in MATCHES:
                raise DistFairError(f"{place}match={self.match}: one of {', '.join(MATCHES)}")
            if self.pairs not in ("all", "hardest", *(OPPOSITE + name for name in self.attributes)):
                raise DistFairError(f"{place}pairs={self.pairs}: all, hardest, or {OPPOSITE}ATTRIBUTE with one of "
                                    f"attributes={list(self.attributes)}")  # fmt: skip
            if self.epsilon < 0:
                raise DistFairError(f"{place}epsilon={self.epsilon}: must not be negative")
            mines = self.pairs == "hardest"
            if mines and (self.hardest is None or self.hardest < 1):
                raise DistFairError(f"{place}pairs=hardest, hardest={self.hardest}: how many partners a sample gets, "
                                    "at least 1")  # fmt: skip
            if not mines and self.hardest is not None:
                raise DistFairError(f"{place}hardest={self.hardest} has no effect with pairs={self.pairs}: "
                                    "set pairs=hardest, or hardest=null")  # fmt: skip
            if mines and self.balanced:
                raise DistFairError(f"{place}balanced=true has no effect with pairs=hardest: set balanced=false, "
                                    "or pairs=all")  # fmt: skip

    settings: Settings

    def __init__(self, settings: Settings, facts: Facts, features: int):
        super().__init__(settings, facts, features)
        self.contrast, self.agreeing = facts.groups(settings.attributes), None
        if settings.pairs.startswith(OPPOSITE):
            opposite = settings.pairs.removeprefix(OPPOSITE)
            others = [name for name in settings.attributes if name != opposite]
            self.contrast = facts.groups([opposite])
            self.agreeing = facts.groups(others) if others else None
        if len(self.contrast) < 2:
            raise DistFairError(f"pair_alignment: the data has one value of {self.contrast.label} only, so no two "
                                "samples differ; name other attributes")  # fmt: skip
        if settings.match == "manipulation" and not facts.index.manipulations.values:
            raise DistFairError("pair_alignment: match=manipulation, but the data names no manipulations: set "
                                "match=label, or index the data with them")  # fmt: skip
        self.manipulations = len(facts.index.manipulations.values) if settings.match == "manipulation" else None
        matches = 2 if self.manipulations is None else 1 + self.manipulations
        self.shape = len(self.contrast), matches * (len(self.agreeing) if self.agreeing else 1)
        # Made anew from the data by whoever builds the recipe: not a part of checkpoints.
        self.register_buffer("table", self._table(facts.groups(settings.attributes)), persistent=False)

    def summarise(self, outputs: Outputs, batch: Batch, weights: torch.Tensor) -> Summary:
        """Sums and counts of unit vectors, (G, M, d + 1), or features (B, d) and their codes (B, 2)."""
        rows = self.table[self._columns(batch)]
        if self.settings.pairs != "hardest":
            sums = sums_by_code(unit_vectors(outputs.features.double()), rows)
            return {"sums": Sum(sums.view(*self.shape, -1))}
        features = outputs.features.to(torch.promote_types(outputs.features.dtype, torch.float32))
        return {"features": Gather(features), "codes": Gather(rows.to(features))}

    def objective(self, summary: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "sums" in summary:
            mean, number = mean_of_all(summary["sums"], self.settings.balanced)
        else:
            units, codes = unit_vectors(summary["features"].double()), summary["codes"].detach().long()
            mean, number = mean_of_chosen(units, *hardest_partners(units, *codes.unbind(1), self.settings.hardest))
        return {"pair_alignment": number.clamp_max(1) * (1 + self.settings.epsilon) - mean}

    def codes(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrast and match code of each sample, (B,): they must differ, and agree, in a pair; -1 both for no pair."""
        contrast = self.contrast.codes(batch.attributes)
        match = batch.labels if self.manipulations is None else forgery_labels(batch)
        unknown = (contrast < 0) | (match < 0)
        if self.agreeing is not None:
            shared = self.agreeing.codes(batch.attributes)
            match, unknown = match * len(self.agreeing) + shared, unknown | (shared < 0)
        return torch.where(unknown, -1, contrast), torch.where(unknown, -1, match)

    def _columns(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """All that the codes of a sample depend on: its place in `table`."""
        columns = *(batch.attributes[name] for name in self.settings.attributes), batch.labels
        return columns if self.manipulations is None else (*columns, batch.manipulations)

    def _table(self, groups: Groups) -> torch.Tensor:
        """By `_columns`: the codes, (..., 2), to mine by; else the row of a (B, G M) matrix of who is in which sum."""
        sizes = [*map(len, groups.values), 2, self.manipulations or 0]
        *attributes, labels, manipulations = map(torch.from_numpy, combinations(sizes))
        columns = dict(zip(groups.attributes, attributes, strict=True))
        codes = self.codes(SimpleNamespace(attributes=columns, labels=labels, manipulations=manipulations))
        if self.manipulations is None:
            codes = [code[..., 0] for code in codes]
        if self.settings.pairs == "hardest":
            return torch.stack([*codes], dim=-1)
        (contrast, match), (groups, matches) = codes, self.shape
        identity = torch.eye(groups * matches + 1, groups * matches, dtype=torch.float64)
        return identity[torch.where(match < 0, -1, contrast * matches + match)]
