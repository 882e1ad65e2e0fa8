"""DAID as a whole. Hardest pairs, and DAID's alignment together with SFD+GDA's interventions, are tried in fp64.

Groups have 3 to 8 members in a batch of 32 and ranks lack some: small ones, which are filled up, are the rule.
Normalised features make gradients eight times those of ERM here, so the learning rate is a fifth: at 5e-4 the fp32
runs parted by 9e-5.
"""

from typing import ClassVar

import numpy as np

from dist_fair import cli
from tests.command_line.runs import QUICK_WITHOUT_METHODS, final_model, losses, metrics
from tests.command_line.trajectory import Trajectory, scores_apart


class TestDaid(Trajectory):
    recipe = ("recipe=daid", *QUICK_WITHOUT_METHODS, "interventions.low_rank_projection.rank=16",
              "interventions.pair_alignment.delay=0.2", "interventions.subgroup_norm.minimum=4",
              "interventions.subgroup_norm.delay=0.1", "interventions.inverse_propensity.delay=0.1",
              "optimizer.lr=1e-4")  # fmt: skip
    exact: ClassVar = {
        "hardest_pairs": ("interventions.pair_alignment.pairs=hardest", "interventions.pair_alignment.hardest=2"),
        "with_sfd_gda": ("+interventions.channel_decoupling={batch_size: 50, batches: 2, at: [0.3]}",
                         "+interventions.distribution_alignment={grid: 32, weight: 0.1}"),
    }  # fmt: skip
    bugs = dict.fromkeys(("local_statistics", "local_moments", "detached_moments", "moments_without_others",
                          "propensity_of_the_batch"), "losses") | {
        "no_factor": "gradient norms", "squared_factor": "gradient norms", "double_moments_update": "scores",
    }  # fmt: skip

    def test_all_parts_are_at_work(self, runs):
        assert {*metrics(runs / "1")[-1]} >= {"loss/cross_entropy", "loss/pair_alignment", "loss/orthogonality"}
        assert losses(runs / "1", "loss/pair_alignment")[-1] > 0

    def test_running_moments_are_the_same(self, runs):
        one, other = final_model(runs / "1"), final_model(runs / "4")
        names = [name for name in one if name.startswith("interventions.subgroup_norm.")]
        assert len(names) == 4
        for name in names:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-3, atol=1e-5)

    def test_one_reduce_a_micro_batch_carries_all_objectives(self, runs, variant):
        last = metrics(runs / f"{variant}-4")[-1]
        assert last["calls/summaries/sum"] == 2  # one for each of two micro-batches, whatever the recipe lists
        assert last.get("calls/summaries/gather", 0) == (2 if variant == "hardest_pairs" else 0)

    def test_sfd_gda_beside_it_is_at_work(self, runs):
        assert {"loss/pair_alignment", "loss/distribution_alignment"} <= {*metrics(runs / "with_sfd_gda-4")[-1]}
        assert int((final_model(runs / "with_sfd_gda-4")["detector.channel_mask"] == 0).sum()) == 2

    def test_a_trained_run_can_be_judged_with_another_inference(self, runs, tmp_path, capsys):
        key = "interventions.subgroup_norm.inference"
        assert cli.main(["evaluate", str(runs / "2"), f"{key}=group", "data.eval=[near]", f"--out={tmp_path}"]) == 0
        assert scores_apart(runs / "2", tmp_path) > 1e-3
        assert cli.main(["evaluate", str(runs / "2"), "interventions.subgroup_norm.minimum=9"]) == 2
        refusal = capsys.readouterr().err
        assert "only settings beside that may change: recipe, out" in refusal
        assert key in refusal


def test_before_its_delay_an_intervention_is_as_if_left_out(data, tmp_path):
    arguments = ["recipe=erm", *QUICK_WITHOUT_METHODS, f"data={data}", "train.steps=8", "evaluation.at_end=false"]
    later = ["+interventions.inverse_propensity={delay: 0.5}", "+interventions.subgroup_norm={delay: 0.75}"]
    for name, extra in {"never": [], "weights": later[:1], "both": later}.items():
        assert cli.main(["train", *arguments, *extra, f"out={tmp_path / name}"]) == 0
    never, weights, both = (losses(tmp_path / name) for name in ("never", "weights", "both"))
    assert np.array_equal(never[:4], weights[:4])
    assert np.array_equal(weights[:6], both[:6])
    assert (never[4:] != weights[4:]).all()
    assert (weights[6:] != both[6:]).all()
