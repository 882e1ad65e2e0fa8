"""What is compiled computes what is not."""

import pytest

from tests.command_line.runs import difference, losses, metrics
from tests.gpu.runs import alone, recipe

pytestmark = pytest.mark.gpu
RECIPES = ("erm", "daid", "sfd_gda")
WHAT = ("none", "objectives", "all")


# Each recipe in a process and with a cache of its own.
APART = {f"compiled {name}": alone([(what, recipe(name, f"train.compile={what}")) for what in WHAT],
                                   TORCHINDUCTOR_CACHE_DIR="{folder}/cache", TORCHINDUCTOR_COMPILE_THREADS="2")
         for name in RECIPES}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("what", WHAT[1:])
def test_losses_are_those_of_the_eager_run(name, what, apart, note):
    runs = apart(f"compiled {name}")
    assert len(losses(runs["none"])) == 3
    assert difference(runs["none"], runs[what]) < 1e-4
    note(f"train.compile={what}, {name}: the first step took {metrics(runs[what])[0]['seconds']:.0f} s")


def test_something_was_compiled(apart):
    assert all(any((apart(name).folder / "cache").rglob("*.py")) for name in APART)
