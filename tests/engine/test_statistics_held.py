"""A second pass over the same batch, as in sharpness-aware minimisation, leaves running statistics as they are."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors.norm import convert_norms
from dist_fair.engine import sharpness
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Sam
from tests.engine.sharpness_worlds import Run, build, plan

NORMS = {
    "torch": nn.BatchNorm2d(3),
    "cumulative": nn.BatchNorm2d(3, momentum=None),
    "timm": BatchNormAct2d(3),
    "synced": convert_norms(nn.BatchNorm2d(3), "synced", Communicator()),
    "synced timm": convert_norms(BatchNormAct2d(3), "synced", Communicator()),
    "frozen": convert_norms(nn.BatchNorm2d(3), "frozen", Communicator()),
    "without": nn.BatchNorm2d(3, track_running_stats=False),
    "instance": nn.InstanceNorm2d(3),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_held(name, training):
    norm, x = nn.Sequential(NORMS[name].double()), torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 1
    norm.train()
    norm(x * 2)  # so that running statistics are not those of the batch
    norm.train(training)
    kept, flag = {key: value.clone() for key, value in norm.state_dict().items()}, norm[0].track_running_stats
    with sharpness.statistics_held(norm):
        held = norm(x)
        assert norm.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[key]) for key, value in norm.state_dict().items())
    assert norm[0].track_running_stats == flag
    assert torch.equal(held, norm(x))
    moved = any(not torch.equal(value, kept[key]) for key, value in norm.state_dict().items())
    assert moved == (training and name not in ("frozen", "without", "instance"))


def test_statistics_are_tracked_again_after_an_error():
    norms = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))

    def fail():
        with sharpness.statistics_held(norms):
            assert not norms[0].track_running_stats
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [norm.track_running_stats for norm in norms] == [True, False]


def test_statistics_that_cannot_be_held():
    run, chosen = Run(Sam(0.05), norm="group", methods="pairs"), plan()
    module = build(run, chosen, Communicator())
    module.detector.norm = nn.InstanceNorm2d(8, track_running_stats=True)
    with pytest.raises(DistFairError, match=r"layer 'detector.norm' \(InstanceNorm2d\) updates running statistics in"):
        sharpness.refuse_inexact_sam(run.sam, module, chosen, 1)
    sharpness.refuse_inexact_sam(Sam(), module, chosen, 1)
