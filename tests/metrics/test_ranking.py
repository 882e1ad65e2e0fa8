"""Counts over sorted scores against scikit-learn, ties and weights included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score, roc_curve

from dist_fair.metrics.ranking import Ranking

samples = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 8), st.integers(0, 4), st.integers(-1, 3)), min_size=1, max_size=40
)


def unpack(rows):
    label, score, weight, code = np.array(rows).T
    return label, score / 8, weight.astype(float), code


@settings(max_examples=300, deadline=None)
@given(samples)
def test_rates_of_each_group_are_those_of_scikit_learn(rows):
    label, score, weight, code = unpack(rows)
    ranking = Ranking(label, score, 0.5, code, groups=4)
    rates = ranking.rates(ranking.count(weight[:, None]))
    for g in range(4):
        here = (code == g) & (weight > 0)
        expected = dict.fromkeys(("auc", "fpr", "tpr", "acc", "pr"), np.nan)
        if here.any():
            (tn, fp), (fn, tp) = confusion_matrix(
                label[here], score[here] >= 0.5, labels=[0, 1], sample_weight=weight[here]
            )
            assert rates.real[g, 0] == tn + fp
            assert rates.fake[g, 0] == fn + tp
            expected |= {"acc": (tp + tn) / (tn + fp + fn + tp), "pr": (fp + tp) / (tn + fp + fn + tp)}
            expected["fpr"] = fp / (tn + fp) if tn + fp else np.nan
            expected["tpr"] = tp / (fn + tp) if fn + tp else np.nan
            if tn + fp and fn + tp:
                expected["auc"] = roc_auc_score(label[here], score[here], sample_weight=weight[here])
        for name, value in expected.items():
            assert getattr(rates, name)[g, 0] == pytest.approx(value, abs=1e-13, nan_ok=True)


@settings(max_examples=300, deadline=None)
@given(samples)
def test_eer_and_ap_are_those_of_scikit_learn(rows):
    label, score, weight, _ = unpack(rows)
    ranking = Ranking(label, score, 0.5)
    counts = ranking.count(weight[:, None])
    here = weight > 0
    eer = ap = np.nan
    if (label[here] == 1).any():
        ap = average_precision_score(label[here], score[here], sample_weight=weight[here])
        if (label[here] == 0).any():
            fpr, tpr, _ = roc_curve(label[here], score[here], sample_weight=weight[here], drop_intermediate=False)
            eer = fpr[np.argmin(np.abs((1 - tpr) - fpr))]
    assert ranking.equal_error_rate(counts)[0] == pytest.approx(eer, abs=1e-13, nan_ok=True)
    assert ranking.average_precision(counts)[0] == pytest.approx(ap, abs=1e-13, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(samples)
def test_weight_two_is_the_sample_twice_to_the_last_bit(rows):
    label, score, weight, code = unpack(rows)
    weighted = Ranking(label, score, 0.5, code, groups=4)
    again = np.repeat(np.arange(len(label)), weight.astype(int))
    copied = Ranking(label[again], score[again], 0.5, code[again], groups=4)
    first = weighted.rates(weighted.count(weight[:, None]))
    second = copied.rates(copied.count(np.ones((len(again), 1))))
    for name in ("real", "fake", "auc", "fpr", "tpr", "acc", "pr"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_replicates_side_by_side_are_those_alone():
    random = np.random.default_rng(0)
    label, score, code = random.integers(2, size=50), random.random(50).round(1), random.integers(-1, 3, size=50)
    weights = random.integers(0, 3, size=(50, 7)).astype(float)
    ranking = Ranking(label, score, 0.5, code, groups=3)
    together = ranking.rates(ranking.count(weights))
    for column in range(7):
        alone = ranking.rates(ranking.count(weights[:, column : column + 1]))
        np.testing.assert_array_equal(together.auc[:, column], alone.auc[:, 0])
        np.testing.assert_array_equal(together.fpr[:, column], alone.fpr[:, 0])


def test_the_threshold_itself_is_called_fake():
    ranking = Ranking(np.array([0, 0, 1, 1]), np.array([0.5, np.nextafter(0.5, 0), 0.5, 0.7]), 0.5)
    rates = ranking.rates(ranking.count(np.ones((4, 1))))
    assert (rates.fpr.item(), rates.tpr.item(), rates.acc.item()) == (0.5, 1.0, 0.75)


def test_equal_scores_are_chance():
    ranking = Ranking(np.array([0, 1, 1]), np.full(3, 0.3), 0.5)
    assert ranking.rates(ranking.count(np.ones((3, 1)))).auc.item() == 0.5
