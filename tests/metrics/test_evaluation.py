"""The report against scikit-learn, fairlearn, and the definitions written out as loops."""

import json

import fairlearn.metrics
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, recall_score, roc_auc_score

from dist_fair.errors import DistFairError
from dist_fair.metrics import Predictions, evaluate
from tests.metrics.predicted import VOCABULARY, make, take

SETS = {"gender": ["gender"], "race": ["race"], "gender x race": ["gender", "race"]}


def known(predictions, attributes):
    """Rows of known groups, and the group of each."""
    values = [predictions.attributes[name] for name in attributes]
    rows = np.all([value != "unknown" for value in values], axis=0)
    return rows, np.array(["/".join(row) for row in zip(*values, strict=True)])[rows]


def frame(predictions, attributes, metrics):
    rows, group = known(predictions, attributes)
    called = predictions.score[rows] >= 0.5
    return fairlearn.metrics.MetricFrame(
        metrics=metrics, y_true=predictions.label[rows], y_pred=called, sensitive_features=group
    )


def test_utility_of_frames_and_videos_is_that_of_scikit_learn():
    predictions = make(unknown=0.5)
    report = evaluate(predictions, VOCABULARY, bootstrap=0, seed=0)["utility"]
    videos = sorted(set(predictions.video))
    label = np.array([predictions.label[predictions.video == video][0] for video in videos])
    score = np.array([predictions.score[predictions.video == video].mean() for video in videos])
    for level, y, s in (("frame", predictions.label, predictions.score), ("video", label, score)):
        assert report[level]["samples"] == len(y)
        assert report[level]["AUC"] == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        assert report[level]["AP"] == pytest.approx(average_precision_score(y, s), abs=1e-12)
        assert report[level]["ACC"] == pytest.approx(accuracy_score(y, s >= 0.5), abs=1e-12)
        assert report[level]["TPR"] == pytest.approx(recall_score(y, s >= 0.5), abs=1e-12)
        assert report[level]["FPR"] == pytest.approx(1 - recall_score(y, s >= 0.5, pos_label=0), abs=1e-12)
        assert report[level]["PR"] == pytest.approx(np.mean(s >= 0.5), abs=1e-12)
    assert report["video"]["samples"] == 80


def test_eer_is_the_rate_where_misses_and_false_alarms_meet():
    label, score = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0.1, 0.2, 0.3, 0.8, 0.4, 0.6, 0.7, 0.9])
    names = [str(index) for index in range(8)]
    report = evaluate(Predictions(names, names, label, score, {}), {}, bootstrap=0, seed=0)
    assert report["utility"]["frame"]["EER"] == 0.25
    assert report["fairness"] == {}


def test_eer_where_misses_and_false_alarms_meet_inside_a_straight_piece_of_the_roc_curve():
    """FPR runs from 0 to 1 at TPR 1/2: scikit-learn's default leaves out the point (1/2, 1/2) and would give 0."""
    pairs = zip((1, 1, 0, 0, 0, 0, 1, 1), (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2), strict=True)
    rows = [(label, score, "A") for label, score in pairs]
    assert evaluate(hand_made(rows), {}, bootstrap=0, seed=0)["utility"]["frame"]["EER"] == 0.5


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_order_of_the_frames_cannot_move_the_mean_of_a_video(order):
    """(0.1 + 0.2 + 0.3) / 3 is above 0.2 and (0.3 + 0.2 + 0.1) / 3 below it, in floating point."""
    scores = np.array([0.1, 0.2, 0.3])[order]
    predictions = Predictions(["a", "b", "c"], ["v"] * 3, [1, 1, 1], scores, {})
    assert evaluate(predictions, {}, bootstrap=0, seed=0, threshold=0.2)["utility"]["video"]["TPR"] == 1.0


@pytest.mark.parametrize("name", SETS)
def test_group_rates_and_ranges_are_those_of_fairlearn(name):
    predictions = make()
    report = evaluate(predictions, VOCABULARY, bootstrap=0, seed=0)["fairness"][name]
    metrics = {
        "FPR": fairlearn.metrics.false_positive_rate,
        "TPR": fairlearn.metrics.true_positive_rate,
        "ACC": accuracy_score,
        "PR": fairlearn.metrics.selection_rate,
        "n": fairlearn.metrics.count,
    }
    frames = frame(predictions, SETS[name], metrics)
    for group, row in frames.by_group.iterrows():
        for metric in metrics:
            assert report["groups"][group][metric] == pytest.approx(row[metric], abs=1e-12)
    assert len(report["groups"]) == len(frames.by_group)
    ranges = 100 * frames.difference(method="between_groups")
    assert report["F_DP"] == pytest.approx(ranges["PR"], abs=1e-10)
    assert report["F_OAE"] == pytest.approx(ranges["ACC"], abs=1e-10)
    assert report["F_MEO"] == pytest.approx(max(ranges["FPR"], ranges["TPR"]), abs=1e-10)
    rows, group = known(predictions, SETS[name])
    called = predictions.score[rows] >= 0.5
    parity = fairlearn.metrics.demographic_parity_difference(predictions.label[rows], called, sensitive_features=group)
    odds = fairlearn.metrics.equalized_odds_difference(predictions.label[rows], called, sensitive_features=group)
    assert report["F_DP"] == pytest.approx(100 * parity, abs=1e-10)
    assert report["F_MEO"] == pytest.approx(100 * odds, abs=1e-10)
    assert report["unknown"] == len(predictions) - rows.sum()


def by_definition(label, called, score, group, names):
    """F_FPR, F_EO, es-AUC and all Skews, as the papers write them; groups of "" are unknown."""

    def rate(of):
        return called[of].mean() if of.any() else np.nan

    f_fpr = f_eo = gaps = 0.0
    for name in names:
        here = group == name
        fpr_gap = abs(rate(here & (label == 0)) - rate(label == 0))
        tpr_gap = abs(rate(here & (label == 1)) - rate(label == 1))
        f_fpr += fpr_gap
        f_eo += fpr_gap + tpr_gap
        gaps += abs(roc_auc_score(label[here], score[here]) - roc_auc_score(label, score))
    skew = {}
    for c, word in enumerate(("real", "fake")):
        for name in names:
            called_share = ((called == c) & (group == name)).sum() / (called == c).sum()
            true_share = ((label == c) & (group == name)).sum() / (label == c).sum()
            skew[word, name] = np.log(called_share / true_share)
    return 100 * f_fpr, 100 * f_eo, roc_auc_score(label, score) / (1 + gaps), skew


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("seed", range(3))
def test_disparities_are_their_definitions(name, seed):
    predictions = make(videos=200, seed=seed)
    report = evaluate(predictions, VOCABULARY, bootstrap=0, seed=0)["fairness"][name]
    rows, known_groups = known(predictions, SETS[name])
    group = np.full(len(predictions), "", dtype="U20")
    group[rows] = known_groups
    called = (predictions.score >= 0.5).astype(int)
    f_fpr, f_eo, es_auc, skew = by_definition(predictions.label, called, predictions.score, group, report["groups"])
    assert report["F_FPR"] == pytest.approx(f_fpr, abs=1e-10)
    assert report["F_EO"] == pytest.approx(f_eo, abs=1e-10)
    assert report["es-AUC"] == pytest.approx(es_auc, abs=1e-12)
    for (word, group_name), value in skew.items():
        assert report["skew_cells"][word][group_name] == pytest.approx(value, abs=1e-12)
    assert report["skew"] == pytest.approx(max(map(abs, skew.values())), abs=1e-12)
    assert report["skew_max"] == pytest.approx(max(skew.values()), abs=1e-12)
    assert report["skew_min"] == pytest.approx(min(skew.values()), abs=1e-12)
    assert report["skew_range"] == pytest.approx(report["skew_max"] - report["skew_min"], abs=1e-12)
    assert report["absent"] == {}


def hand_made(rows):
    """Predictions from rows of (label, score, race)."""
    label, score, race = zip(*rows, strict=True)
    names = [str(index) for index in range(len(rows))]
    return Predictions(names, names, label, score, {"race": race})


def test_a_group_without_a_class_is_named_and_its_other_rates_count():
    predictions = hand_made(
        [(0, 0.9, "A"), (0, 0.1, "A"), (1, 0.8, "A"), (0, 0.2, "B"), (1, 0.3, "B"), (1, 0.9, "C"), (1, 0.4, "unknown")]
    )
    report = evaluate(predictions, {"race": ["A", "B", "C", "D"]}, bootstrap=0, seed=0)["fairness"]["race"]
    assert report["absent"] == {
        "AUC": ["C", "D"],
        "FPR": ["C", "D"],
        "TPR": ["D"],
        "ACC": ["D"],
        "PR": ["D"],
        "skew": ["real|C", "real|D", "fake|D"],
    }
    used = {"F_FPR": 2, "F_EO": 3, "F_MEO": 3, "F_DP": 3, "F_OAE": 3, "es-AUC": 2, "skew": 3}
    assert report["groups_used"] == used
    assert report["unknown"] == 1
    fpr = abs(1 / 2 - 1 / 3) + abs(0 - 1 / 3)
    tpr = abs(1 - 2 / 4) + abs(0 - 2 / 4) + abs(1 - 2 / 4)
    assert report["F_FPR"] == pytest.approx(100 * fpr)
    assert report["F_EO"] == pytest.approx(100 * (fpr + tpr))
    assert report["F_MEO"] == pytest.approx(100 * 1.0)
    assert report["groups"]["C"] == {
        "n": 1, "n_real": 0, "n_fake": 1, "AUC": None, "FPR": None, "TPR": 1.0, "ACC": 1.0, "PR": 1.0,
    }  # fmt: skip
    assert report["groups"]["D"]["n"] == 0


def test_a_cell_that_nobody_is_called_into_is_smoothed_not_infinite():
    rows = [(0, 0.1, "A"), (1, 0.9, "A"), (1, 0.8, "A"), (0, 0.1, "B"), (1, 0.2, "B")]
    report = evaluate(hand_made(rows), ["race"], bootstrap=0, seed=0)["fairness"]["race"]
    assert report["skew_cells"]["fake"]["B"] == pytest.approx(np.log((0.5 / (2 + 0.5 * 2)) / (1 / 3)))
    assert report["skew_cells"]["fake"]["A"] == pytest.approx(np.log((2 / 2) / (2 / 3)))
    assert report["skew"] == -report["skew_min"]


@pytest.mark.parametrize("label", [0, 1])
def test_a_dataset_of_one_class_lacks_what_needs_the_other(label):
    rows = [(label, 0.2, "A"), (label, 0.7, "A"), (label, 0.9, "B")]
    report = evaluate(hand_made(rows), ["race"], bootstrap=5, seed=0)
    lacking = ["AUC", "EER", "AP", "TPR"] if label == 0 else ["AUC", "EER", "FPR"]
    for level in ("frame", "video"):
        assert sorted(report["utility"][level]["absent"]) == sorted(lacking)
        assert all(report["utility"][level][name] is None for name in lacking)
        assert all(report["intervals"]["utility"][level][name] is None for name in lacking)
    race = report["fairness"]["race"]
    assert race["F_DP"] == pytest.approx(50.0)
    assert race["F_EO"] is race["F_MEO"] is race["es-AUC"] is None
    assert (race["F_FPR"] is None) == (label == 1)
    json.dumps(report, allow_nan=False)


def test_a_range_over_one_group_is_absent():
    rows = [(0, 0.2, "A"), (1, 0.7, "A"), (1, 0.7, "unknown")]
    race = evaluate(hand_made(rows), {"race": ["A", "B"]}, bootstrap=3, seed=0)["fairness"]["race"]
    assert race["F_DP"] is race["F_OAE"] is race["F_MEO"] is None
    assert race["groups_used"]["F_DP"] == 1


def test_all_scores_equal():
    report = evaluate(hand_made([(0, 0.7, "A"), (1, 0.7, "A"), (0, 0.7, "B"), (1, 0.7, "B")]), ["race"], 10, 0)
    assert report["utility"]["frame"]["AUC"] == 0.5
    race = report["fairness"]["race"]
    assert (race["F_FPR"], race["F_EO"], race["F_DP"], race["es-AUC"]) == (0, 0, 0, 0.5)
    assert race["absent"] == {"skew": ["real|A", "real|B"]}, "nobody is called real"
    assert race["skew"] == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10), st.sampled_from("ABC?")), min_size=1, max_size=25))
def test_any_data_give_a_report_without_nan(rows):
    rows = [(label, score / 10, "unknown" if race == "?" else race) for label, score, race in rows]
    report = evaluate(hand_made(rows), {"race": ["A", "B", "C"]}, bootstrap=4, seed=1)
    json.dumps(report, allow_nan=False)
    race = report["fairness"]["race"]
    assert sum(group["n"] for group in race["groups"].values()) + race["unknown"] == len(rows)
    for rate in ("AUC", "FPR", "TPR", "ACC", "PR"):
        absent = {name for name, group in race["groups"].items() if group[rate] is None}
        assert set(race["absent"].get(rate, [])) == absent


def test_order_of_the_samples_does_not_matter():
    predictions = make(decimals=8)
    shuffled = take(predictions, np.random.default_rng(5).permutation(len(predictions)))
    one, other = (evaluate(p, VOCABULARY, bootstrap=20, seed=3) for p in (predictions, shuffled))
    assert one == other


def test_values_that_are_not_declared_are_unknown():
    report = evaluate(make(unknown=0), {"race": ["Asian", "Black"]}, bootstrap=0, seed=0)["fairness"]["race"]
    assert list(report["groups"]) == ["Asian", "Black"]
    assert report["unknown"] == (make(unknown=0).attributes["race"] == "White").sum() > 0


def test_bad_settings_are_named():
    with pytest.raises(DistFairError, match=r"evaluation.bootstrap=-1"):
        evaluate(make(), VOCABULARY, bootstrap=-1, seed=0)
    with pytest.raises(DistFairError, match="'age' is not in the predictions"):
        evaluate(make(), ["age"], bootstrap=0, seed=0)
