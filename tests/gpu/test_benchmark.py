"""The arithmetic of benchmarks/gpu.py, and its ways in small; on any machine."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_sections
import gpu_ways
from gpu import Report
from gpu_ways import QUICK, Taken


def test_a_ratio_is_taken_within_rounds():
    """The machine gets slower: of medians over rounds it would be 3, and of each round it is 2."""
    taken = {"ours": Taken(np.array([2.0, 6, 8]), 1, 0), "bare": Taken(np.array([1.0, 3, 4]), 1, 0)}
    assert gpu_sections.over(taken, "ours", "bare") == "2.000 (2.000 to 2.000)"


def test_ways_take_turns_forth_and_back(monkeypatch):
    order = []
    monkeypatch.setattr(gpu_ways, "timed", lambda window, scale: order.append(window(0)) or float(len(order)))
    ways = {"a": lambda: lambda steps: "a", "b": lambda: lambda steps: "b"}
    taken = gpu_ways.measured(ways, replace(QUICK, rounds=3))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert taken["a"].seconds.tolist() == [1, 4, 5]


def test_calls_are_those_of_a_step_and_not_of_the_window(monkeypatch):
    monkeypatch.setattr(gpu_sections, "_profiled", lambda window, scale, steps: Counter(launch=7 * steps + 3, wait=1))
    assert gpu_sections.calls(None, QUICK) == Counter(launch=7, wait=0)


def test_a_report_says_what_there_is_so_far(tmp_path):
    report = Report(tmp_path / "gpu.md", "# On a GPU\n")
    report.take("step", "row", "erm over bare", "<= 1.02", "1.010")
    report.take("step", "way", "ResNet-50", "bare", "31.00", "30.00 to 32.00", "8.00", "3")
    report.take("step", "note", "by the way")
    assert "| erm over bare | <= 1.02 | 1.010    |" in report.path.read_text()
    assert "- step: by the way" in report.path.read_text()


@pytest.mark.parametrize("name", ["erm", "daid", "sfd_gda", "daw_fdd"])
def test_the_program_trains_on_what_is_made_up_here(name):
    """With all of its terms from the first step on."""
    recipe = gpu_ways.settings((*gpu_sections.RECIPES[name], "detector=small", "train.precision=fp32"))
    trainer, batches = gpu_ways.trainer_of(recipe, 32, 8)
    told, before = [], [one.detach().clone() for one in trainer.module.parameters()]
    trainer.rhythm.stop = 2
    trainer.run(batches, None, [lambda step, values: told.append(values)])
    assert len(told) == 2
    terms = {key: value for key, value in told[0].items() if key.startswith("loss/")}
    assert terms
    assert None not in terms.values()
    assert not all(map(torch.equal, before, trainer.module.parameters()))
