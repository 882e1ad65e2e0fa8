"""PG-FDD, DAG-FDD and DAW-FDD as a whole.

PG-FDD has all at once: three encoders and a decoder with dropout, paired tapes, triplets and worst groups of the
gathered batch, and a step of two passes. In fp64 with kinks, and with the released code's losses.
"""

from typing import ClassVar

from tests.command_line.runs import QUICK_WITHOUT_METHODS, final_model, metrics
from tests.command_line.trajectory import Trajectory

SMALL = [one for one in QUICK_WITHOUT_METHODS if not one.startswith("detector.")]
TERMS = ("shared_forgery", "specific_forgery", "contrastive", "reconstruction", "margin_loss",
         "conditional_value_at_risk")  # fmt: skip
RISK = "interventions.conditional_value_at_risk"


class TestPgFdd(Trajectory):
    recipe = ("recipe=pg_fdd", *SMALL, "detector.arguments.channels=[8, 16, 32, 64]", "detector.arguments.width=32",
              "data.image_size=32", "optimizer.lr=1e-4")  # fmt: skip
    exact: ClassVar = {
        "released_losses": ("+detector.arguments.heads.dropout_on=logits", f"{RISK}.outer=guarded",
                            "interventions.contrastive_loss.self_pairs=true"),
    }  # fmt: skip
    bugs = dict.fromkeys(("local_rows", "dropout_by_rank", "local_ascent", "local_norm", "order_by_rank"), "losses") | {
        "no_factor": "gradient norms", "statistics_twice": "scores",
    }  # fmt: skip

    def test_all_terms_are_logged(self, runs):
        first, last = metrics(runs / "2")[0], metrics(runs / "2")[-1]
        assert {*last} >= {*(f"loss/{term}" for term in TERMS), "sam/sharpness", "sam/ascent_norm"}
        assert last["loss/reconstruction"] < first["loss/reconstruction"]

    def test_both_passes_have_the_same_calls(self, runs):
        line = metrics(runs / "4")[-1]
        assert (line["calls/summaries/sum"], line["calls/summaries/gather"]) == (2, 2)

    def test_the_running_statistics_moved_once_a_step(self, runs):
        model = final_model(runs / "4")
        counts = [int(value) for name, value in model.items() if name.endswith("num_batches_tracked")]
        assert set(counts) == {32}


class TestDagFdd(Trajectory):
    recipe = ("recipe=dag_fdd", *QUICK_WITHOUT_METHODS, f"{RISK}.delay=0.1", f"{RISK}.ramp=0.1", "optimizer.lr=1e-4")
    exact: ClassVar = {"plain": ()}
    bugs: ClassVar = {"local_rows": "losses", "gathered_without_factor": "losses"}


class TestDawFdd(Trajectory):
    recipe = ("recipe=daw_fdd", *QUICK_WITHOUT_METHODS, f"{RISK}.delay=0.1", f"{RISK}.ramp=0.1", "optimizer.lr=1e-4")
    exact: ClassVar = {"smoothed": (f"{RISK}.outer=smoothed",)}
    bugs: ClassVar = {"local_rows": "losses", "order_by_rank": "losses"}
