"""ACE against a naive reference: explicit loops, drawn samples copied out, scikit-learn's AUC."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dist_fair import keyed
from dist_fair.errors import DistFairError
from dist_fair.metrics import Predictions, evaluate
from dist_fair.studies import ace
from dist_fair.studies.ace import average_causal_effect, distribution, p_values
from tests.ranks import run_ranks
from tests.studies.ace_worlds import GROUPS, MODELS, STRATA, draw, messy, on_a_rank, true_effect

REPLICATES = 12


def effect(predictions, rows):
    """ACE and mu_0 on the given rows (a row as often as it is there); P and strata from all samples. Plain loops."""
    samples = predictions[MODELS[0]]
    group = np.array(["/".join(pair) for pair in zip(*(samples.attributes[name] for name in GROUPS), strict=True)])
    strata = [name for name in sorted({*group}) if "unknown" not in name and len({*samples.label[group == name]}) == 2]
    n = sum((group == name).sum() for name in strata)
    total, before = 0.0, 0.0
    for name in strata:
        share = (group == name).sum() / n / 2
        chosen = rows[group[rows] == name]
        if len({*samples.label[chosen]}) < 2:
            return np.nan, np.nan
        for mc in ("low", "high"):
            plain, fair = (roc_auc_score(samples.label[chosen], predictions[mc, f].score[chosen]) for f in (0, 1))
            total, before = total + (fair - plain) * share, before + plain * share
    return total, before


def drawn_rows(predictions, unit, seed, b):
    """Replicate b, by hand: units sorted by (stratum, name), each place of a stratum takes one of its units."""
    samples = predictions[MODELS[0]]
    pairs = [*zip(*(samples.attributes[name] for name in GROUPS), strict=True)]
    used = [row for row in range(len(samples)) if _in_a_stratum(samples, pairs, row)]
    names = sorted({samples.video[row] for row in used}) if unit == "video" else used
    members = {name: [row for row in used if (samples.video[row] if unit == "video" else row) == name]
               for name in names}  # fmt: skip
    kinds = {name: _commonest([(samples.label[row], *pairs[row]) for row in rows]) for name, rows in members.items()}
    order = sorted(names, key=lambda name: kinds[name])  # stable
    uniform, rows = keyed.generator(seed, "ace", b).random(len(order)), []
    for place, name in enumerate(order):
        peers = [other for other in order if kinds[other] == kinds[name]]
        rows += members[peers[int(uniform[place] * len(peers))]]
    return np.array(rows)


def _in_a_stratum(samples, pairs, row):
    alike = [label for label, pair in zip(samples.label, pairs, strict=True) if pair == pairs[row]]
    return "unknown" not in pairs[row] and len({*alike}) == 2


def _commonest(kinds):
    return min({*kinds}, key=lambda kind: (-kinds.count(kind), kind))


@pytest.mark.parametrize(("unit", "rare"), [("video", 0), ("frame", 2), ("video", 2)])
def test_point_and_every_replicate_are_those_of_the_naive_reference(unit, rare):
    predictions = messy(rare=rare)
    report = average_causal_effect(predictions, GROUPS, REPLICATES, unit, seed=3)
    expected = effect(predictions, np.arange(len(predictions[MODELS[0]])))
    np.testing.assert_allclose((report["ACE"], report["mu_0"]), expected, rtol=0, atol=1e-12)
    values = np.array(report["bootstrap"]["values"], dtype=float)
    for b, value in enumerate(values):
        np.testing.assert_allclose(value, effect(predictions, drawn_rows(predictions, unit, 3, b))[0], atol=1e-12)
    there = values[~np.isnan(values)]
    defined = range(1, REPLICATES) if unit == "video" and rare else [REPLICATES]
    assert len(there) in defined
    assert report["bootstrap"]["undefined_replicates"] == REPLICATES - len(there)
    assert report["bootstrap"]["interval"] == pytest.approx(np.percentile(there, [2.5, 97.5]))
    assert report["bootstrap"]["mean"] == pytest.approx(there.mean())
    json.dumps(report, allow_nan=False)


def test_what_is_left_out_is_told_and_P_is_taken_over_the_rest():
    predictions = messy()
    samples = predictions[MODELS[0]]
    report = average_causal_effect(predictions, GROUPS, 2)
    assert report["unknown"] == (samples.attributes["gender"] == "unknown").sum() > 0
    assert [*report["left_out"]] == ["male/Black"]
    left = report["left_out"]["male/Black"]
    assert left["n_fake"] == 0 < left["n_real"] == left["n"]
    assert sum(cell["P"] for cell in report["cells"]) == pytest.approx(1)
    used = sum(cell["n"] for cell in report["cells"]) // 2
    assert used + left["n"] + report["unknown"] == report["samples"] == len(samples)
    assert all(cell["P"] == pytest.approx(cell["n"] / used / 2) for cell in report["cells"])


def test_cells_and_capacities_add_up_to_the_effect():
    report = average_causal_effect(draw(0), GROUPS, 20)
    cells = report["cells"]
    assert [cell["stratum"] for cell in cells] == 2 * ["/".join(pair) for pair in STRATA]
    assert sum(cell["P"] * cell["difference"] for cell in cells) == pytest.approx(report["ACE"])
    assert sum(cell["P"] * cell["AUC_0"] for cell in cells) == pytest.approx(report["mu_0"])
    assert np.mean([found["ACE"] for found in report["capacities"].values()]) == pytest.approx(report["ACE"])
    assert all(low < cell["difference"] < high for cell in cells for low, high in [cell["interval"]])
    assert all(
        low < found["ACE"] < high for found in report["capacities"].values() for low, high in [found["interval"]]
    )


def test_skew_is_that_of_the_evaluation():
    predictions = messy()
    report = average_causal_effect(predictions, GROUPS, 1)
    for (mc, f), found in predictions.items():
        expected = evaluate(found, GROUPS, 0, 0)
        assert report["capacities"][mc]["skew"][f] == expected["fairness"]["gender x race"]["skew"]
        assert report["capacities"][mc]["called_fake"][f] == expected["utility"]["frame"]["PR"]


def test_the_order_of_a_file_does_not_matter():
    predictions = messy()
    shuffled = {model: _reordered(found, place) for place, (model, found) in enumerate(predictions.items())}
    assert average_causal_effect(shuffled, GROUPS, 20) == average_causal_effect(predictions, GROUPS, 20)


def _reordered(found, seed):
    order = np.random.default_rng(seed).permutation(len(found))
    fields = (values[order] for values in (found.sample_id, found.video, found.label, found.score))
    return Predictions(*fields, {name: values[order] for name, values in found.attributes.items()})


def test_one_capacity_and_three_are_weighted_equally():
    predictions = draw(1)
    low = {model: found for model, found in predictions.items() if model[0] == "low"}
    alone = average_causal_effect(low, GROUPS, 5)
    high = average_causal_effect({("high", f): predictions["high", f] for f in (0, 1)}, GROUPS, 5)
    three = average_causal_effect(predictions | {("top", f): predictions["high", f] for f in (0, 1)}, GROUPS, 5)
    assert three["ACE"] == pytest.approx((alone["ACE"] + 2 * high["ACE"]) / 3)
    assert three["bootstrap"]["values"] == pytest.approx(
        (np.array(alone["bootstrap"]["values"]) + 2 * np.array(high["bootstrap"]["values"])) / 3
    )


# Any number of ranks


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_same_on_any_number_of_ranks_to_the_last_bit(world):
    """10 replicates, and 2, fewer than ranks; draws that depend on the rank are noticed."""
    many, few = (average_causal_effect(messy(), GROUPS, replicates) for replicates in (10, 2))
    for rank, found in enumerate(run_ranks(world, on_a_rank)):
        assert found["many"] == many
        assert found["few"] == few
        assert found["observed"] == len(range(rank, 10, world))
        noticed = found["draws_of_the_rank"]["bootstrap"]["values"] != many["bootstrap"]["values"]
        assert noticed == (world > 1)


# The bootstrap


def width(report):
    low, high = report["bootstrap"]["interval"]
    return high - low


def test_draws_that_differ_between_regimes_widen_the_interval(monkeypatch):
    """The planted bug: each model its own draws. Paired, what the models share cancels."""
    paired = width(average_causal_effect(draw(0, shared=0.9), GROUPS, 200))
    original = ace.replicate

    def unpaired(curves, draws, replicates, comm, observe):
        parts = []
        for place, curve in enumerate(curves):
            draws.units.seed = 1000 + place
            parts.append(original([curve], draws, replicates, comm, observe))
        return np.concatenate(parts, axis=1)

    monkeypatch.setattr(ace, "replicate", unpaired)
    assert width(average_causal_effect(draw(0, shared=0.9), GROUPS, 200)) > 1.5 * paired


def test_models_drawn_by_the_order_of_their_own_files_are_noticed(monkeypatch):
    """The planted bug: samples not aligned, so that regimes have other strata for the same draw."""
    predictions = messy()
    shuffled = {model: _reordered(found, place) for place, (model, found) in enumerate(predictions.items())}
    monkeypatch.setattr(ace, "aligned", lambda found, attributes: found)
    assert average_causal_effect(shuffled, GROUPS, 5)["ACE"] != average_causal_effect(predictions, GROUPS, 5)["ACE"]


def test_frames_of_a_video_are_no_independent_samples():
    video, frame = (width(average_causal_effect(draw(0), GROUPS, 200, unit)) for unit in ("video", "frame"))
    assert video > 1.15 * frame


def test_a_replicate_depends_on_the_seed_and_its_number_alone():
    few, many, other = (average_causal_effect(messy(), GROUPS, *s)["bootstrap"]["values"]
                        for s in ((5, "video", 1), (9, "video", 1), (5, "video", 2)))  # fmt: skip
    assert few == many[:5]
    assert few != other


def test_a_known_effect_lies_in_its_interval():
    """40 held-out sets: of intervals that cover 95 %, fewer than 34 of 40 would in 0.3 % of such tests."""
    effect, mu_0 = true_effect()
    reports = [average_causal_effect(draw(seed), GROUPS, 200, seed=seed) for seed in range(40)]
    covered = sum(low <= effect <= high for report in reports for low, high in [report["bootstrap"]["interval"]])
    assert covered >= 34
    assert np.mean([report["ACE"] for report in reports]) == pytest.approx(effect, abs=0.01)
    assert np.mean([report["mu_0"] for report in reports]) == pytest.approx(mu_0, abs=0.01)


@pytest.mark.parametrize(
    ("below", "zero", "above", "unsmoothed", "smoothed"),
    [
        (0, 0, 1000, 0.0, 2 / 1001),
        (1000, 0, 0, 0.0, 2 / 1001),
        (10, 0, 990, 0.02, 22 / 1001),
        (5, 5, 990, 0.02, 22 / 1001),
        (500, 0, 500, 1.0, 1.0),
        (0, 100, 0, 1.0, 1.0),
    ],
)
def test_both_conventions_of_p(below, zero, above, unsmoothed, smoothed):
    values = np.concatenate([np.full(below, -1.0), np.zeros(zero), np.ones(above)])
    assert p_values(values) == pytest.approx((unsmoothed, smoothed))


def test_replicates_that_are_undefined_are_counted_and_not_used():
    found = distribution(np.array([0.1, np.nan, 0.3]))
    assert found["undefined_replicates"] == 1
    assert found["mean"] == pytest.approx(0.2)
    assert (found["p_unsmoothed"], found["p_smoothed"]) == pytest.approx((0, 2 / 3))
    assert found["values"] == [0.1, None, 0.3]
    nothing = distribution(np.array([np.nan, np.nan]))
    assert (nothing["mean"], nothing["interval"], nothing["p_unsmoothed"]) == (None, None, None)


# What is refused


def _changed(predictions, model, **columns):
    found = predictions[model]
    given = {"sample_id": found.sample_id, "video": found.video, "label": found.label, "score": found.score,
             "attributes": found.attributes}  # fmt: skip
    return predictions | {model: Predictions(**(given | columns))}


def test_models_with_other_samples_are_refused():
    predictions, model = draw(0), ("high", 1)
    found = predictions[model]
    ids = np.where(found.sample_id == "00003", "x", found.sample_id)
    race = np.where(found.sample_id == "00003", "White", found.attributes["race"])
    for columns, text in (
        ({"sample_id": ids}, r"low/0 has sample '00003' and high/1 has not \(2 such samples\): evaluate all runs on"),
        ({"label": 1 - found.label}, r"its label is '1' in high/1 and '0' in low/0 \(1800 such samples\)"),
        ({"video": np.char.add(found.video, "x")}, "its video is 'real/0000x' in high/1 and 'real/0000' in low/0"),
        ({"attributes": found.attributes | {"race": race}}, "sample '00003': its race is 'White' in high/1"),
        ({"attributes": {"gender": found.attributes["gender"]}}, "high/1: attribute 'race' is not in the predictions"),
    ):
        with pytest.raises(DistFairError, match=text):
            average_causal_effect(_changed(predictions, model, **columns), GROUPS, 1)


def test_settings_out_of_range_are_refused():
    predictions = messy()
    for arguments, text in (
        ((GROUPS, 0), "replicates=0"),
        ((GROUPS, 1, "person"), "unit=person: one of video, frame"),
        ((["gendre"],), "low/0: attribute 'gendre' is not in the predictions: did you mean 'gender'"),
        (([],), "name at least one attribute"),
    ):
        with pytest.raises(DistFairError, match=text):
            average_causal_effect(predictions, *arguments)
    with pytest.raises(DistFairError, match="no run high/1: every capacity needs F=0 and F=1"):
        average_causal_effect({model: predictions[model] for model in MODELS[:3]}, GROUPS)


def test_no_group_of_both_classes_is_refused():
    predictions = draw(0)
    kind = np.where(predictions[MODELS[0]].label == 1, "b", "a")
    with_kind = {
        model: Predictions(p.sample_id, p.video, p.label, p.score, {"kind": kind}) for model, p in predictions.items()
    }
    with pytest.raises(DistFairError, match="no group of kind has both real and fake samples"):
        average_causal_effect(with_kind, ["kind"])
