"""Settings: typed for recipes, checked with a text that names value and fix; when iterations happen."""

import pytest
import torch
from omegaconf import OmegaConf

from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError
from dist_fair.interventions.base import registered
from dist_fair.interventions.channel_decoupling import lowest
from tests.interventions.cases import build
from tests.interventions.worlds import Scoring, Small

OURS = ("cross_entropy", "channel_decoupling", "distribution_alignment", "inverse_propensity", "low_rank_projection",
        "pair_alignment", "subgroup_norm")  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_settings_are_a_structured_config(name):
    kind = registered()[name].Settings
    assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cross_entropy", {"reduction": "sum"}),
        ("cross_entropy", {"weight": -1.0}),
        ("distribution_alignment", {"epsilon": 1e-6}),
        ("distribution_alignment", {"grid": 1}),
        ("distribution_alignment", {"support": "histogram"}),
        ("distribution_alignment", {"bandwidth": "scott"}),
        ("distribution_alignment", {"bandwidth": 0}),
        ("distribution_alignment", {"bandwidth": True}),
        ("distribution_alignment", {"average": "all"}),
        ("distribution_alignment", {"attributes": ["age"]}),
        ("inverse_propensity", {"delay": 1.0}),
        ("channel_decoupling", {"attributes": []}),
        ("channel_decoupling", {"at": []}),
        ("channel_decoupling", {"at": [0.3, 0.2]}),
        ("channel_decoupling", {"at": [1.0]}),
        ("channel_decoupling", {"part": 0.0}),
        ("channel_decoupling", {"part": 0.4}),
        ("channel_decoupling", {"batch_size": 1}),
        ("channel_decoupling", {"batches": 0}),
        ("channel_decoupling", {"temperature": 0.0}),
        ("channel_decoupling", {"distance": "l1"}),
        ("channel_decoupling", {"keep": "none"}),
    ],
)
def test_wrong_values_are_named(name, settings):
    (key,) = settings
    with pytest.raises(DistFairError, match="attribute" if key == "attributes" else f"{key}="):
        build((name, settings))


def test_iterations_of_a_short_run_follow_each_other():
    assert build(("channel_decoupling", {}), steps=1000).steps == [150, 250, 350]
    assert build(("channel_decoupling", {}), steps=40).steps == [6, 10, 14]
    assert build(("channel_decoupling", {}), steps=4).steps == [1, 2, 3]
    with pytest.raises(DistFairError, match="no room"):
        build(("channel_decoupling", {}), steps=2)


def test_the_lowest_channels():
    scores = torch.tensor([3.0, 1.0, torch.inf, 1.0, 2.0, torch.nan])
    assert lowest(scores, 0.02).tolist() == [1]
    assert lowest(scores, 0.4).tolist() == [1, 3]
    assert lowest(scores, 0.99).tolist() == [1, 3, 4, 0]
    assert len(lowest(torch.arange(100.0), 0.29)) == 29
    with pytest.raises(DistFairError, match="masked or zero"):
        lowest(torch.full((4,), torch.inf), 0.5)


def test_a_scoring_batch_without_pairs_is_an_error():
    decoupling = build(("channel_decoupling", {"batch_size": 2, "batches": 1}), channels=11)
    with pytest.raises(DistFairError, match="batch_size=2"):
        decoupling.scores(0, Small(), Scoring((2,), 0), Communicator())


def test_chunks_of_channels_change_nothing(monkeypatch):
    decoupling = build(("channel_decoupling", {"batch_size": 30, "batches": 1}), channels=11)
    whole = decoupling.scores(0, Small(), Scoring((30,), 0), Communicator())
    monkeypatch.setattr("dist_fair.interventions.channel_decoupling.CHUNK", 2000)
    torch.testing.assert_close(decoupling.scores(0, Small(), Scoring((30,), 0), Communicator()), whole)


def test_modes_come_back():
    detector = Small().train()
    detector.norm.eval()
    decoupling = build(("channel_decoupling", {"batch_size": 30, "batches": 1}), channels=11)
    decoupling.scores(0, detector, Scoring((30,), 0), Communicator())
    assert (detector.training, detector.convolution.training, detector.norm.training) == (True, True, False)
