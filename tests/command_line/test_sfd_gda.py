"""SFD+GDA as a whole: all that could depend on the number of ranks.

Augmentation, synced norm, three pruning iterations, distribution alignment, evaluation sets that no batch divides. In
fp32 the detector is without kinks (see dist_fair.detectors.timm_backbone.smoothed).
"""

import pytest
import torch

from tests.command_line.runs import QUICK, final_model, metrics
from tests.command_line.trajectory import Trajectory


class TestSfdGda(Trajectory):
    recipe = ("recipe=sfd_gda", *QUICK)
    bugs = dict.fromkeys(("local_statistics", "detached_norm", "local_norm", "per_rank_mask", "order_by_rank",
                          "augmented_by_rank"), "losses") | {
        "no_factor": "gradient norms", "squared_factor": "gradient norms", "double_norm_update": "scores",
        "tail_repeated": "refused",
    }  # fmt: skip

    @pytest.mark.parametrize("world", [2, 4])
    def test_the_same_channels_are_masked(self, runs, world):
        one, other = final_model(runs / "1"), final_model(runs / str(world))
        mask = one["detector.channel_mask"]
        assert torch.equal(mask, other["detector.channel_mask"])
        assert int((mask == 0).sum()) == 3 * max(1, int(0.02 * len(mask)))
        records = [[line["restructured"]["channel_decoupling"] for line in metrics(runs / str(w))
                    if "restructured" in line] for w in (1, world)]  # fmt: skip
        assert len(records[0]) == 3
        for left, right in zip(*records, strict=True):
            assert (left["masked"], left["hash"]) == (right["masked"], right["hash"])

    def test_one_reduce_and_at_most_one_gather_carry_all_objectives(self, runs):
        line = metrics(runs / "4")[20]
        assert line["calls/summaries/sum"] == 1
        assert line.get("calls/summaries/gather", 0) <= 1
