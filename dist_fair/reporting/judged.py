"""What a run folder tells of an evaluated dataset, as pictures and comparisons need it: the report and the scores."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dist_fair.demographics import Groups
from dist_fair.engine.run_folder import RunFolder
from dist_fair.errors import DistFairError
from dist_fair.metrics.predictions import Predictions

ALL = "all"


@dataclass(frozen=True)
class Judged:
    """One dataset as one run judged it: its report (`metrics.evaluate`) and the predictions this was made from."""

    report: Mapping
    predictions: Predictions

    @cached_property
    def groups(self) -> Groups | None:
        """The last attribute set of the report, the intersection where there are several attributes."""
        sets = [*self.report["fairness"]]
        attributes = sets[:-1] or sets
        vocabulary = {name: [*self.report["fairness"][name]["groups"]] for name in attributes}
        return Groups.of(attributes, vocabulary) if attributes else None

    @cached_property
    def parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Labels and scores, (n,) each, of all samples ("all") and of every group, which may be without any."""
        label, score = self.predictions.label, self.predictions.score
        parts = {ALL: (label, score)}
        if self.groups:
            codes = self.predictions.codes(self.groups)
            rows = {name: codes == code for code, name in enumerate(self.groups.names)}
            parts |= {name: (label[where], score[where]) for name, where in rows.items()}
        return parts

    def auc(self, part: str) -> float | None:
        """The report's AUC, per frame, of all samples or of a group."""
        if part == ALL:
            return self.report["utility"]["frame"]["AUC"]
        return self.report["fairness"][self.groups.label]["groups"][part]["AUC"]

    def skew(self, group: str) -> float | None:
        """|Skew| of a group: the larger of its two cells, called real and called fake; None if it has neither."""
        cells = (row[group] for row in self.report["fairness"][self.groups.label]["skew_cells"].values())
        return max((abs(cell) for cell in cells if cell is not None), default=None)


def read(folder: Path, datasets: Collection[str] | None = None) -> dict[str, Judged]:
    """Datasets of a run folder, all if not given, in the order of its evaluation.json.

    Raises DistFairError where a file is missing or cannot be read, or predictions are not those of the report.
    """
    run = RunFolder(folder)
    found = {}
    for name, report in run.reports().items():
        if datasets is not None and name not in datasets:
            continue
        predictions = Predictions.read(run.predictions(name))
        if len(predictions) != report["samples"]:
            raise DistFairError(
                f"{run.predictions(name)} has {len(predictions)} samples and {run.evaluation} tells of "
                f"{report['samples']}: run the evaluation again"
            )
        found[name] = Judged(report, predictions)
    if not found:
        raise DistFairError(f"{run.evaluation} is missing or empty: evaluate the run first (dist-fair evaluate)")
    return found


def check_same_samples(judged: Mapping[str, Judged], dataset: str) -> None:
    """Raises DistFairError unless all runs judged the same samples, with the same labels, by the same groups."""
    (first, one), *others = judged.items()
    for name, other in others:
        ids, others_ids = {*one.predictions.sample_id.tolist()}, {*other.predictions.sample_id.tolist()}
        if apart := ids ^ others_ids:
            raise DistFairError(
                f"{dataset}: {first} and {name} judged other samples ({len(apart)} are in one only, such as "
                f"'{min(apart)}'): evaluate both on the same data"
            )
        if _facts(one.predictions) != _facts(other.predictions):
            raise DistFairError(f"{dataset}: {first} and {name} have other labels or attributes for the same samples: "
                                "evaluate both on the same data")  # fmt: skip
        if one.groups != other.groups:
            sets = [judged.groups.names if judged.groups else "none" for judged in (one, other)]
            raise DistFairError(f"{dataset}: {first} was judged by the groups {sets[0]}, {name} by {sets[1]}: evaluate "
                                "both with the same data.attributes")  # fmt: skip


def _facts(predictions: Predictions) -> str:
    """What the data say of the samples, in the order of their ids."""
    order = np.argsort(predictions.sample_id)
    columns = {"label": predictions.label, **predictions.attributes}
    return json.dumps({name: columns[name][order].tolist() for name in sorted(columns)})
