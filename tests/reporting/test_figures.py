"""Figures show the report's numbers, and gaps where it has none, in every case that must not break them."""

import subprocess
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import auc

from dist_fair.errors import DistFairError
from dist_fair.reporting import radar as radars
from dist_fair.reporting.figures import POINTS, draw, roc, scores
from dist_fair.reporting.judged import ALL, Judged
from dist_fair.reporting.radar import radar
from dist_fair.reporting.style import COLOURS, DASHES, figure, save, stroke
from tests.reporting.evaluated import SIX, judged

HOLES = [("male/Asian", 0), ("female/Black", 0), ("female/Black", 1)]
LONG = {"skin": ["very light, type 1", "very $dark^ of a long_description", "medium"], "age": ["under 30", "over 30"]}
MANY = {"gender": ["female", "male"], "race": ["Asian", "Black", "White", "Indian"], "age": ["child", "young", "old"]}


def texts(drawing):
    """Everything that is written in a figure."""
    found = {text.get_text() for text in drawing.findobj(match=lambda artist: hasattr(artist, "get_text"))}
    return "\n".join(sorted(found))


def lines(ax):
    """The lines of an axes that are in its legend, by label."""
    return dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))


def numbers(one, factor, number):
    values = (number(group) for group in one.groups.names)
    return np.array([np.nan if value is None else factor * value for value in values])


# Radar


def test_radar_has_the_numbers_of_the_report_and_gaps_where_it_has_none():
    runs = {"erm": judged(without=HOLES), "daid": judged(without=HOLES, model=1)}
    drawing = radar(runs)
    columns = {name: {run: numbers(one, factor, getattr(one, number)) for run, one in runs.items()}
               for name, factor, number in (("AUC", 100, "auc"), ("Skew", 1, "skew"))}  # fmt: skip
    for ax, (name, wanted) in zip(drawing.axes, columns.items(), strict=True):
        low, high, _ = radars._scale(name, wanted)
        for run, line in lines(ax).items():
            x, y = line.get_data()
            drawn = np.append(low + (high - low) * np.hypot(x, y)[:-1], np.hypot(x[-1], y[-1]))
            np.testing.assert_allclose(drawn[:-1], wanted[run], rtol=1e-9)  # NaN where NaN
            turned = np.degrees(np.arctan2(x, y)[:-1]) % 360
            there = ~np.isnan(wanted[run])
            np.testing.assert_allclose(turned[there], 60.0 * np.flatnonzero(there), atol=1e-6)
            assert (x[0], y[0]) == (x[-1], y[-1]) or np.isnan(x[0])
    assert np.isnan(columns["AUC"]["erm"]).sum() == 2
    assert np.isnan(columns["Skew"]["erm"]).sum() == 1
    assert "no AUC of female/Black, male/Asian" in texts(drawing)
    assert "no Skew of female/Black" in texts(drawing)


def test_skew_of_a_group_is_the_larger_of_its_cells():
    one = judged()
    for group in one.groups.names:
        cells = [one.report["fairness"]["gender x race"]["skew_cells"][name][group] for name in ("real", "fake")]
        assert one.skew(group) == max(map(abs, cells))
    assert max(map(one.skew, one.groups.names)) == one.report["fairness"]["gender x race"]["skew"]


def test_runs_that_lack_different_numbers_are_named():
    one, two = judged(), judged()
    two.report["fairness"]["gender x race"]["groups"]["male/White"]["AUC"] = None
    assert "two: no AUC of male/White" in texts(radar({"one": one, "two": two}))


@pytest.mark.parametrize("attributes", [{"gender": ["female", "male"]}, LONG, MANY], ids=["two", "long", "many"])
def test_where_no_radar_can_be_there_are_rows(attributes):
    one = judged(attributes, count=600)
    drawing = radar({"erm": one})
    for ax, wanted in zip(drawing.axes, (numbers(one, 100, one.auc), numbers(one, 1, one.skew)), strict=True):
        np.testing.assert_array_equal(lines(ax)["erm"].get_xdata(), wanted)
        low, high = ax.get_xlim()
        assert (low <= wanted).all()
        assert (wanted <= high).all()
    named = ["".join(label.get_text().split()) for label in drawing.axes[0].get_yticklabels()]
    assert named == ["".join(name.split()) for name in one.groups.names]


def test_without_attributes_there_is_no_radar(tmp_path):
    assert radar({"erm": judged({})}) is None
    assert {path.name for path in draw({"erm": judged({})}, "far", tmp_path)} == {
        "far-scores.png", "far-scores.svg", "far-roc.png", "far-roc.svg",
    }  # fmt: skip


# ROC


def test_roc_of_one_run_has_a_curve_a_group_with_its_auc():
    one = judged(without=HOLES)
    curves = lines(roc({"erm": one}).axes[0])
    assert [label.split("  ")[0] for label in curves] == [ALL, *one.groups.names]
    for (label, curve), part in zip(curves.items(), one.parts, strict=True):
        if part in ("male/Asian", "female/Black"):
            assert label.split("  ")[1] == {"male/Asian": "no real samples", "female/Black": "no samples"}[part]
            assert np.isnan(curve.get_ydata()).all()
        else:
            assert label.split("  ")[1] == f"{100 * one.auc(part):.1f}"
            assert auc(*curve.get_data()) == pytest.approx(one.auc(part), abs=1e-12)


def test_roc_of_several_runs_has_a_panel_a_group():
    runs = {"erm": judged(without=HOLES), "daid": judged(without=HOLES, model=1)}
    panels = roc(runs).axes
    for ax, part in zip(panels, runs["erm"].parts, strict=False):
        assert ax.get_legend().get_title().get_text() == part
        curves = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
        for curve, one in zip(curves, runs.values(), strict=True):
            value = one.auc(part)
            assert curve.get_label() == ("-" if value is None else f"{100 * value:.1f}")
            if value is not None:
                assert auc(*curve.get_data()) == pytest.approx(value, abs=1e-12)
    assert "no real samples" in texts(panels[4])
    assert [ax.get_visible() for ax in panels] == [True] * 7 + [False]


def test_long_curves_are_thinned_and_keep_their_ends():
    random = np.random.default_rng(0)
    one = judged({}, count=20_000)
    object.__setattr__(one.predictions, "score", random.random(20_000))
    curve = lines(roc({"erm": Judged(one.report, one.predictions)}).axes[0]).popitem()[1]
    assert len(curve.get_xdata()) == POINTS
    assert [*curve.get_xydata()[0], *curve.get_xydata()[-1]] == [0, 0, 1, 1]


# Scores


def test_scores_have_every_sample_of_each_group_and_label():
    runs = {"erm": judged(without=HOLES), "daid": judged(without=HOLES, model=1)}
    for ax, one in zip(scores(runs).axes, runs.values(), strict=True):
        stairs = iter(ax.patches)
        for row, (label, score) in enumerate(one.parts.values()):
            for code, sign in ((0, -1), (1, 1)):
                if (label == code).any():
                    values, edges, baseline = next(stairs).get_data()
                    assert baseline == row
                    heights = sign * (values - row)
                    counts = np.histogram(score[label == code], edges)[0]
                    np.testing.assert_allclose(heights / heights.sum(), counts / (label == code).sum(), atol=1e-12)
        assert next(stairs, None) is None
        assert "no real samples" in texts(ax)
        assert "no fake samples" in texts(ax)
    assert f"male/Asian\n0 real, {len(runs['erm'].parts['male/Asian'][0])} fake" in texts(scores(runs))


def test_scores_beyond_one_are_drawn():
    one = judged({})
    object.__setattr__(one.predictions, "score", one.predictions.score * 6 - 2)
    low, high = scores({"erm": one}).axes[0].get_xlim()
    assert low <= one.predictions.score.min()
    assert high >= one.predictions.score.max()


# Files


def test_the_same_figures_have_the_same_bytes(tmp_path):
    runs = {"erm": judged(without=HOLES), "daid": judged(without=HOLES, model=1)}
    written = draw(runs, "near", tmp_path / "figures")
    first = {path: path.read_bytes() for path in written}
    assert {*(tmp_path / "figures").iterdir()} == {*written}
    draw(runs, "near", tmp_path / "figures")
    assert {path: path.read_bytes() for path in written} == first
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert 900 <= image.width <= 1360
        else:
            assert xml.parse(path).getroot().tag.endswith("svg")
            assert path.stat().st_size < 300_000


@pytest.mark.parametrize(("attributes", "runs"), [(SIX, 1), (SIX, 8), (LONG, 2), (MANY, 1), ({}, 2)])
def test_nothing_is_cut_off(attributes, runs):
    made = {f"run {number} with a name": judged(attributes, HOLES, model=number) for number in range(runs)}
    for drawn in filter(None, (radar(made), scores(made), roc(made))):
        drawn.get_layout_engine().execute(drawn)
        box, whole = drawn.get_tightbbox(), drawn.bbox_inches
        assert box.x0 >= -0.02
        assert box.y0 >= -0.02
        assert box.x1 <= whole.x1 + 0.02
        assert box.y1 <= whole.y1 + 0.02


def test_strokes_differ():
    looks = [tuple(map(str, stroke(number).values())) for number in range(len(COLOURS) * len(DASHES))]
    assert len({*looks}) == len(looks)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "figures").write_text("")
    drawing, _ = figure()
    with pytest.raises(DistFairError, match=r"figures/x\.png cannot be written"):
        save(drawing, tmp_path / "figures", "x")


def test_matplotlib_is_imported_when_something_is_drawn_and_pyplot_never():
    code = """
import sys
from dist_fair.reporting import figures, side_by_side, style
assert "matplotlib" not in sys.modules
style.figure()
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
