"""Plans that cannot be: errors name the value, the place and the fix."""

import pytest

from dist_fair.data.plan import TapeSpec, TrainingPlan
from dist_fair.errors import DistFairError
from tests.data.making import bare_index

ALL = [TapeSpec("all")]
REAL_FAKE = [TapeSpec("real", label=0), TapeSpec("fake", label=1)]


@pytest.mark.parametrize(
    ("tapes", "batch_size", "more", "text"),
    [
        (ALL, 12, {"lanes": 8}, "data.lanes=8 does not divide the 12 samples"),
        (REAL_FAKE, 7, {}, "micro-batch of 7 .* use a multiple of 2"),
        (ALL, 0, {}, "micro-batch of 0"),
        (ALL, 64, {"lanes": 64}, "only 20 samples: every lane needs one"),
        (ALL, 8, {"lanes": 0}, "data.lanes=0"),
        (ALL, 8, {"window": 0}, "data.window=0"),
        ([], 8, {}, "at least one tape"),
        (ALL * 2, 8, {}, "each once"),
        ([TapeSpec("all", share=0)], 8, {}, "data.tapes.all.share=0"),
        ([TapeSpec("men", where={"gendr": "male"})], 8, {}, "data.tapes.men.where.gendr.*did you mean 'gender'"),
        ([TapeSpec("men", where={"gender": "mail"})], 8, {}, "did you mean 'male'"),
    ],
)
def test_errors_name_the_value_and_the_fix(tapes, batch_size, more, text):
    with pytest.raises(DistFairError, match=text):
        TrainingPlan(bare_index([20]), tapes, batch_size, **more)


def test_a_tape_without_samples():
    index = bare_index([20], labels=[1] * 20)
    with pytest.raises(DistFairError, match="tape 'real' is empty: /made has no real sample"):
        TrainingPlan(index, REAL_FAKE, 8)
    women = TapeSpec("women", 0, where={"gender": "female"})
    with pytest.raises(DistFairError, match=r"no real sample with {'gender': 'female'}"):
        TrainingPlan(index, [women], 8)


def test_ranks_that_do_not_divide_the_lanes():
    plan = TrainingPlan(bare_index([40]), ALL, 8, lanes=4)
    with pytest.raises(DistFairError, match=r"3 ranks do not divide data.lanes=4: start one of \[1, 2, 4\] ranks"):
        plan.part(0, 0, 3)
