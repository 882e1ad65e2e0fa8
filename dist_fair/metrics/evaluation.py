"""The report of one dataset: utility, fairness per attribute set, and intervals, from its predictions."""

from collections.abc import Mapping, Sequence

import numpy as np

from dist_fair.demographics import Groups, attribute_sets
from dist_fair.errors import DistFairError
from dist_fair.metrics.bootstrap import PERCENTILES, interval, strata_of_videos, video_weights
from dist_fair.metrics.fairness import GROUP_RATES, disparities, fairness
from dist_fair.metrics.predictions import Predictions
from dist_fair.metrics.ranking import Counts, Ranking
from dist_fair.metrics.utility import Videos, utility

UNITS = "F_* in per cent, skew as a natural logarithm, every other number a fraction"


def evaluate(
    predictions: Predictions,
    attributes: Mapping[str, Sequence[str]] | Sequence[str],
    bootstrap: int,
    seed: int,
    threshold: float = 0.5,
) -> dict:
    """Every number of one dataset, ready for JSON (None where a number is absent).

    attributes: the values to be judged by attribute name, none of them for all that are found; other values are
    unknown. Fairness is reported over each attribute and over their intersection, on frames. bootstrap: replicates,
    0 for no intervals; seed: of the bootstrap; threshold: called fake where score >= threshold.

    Returns {"samples", "videos", "threshold", "units",
    "utility": {"frame" | "video": {AUC, EER, AP, ACC, FPR, TPR, PR, "samples", "real", "fake", "absent"}},
    "fairness": {"gender" | ... | "gender x race": see metrics.fairness.fairness},
    "intervals": None or {"replicates", "percentiles", "seed", "unit", "strata", "undefined_replicates",
    "utility" and "fairness" with [low, high] in the places of the numbers}}.
    The order of the predictions does not matter. Raises DistFairError for an attribute that is not there.
    """
    if bootstrap < 0:
        raise DistFairError(f"evaluation.bootstrap={bootstrap}: give the number of replicates, or 0 for no intervals")
    declared = attributes if isinstance(attributes, Mapping) else dict.fromkeys(attributes, ())
    dataset = _Dataset(predictions, predictions.vocabulary(declared), threshold)
    report = {
        "samples": len(predictions),
        "videos": len(dataset.videos.name),
        "threshold": threshold,
        "units": UNITS,
        "utility": dataset.utility(),
        "fairness": dataset.fairness(),
        "intervals": dataset.intervals(bootstrap, seed) if bootstrap else None,
    }
    return _plain(report)


class _Dataset:
    """One dataset, sorted for counting: all frames, all videos, and the frames by groups of each attribute set."""

    def __init__(self, predictions: Predictions, vocabulary: Mapping[str, Sequence[str]], threshold: float):
        label, score = predictions.label, predictions.score
        self.predictions, self.threshold = predictions, threshold
        self.videos = Videos.of(predictions)
        self.frame_ranking = Ranking(label, score, threshold)
        self.video_ranking = Ranking(self.videos.label, self.videos.score, threshold)
        self.sets = [Groups.of(names, vocabulary) for names in attribute_sets([*vocabulary])] if vocabulary else []
        self.codes = [predictions.codes(groups) for groups in self.sets]
        self.rankings = [
            Ranking(label, score, threshold, codes, len(groups))
            for groups, codes in zip(self.sets, self.codes, strict=True)
        ]

    def utility(self) -> dict:
        """Utility per frame and per video."""
        levels = {"frame": self.predictions, "video": self.videos}
        report = {}
        for level, data in levels.items():
            numbers = utility(data.label, data.score, self.threshold)
            fake = int(data.label.sum())
            report[level] = {
                **numbers,
                "samples": len(data.label),
                "real": len(data.label) - fake,
                "fake": fake,
                "absent": [name for name, value in numbers.items() if np.isnan(value)],
            }
        return report

    def fairness(self) -> dict:
        """Fairness of each attribute set."""
        ones = np.ones((len(self.predictions), 1))
        overall = self.frame_ranking.rates(self.frame_ranking.count(ones))
        return {
            groups.label: fairness(ranking.rates(ranking.count(ones)), overall, groups.names)
            for groups, ranking in zip(self.sets, self.rankings, strict=True)
        }

    def intervals(self, replicates: int, seed: int) -> dict:
        """Percentile intervals of every number, nested like the numbers."""
        singles = [codes for groups, codes in zip(self.sets, self.codes, strict=True) if len(groups.attributes) == 1]
        strata = strata_of_videos(self.videos.of_sample, [self.predictions.label, *singles])
        chunks = [
            self._replicates(weights) for weights in video_weights(strata, replicates, len(self.predictions), seed)
        ]
        report = {
            "replicates": replicates,
            "percentiles": list(PERCENTILES),
            "seed": seed,
            "unit": "video",
            "strata": len(np.unique(strata)),
        }
        undefined = {}
        for path in chunks[0]:
            values = np.concatenate([chunk[path] for chunk in chunks])
            _put(report, path, interval(values))
            if 0 < np.isnan(values).sum() < replicates:
                undefined[": ".join(path)] = int(np.isnan(values).sum())
        return report | {"undefined_replicates": undefined}

    def _replicates(self, weights: np.ndarray) -> dict[tuple[str, ...], np.ndarray]:
        """Every number, (R,), of R replicates with the video weights (V, R), by its place in the report."""
        samples = weights[self.videos.of_sample]
        frame, video = self.frame_ranking.count(samples), self.video_ranking.count(weights)
        overall = self.frame_ranking.rates(frame)
        numbers = {("utility", "frame", name): row for name, row in _utilities(self.frame_ranking, frame).items()}
        numbers |= {("utility", "video", name): row for name, row in _utilities(self.video_ranking, video).items()}
        for groups, ranking in zip(self.sets, self.rankings, strict=True):
            rates = ranking.rates(ranking.count(samples))
            place = ("fairness", groups.label)
            numbers |= {(*place, name): value for name, value in disparities(rates, overall).items()}
            for name, field in GROUP_RATES.items():
                rows = zip(groups.names, getattr(rates, field), strict=True)
                numbers |= {(*place, "groups", group, name): row for group, row in rows}
        return numbers


def _utilities(ranking: Ranking, counts: Counts) -> dict[str, np.ndarray]:
    """The numbers of `utility`, each (R,)."""
    rates = ranking.rates(counts)
    numbers = {name: getattr(rates, field)[0] for name, field in GROUP_RATES.items()}
    return numbers | {"EER": ranking.equal_error_rate(counts), "AP": ranking.average_precision(counts)}


def _put(report: dict, path: tuple[str, ...], value: object) -> None:
    *folders, name = path
    for folder in folders:
        report = report.setdefault(folder, {})
    report[name] = value


def _plain(value):
    """For JSON: NaN becomes None, an interval of NaN too."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return None if value and all(part != part for part in value) else [_plain(part) for part in value]
    return None if value != value else value
