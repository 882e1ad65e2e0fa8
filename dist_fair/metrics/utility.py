"""How well real and fake are told apart, per frame and per video. All numbers are fractions in [0, 1]."""

from dataclasses import dataclass

import numpy as np

from dist_fair.metrics.predictions import Predictions

UTILITY = ("AUC", "EER", "AP", "ACC", "FPR", "TPR", "PR")


@dataclass(frozen=True)
class Videos:
    """The V videos of a dataset, sorted by name.

    name, label, score: (V,), the score the mean over the video's samples; samples: (V,) how many it has;
    of_sample: (N,) the video of each sample.
    """

    name: np.ndarray
    label: np.ndarray
    score: np.ndarray
    samples: np.ndarray
    of_sample: np.ndarray

    @classmethod
    def of(cls, predictions: Predictions) -> "Videos":
        name, first, video = np.unique(predictions.video, return_index=True, return_inverse=True)
        # Summed in order of score, so that the order of the file cannot move a mean by a rounding.
        order = np.lexsort((predictions.score, video))
        samples = np.bincount(video)
        score = np.bincount(video[order], predictions.score[order]) / samples
        return cls(name, predictions.label[first], score, samples, video)


def utility(label: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, float]:
    """AUC, EER, AP, and ACC, FPR, TPR, PR at `threshold`; NaN where a class that the number needs is not there.

    label: (N,) 0 real, 1 fake; score: (N,). Called fake where score >= threshold. EER is the FPR of the strictest
    threshold at which |FNR - FPR| is least, without interpolation; AP is the average precision of the fakes;
    PR = P(called fake), to be read beside the prevalence of fakes.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    real, fake = label == 0, label == 1
    called = score >= threshold
    numbers = dict.fromkeys(UTILITY, np.nan) | {"ACC": np.mean(called == fake), "PR": np.mean(called)}
    if real.any():
        numbers["FPR"] = np.mean(called[real])
    if fake.any():
        numbers["TPR"] = np.mean(called[fake])
        numbers["AP"] = average_precision_score(label, score)
    if real.any() and fake.any():
        # Every threshold: the points that scikit-learn drops by default can be where FNR and FPR meet.
        fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
        numbers["EER"] = fpr[np.argmin(np.abs((1 - tpr) - fpr))]
        numbers["AUC"] = roc_auc_score(label, score)
    return {name: float(value) for name, value in numbers.items()}
