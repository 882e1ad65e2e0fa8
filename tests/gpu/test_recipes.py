"""Every recipe trains on a GPU, from shards, through the command line; what it computes there is what the CPU does."""

import numpy as np
import pytest

from tests.command_line.runs import difference, losses, metrics, norm_difference
from tests.gpu.runs import RECIPES, WITHOUT_SAM, alone, recipe

pytestmark = pytest.mark.gpu
STEPS, FIRST = 5, range(1)
EXACT = dict.fromkeys(("erm", "daid", "sfd_gda", "daw_fdd", "pg_fdd"), ()) | {"pg_fdd without SAM": (WITHOUT_SAM,)}
DOUBLE = [(case, recipe(case.split()[0], "train.precision=fp64", f"train.steps={STEPS}", "train.batch_size=16", *extra))
          for case, extra in EXACT.items()]  # fmt: skip
# PG-FDD in fp64 is half of what the CPU has to do.
LARGE, SMALL = ([run for run in DOUBLE if ("pg_fdd" in run[0]) == large] for large in (True, False))
APART = {
    "double, large, on the CPU": alone(LARGE, "cpu"),
    "double, small, on the CPU": alone(SMALL, "cpu"),
    "single on the CPU": alone([(name, recipe(name, "train.stop_after=1")) for name in RECIPES], "cpu"),
    "single": alone([(name, recipe(name)) for name in RECIPES]),
    "half": alone([(name, recipe(name, "train.precision=bf16")) for name in RECIPES]),
    "double": alone(DOUBLE),
}


@pytest.mark.parametrize("name", RECIPES)
def test_single_precision(name, apart):
    gpu, cpu = apart("single")[name], apart("single on the CPU")[name]
    assert np.isfinite(losses(gpu)).all()
    assert len(losses(gpu)) == 3
    assert difference(cpu, gpu, FIRST) < 1e-4
    assert norm_difference(cpu, gpu, FIRST) < 1e-3


@pytest.mark.parametrize("name", RECIPES)
def test_half_precision(name, apart):
    gpu = apart("half")[name]
    assert np.isfinite(losses(gpu)).all()
    assert len(losses(gpu)) == 3


@pytest.mark.parametrize("case", EXACT)
def test_double_precision_is_that_of_the_cpu(case, apart):
    gpu, cpu = apart("double")[case], apart(f"double, {'large' if 'pg_fdd' in case else 'small'}, on the CPU")[case]
    assert len(losses(cpu)) == STEPS
    assert difference(cpu, gpu) < 1e-8
    assert norm_difference(cpu, gpu) < 1e-8
    assert masks(cpu) == masks(gpu)
    assert any(masks(cpu)) == (case == "sfd_gda")


def masks(run):
    """What was masked before each step, as a hash; None where nothing was."""
    return [line.get("restructured", {}).get("channel_decoupling", {}).get("hash") for line in metrics(run)]
