"""What is compiled computes what is not."""

import pytest

from tests.command_line.runs import difference, losses, metrics
from tests.gpu.runs import alone, recipe

pytestmark = pytest.mark.gpu
RECIPES = ("erm", "daid", "sfd_gda")
WHAT = ("none", "objectives", "all")


def compiled(name):
    """Runs of a recipe, compiled in each way, with a cache of their own."""

    def run(folder):
        runs = [(what, recipe(name, f"train.compile={what}")) for what in WHAT]
        return alone(folder, runs, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"), TORCHINDUCTOR_COMPILE_THREADS="4")

    return run


APART = {f"compiled {name}": compiled(name) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("what", WHAT[1:])
def test_losses_are_those_of_the_eager_run(name, what, apart, note):
    folder = apart(f"compiled {name}")
    assert len(losses(folder / "none")) == 3
    assert difference(folder / "none", folder / what) < 1e-4
    note(f"train.compile={what}, {name}: the first step took {metrics(folder / what)[0]['seconds']:.0f} s")


def test_something_was_compiled(apart):
    assert all(any((apart(name) / "cache").rglob("*.py")) for name in APART)
