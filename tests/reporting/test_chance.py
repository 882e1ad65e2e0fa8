"""A run that learns nothing is told so after a tenth of its steps; one that learns is left in peace."""

import pytest

from dist_fair.reporting.chance import ChanceWatch


def watch(steps, loss, capsys, start=0):
    """What is said of a run whose loss at `step` is loss(step), chance being 0.69 give or take."""
    chance = ChanceWatch(steps)
    told = []
    for step in range(start, steps):
        at_chance = 0.69 + 0.01 * (-1) ** step
        chance(step, {"loss": 3.0, "loss/cross_entropy": loss(step), "cross_entropy_at_chance": at_chance, "lr": 0.1})
        if text := capsys.readouterr().out:
            told.append((step + 1, text))
    return told


def test_at_chance_it_warns_after_a_tenth_and_at_the_end(capsys):
    told = watch(2000, lambda step: 0.70, capsys)
    assert [step for step, _ in told] == [200, 2000]
    assert (
        "after 200 of 2000 steps the loss/cross_entropy is 0.7, and a constant prediction would have 0.69" in told[0][1]
    )
    assert "delay and ramp" in told[0][1]


def test_only_the_later_half_of_the_tenth_counts(capsys):
    assert not watch(2000, lambda step: 0.70 if step < 100 else 0.68, capsys)
    assert [step for step, _ in watch(2000, lambda step: 0.68 if step < 100 else 0.70, capsys)] == [200, 2000]


def test_a_run_that_falls_back_is_told_at_its_end(capsys):
    assert [step for step, _ in watch(1000, lambda step: 0.5 if step < 500 else 0.69, capsys)] == [1000]


def test_short_runs_are_not_judged(capsys):
    assert not watch(74, lambda step: 0.70, capsys)
    assert [step for step, _ in watch(300, lambda step: 0.70, capsys)] == [75, 300]


def test_a_resumed_run_is_judged_on_what_it_sees(capsys):
    assert not watch(2000, lambda step: 0.6, capsys, start=195)
    assert [step for step, _ in watch(2000, lambda step: 0.70, capsys, start=500)] == [2000]


@pytest.mark.parametrize("values", [{"loss": 0.7, "loss/x": 0.7}, {"loss/x": None, "x_at_chance": None}])
def test_terms_without_a_chance_level_are_passed_over(values, capsys):
    chance = ChanceWatch(100)
    for step in range(100):
        chance(step, values)
    assert capsys.readouterr().out == ""
