"""Intervals against a bootstrap that copies the drawn videos out, one replicate after another."""

import json

import numpy as np
import pytest

import dist_fair.metrics.bootstrap as bootstrap
from dist_fair import keyed
from dist_fair.metrics import evaluate
from dist_fair.metrics.bootstrap import strata_of_videos, video_weights
from tests.metrics.predicted import VOCABULARY, make, take

REPLICATES = 25


def copied_out(predictions, strata, seed, b):
    """Replicate b with every drawn video copied, under a name of its own."""
    videos = np.unique(predictions.video)
    (weights,) = video_weights(strata, b + 1, len(predictions), seed)
    rows, names = [], []
    for video, times in zip(videos, weights[:, b].astype(int), strict=True):
        for copy in range(times):
            frames = np.flatnonzero(predictions.video == video)
            rows.extend(frames)
            names.extend([f"{video}#{copy}"] * len(frames))
    return take(predictions, np.array(rows), np.array(names))


def naive_strata(predictions):
    videos = np.unique(predictions.video)
    first = np.array([np.flatnonzero(predictions.video == video)[0] for video in videos])
    columns = [predictions.label[first], predictions.attributes["gender"][first], predictions.attributes["race"][first]]
    keys = ["|".join(map(str, row)) for row in zip(*columns, strict=True)]
    return np.unique(keys, return_inverse=True)[1]


def leaves(report, path=()):
    for key, value in report.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif isinstance(value, list | None):
            yield (*path, key), value


def at(report, path):
    for key in path:
        report = report[key]
    return report


def test_intervals_are_percentiles_over_copied_out_replicates():
    predictions = make(videos=60)
    report = evaluate(predictions, VOCABULARY, REPLICATES, seed=7)["intervals"]
    strata = strata_of_videos(*_codes(predictions))
    replicates = [evaluate(copied_out(predictions, strata, 7, b), VOCABULARY, 0, 0) for b in range(REPLICATES)]
    compared = 0
    for part in ("utility", "fairness"):
        for path, bounds in leaves(report[part], (part,)):
            values = np.array([at(replicate, path) for replicate in replicates], dtype=float)
            values = values[~np.isnan(values)]
            expected = np.percentile(values, [2.5, 97.5]) if len(values) else None
            np.testing.assert_allclose(bounds, expected, rtol=0, atol=1e-10, err_msg=str(path))
            compared += 1
    assert compared == 2 * 7 + 3 * 10 + (2 + 3 + 6) * 5


def _codes(predictions):
    _, of_sample = np.unique(predictions.video, return_inverse=True)
    values = [np.unique(predictions.attributes[name], return_inverse=True)[1] for name in ("gender", "race")]
    # As in the report, where unknown is -1 and so comes first: the numbering of strata is part of the draw.
    gender = np.where(predictions.attributes["gender"] == "unknown", -1, values[0])
    return of_sample, [predictions.label, gender, values[1]]


def test_strata_are_label_and_attributes_with_unknown_as_a_value():
    predictions = make()
    strata = strata_of_videos(*_codes(predictions))
    naive = naive_strata(predictions)
    assert len(set(zip(strata, naive, strict=True))) == len(set(strata)) == len(set(naive))
    report = evaluate(predictions, VOCABULARY, 1, 0)["intervals"]
    assert (report["strata"], report["replicates"], report["unit"]) == (len(set(naive)), 1, "video")


def test_a_video_of_differing_attributes_goes_with_most_of_its_samples():
    assert strata_of_videos(np.array([0, 0, 0, 1]), [np.array([5, 3, 3, 5])]).tolist() == [0, 1]


def test_every_replicate_keeps_the_size_of_every_stratum():
    strata = np.array([2, 0, 1, 1, 0, 2, 2, 1, 1, 3])
    (weights,) = video_weights(strata, 50, 10, seed=0)
    for stratum in range(4):
        assert (weights[strata == stratum].sum(axis=0) == (strata == stratum).sum()).all()
    assert (weights[9] == 1).all(), "a stratum of one video is always itself"
    assert len(np.unique(weights, axis=1).T) > 40


def test_draws_are_uniform_over_the_videos_of_a_stratum():
    strata = np.array([0] * 5 + [1] * 3)
    weights = np.concatenate([*video_weights(strata, 4000, 8, seed=1)], axis=1)
    # A count is binomial(n, 1/n): mean 1, standard error of the mean below 0.016.
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=0.08)
    np.testing.assert_allclose(weights[:5].var(axis=1), 1 - 1 / 5, atol=0.1)


def test_a_replicate_depends_on_its_number_and_the_seed_alone(monkeypatch):
    strata = np.random.default_rng(0).integers(4, size=30)
    together = np.concatenate([*video_weights(strata, 12, 30, seed=9)], axis=1)
    monkeypatch.setattr(bootstrap, "CHUNK", 90)
    chunks = [*video_weights(strata, 12, 30, seed=9)]
    assert [chunk.shape[1] for chunk in chunks] == [3, 3, 3, 3]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), together)
    (other,) = video_weights(strata, 3, 30, seed=10)
    assert (other != together[:, :3]).any()
    drawn = keyed.generator(9, "bootstrap", 2).random(30)
    order = np.argsort(strata, kind="stable")
    expected = np.zeros(30)
    for place, u in zip(range(30), drawn, strict=True):
        stratum = np.flatnonzero(strata == strata[order[place]])
        expected[stratum[int(u * len(stratum))]] += 1
    np.testing.assert_array_equal(together[:, 2], expected)


def test_intervals_are_the_same_in_any_chunks_and_again(monkeypatch):
    predictions = make(videos=40)
    first = evaluate(predictions, VOCABULARY, 20, seed=2)
    monkeypatch.setattr(bootstrap, "CHUNK", 7 * len(predictions))
    assert evaluate(predictions, VOCABULARY, 20, seed=2) == first
    assert evaluate(predictions, VOCABULARY, 20, seed=3)["intervals"] != first["intervals"]
    json.dumps(first, allow_nan=False)


def test_frames_of_a_video_make_the_interval_of_a_video():
    """Copies of a frame are no new information: the interval must not shrink (a bootstrap over frames' would)."""
    single = make(videos=100, frames=1, unknown=0)
    rows = np.repeat(np.arange(100), 16)
    many = take(single, rows, single.video[rows])
    one, other = (evaluate(p, VOCABULARY, 100, seed=0)["intervals"]["utility"]["frame"]["AUC"] for p in (single, many))
    assert one == pytest.approx(other, abs=1e-12)
    assert one[1] - one[0] > 0.05


def test_replicates_without_a_number_are_counted():
    """Attributes that differ inside videos: a group can vanish from a replicate."""
    predictions = make(videos=8, unknown=0)
    race = np.where(np.arange(len(predictions)) == 0, "Rare", "Common")
    predictions.attributes["race"][:] = race
    undefined = evaluate(predictions, ["race"], 50, seed=0)["intervals"]["undefined_replicates"]
    assert 0 < undefined["fairness: race: groups: Rare: ACC"] < 50
