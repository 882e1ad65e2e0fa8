"""What holds of every recipe: on 1, 2 and 4 ranks it is the same run, and not with a bug planted.

    class TestMine(Trajectory):
        recipe = ("recipe=mine", *QUICK, ...)
        bugs = dict.fromkeys(("local_statistics", "order_by_rank"), "losses") | {"no_factor": "gradient norms"}

and whatever is true of this method alone, as tests that take `runs`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.command_line.runs import TOLERANCE, difference, losses, metrics, norm_difference, predictions
from tests.command_line.several import Start, together

STEPS = 32  # of QUICK
EXACT_STEPS = 12  # three pruning iterations of SFD stay apart
EXACT = ("train.precision=fp64", f"train.steps={EXACT_STEPS}", "train.accumulate=2")
STOPS = {2: 11, 4: 10, 1: "null"}  # number of ranks: train.stop_after of the part of a run that they do
# A bug is in from step 10 on, when the recipe's parts are at work, for 8 steps, or to the end where scores tell of it;
# or, where it is one of evaluation, after the last step. What tells of it: where it goes on, train.stop_after.
WITH_BUG = range(10, 18)
BUG = {"losses": (10, 8), "gradient norms": (10, 8), "scores": (10, "null"), "refused": (STEPS, "null")}


class Trajectory:
    """The tests of a recipe.

    recipe: its arguments, small enough for four ranks on two cores. kinks: what gives the detector its kinks back.
    exact: further arguments by name, each tried in fp64, with kinks and two micro-batches a step. bugs: of `planted`,
    and what tells of each (`BUG`).
    """

    recipe: Sequence[str]
    kinks: Sequence[str] = ("detector.arguments.smooth=false",)
    exact: Mapping[str, Sequence[str]] = {"plain": ()}
    bugs: Mapping[str, str]

    @pytest.fixture(scope="class")
    def runs(self, data, tmp_path_factory) -> Path:
        """Run folders 1, 2 and 4, resumed, NAME-1 and NAME-4 of `exact`, and one for each bug, on 2 ranks."""
        folder = tmp_path_factory.mktemp("runs")
        whole = [*self.recipe, f"data={data}", "checkpoint.keep=4"]
        for world, stop in STOPS.items():
            starts = [Start(folder / str(world), whole),
                      Start(folder / "resumed", [*whole, "checkpoint.keep=1", f"train.stop_after={stop}"])]  # fmt: skip
            if world == 2:
                starts += [self._with_bug(folder, whole, bug) for bug in self.bugs]
            else:
                starts += [Start(folder / f"{name}-{world}", [*whole, *EXACT, *self.kinks, *extra])
                           for name, extra in self.exact.items()]  # fmt: skip
            together(world, starts)
        return folder

    def _with_bug(self, folder: Path, whole: Sequence[str], bug: str) -> Start:
        step, stop = BUG[self.bugs[bug]]
        resume = folder / "2" / "checkpoints" / f"step-{step:08d}"
        return Start(folder / bug, [*whole, f"resume={resume}", f"train.stop_after={stop}"], bug)

    @pytest.mark.parametrize("world", [2, 4])
    def test_losses_do_not_depend_on_the_number_of_ranks(self, runs, world):
        assert len(losses(runs / "1")) == STEPS
        assert difference(runs / "1", runs / str(world)) < TOLERANCE
        # In fp32 a gradient keeps five digits, against fp64, on one rank too.
        assert norm_difference(runs / "1", runs / str(world)) < 1e-3

    @pytest.mark.parametrize("world", [2, 4])
    @pytest.mark.parametrize("name", ["near", "far"])
    def test_predictions_are_the_same_file(self, runs, world, name):
        one, other = predictions(runs / "1", name), predictions(runs / str(world), name)
        assert list(one) == ["sample_id", "video", "label", "gender", "race", "score"]
        for column in one:
            if column != "score":
                assert one[column] == other[column]
        assert len(set(one["sample_id"])) == {"near": 53, "far": 30}[name]
        assert scores_apart(runs / "1", runs / str(world), name) < TOLERANCE

    def test_stopped_and_resumed_on_other_ranks_it_is_the_undisturbed_run(self, runs):
        assert [line["step"] for line in metrics(runs / "resumed")] == list(range(STEPS))
        assert difference(runs / "1", runs / "resumed") < TOLERANCE
        assert all(scores_apart(runs / "1", runs / "resumed", name) < TOLERANCE for name in ("near", "far"))

    def test_in_fp64_a_network_with_kinks_agrees_too(self, runs, variant):
        one, four = (runs / f"{variant}-{world}" for world in (1, 4))
        assert len(losses(one)) == EXACT_STEPS
        assert difference(one, four) < 1e-10
        assert scores_apart(one, four) < 1e-7  # they are kept in fp32

    def test_a_planted_bug_is_noticed(self, runs, bug):
        told_by = self.bugs[bug]
        if told_by == "losses":
            assert difference(runs / "1", runs / bug, WITH_BUG) > 10 * TOLERANCE
        elif told_by == "gradient norms":  # AdamW hides a factor on all gradients from the losses
            assert norm_difference(runs / "1", runs / bug, WITH_BUG) > 0.4
        elif told_by == "scores":
            assert scores_apart(runs / "1", runs / bug) > 10 * TOLERANCE
        else:
            assert "did not read each of its 53 samples once" in (runs / f"{bug}.refused").read_text()
            assert not (runs / bug / "evaluation.json").exists()


def scores_apart(one: Path, other: Path, name: str = "near") -> float:
    """Largest difference between the scores of two runs."""
    left, right = (predictions(run, name)["score"] for run in (one, other))
    return float(np.abs(np.subtract(left, right)).max())
