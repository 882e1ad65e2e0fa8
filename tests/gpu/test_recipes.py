"""Every recipe trains on a GPU, from shards, through the command line; what it computes there is what the CPU does."""

import numpy as np
import pytest

from tests.command_line.runs import difference, losses, metrics, norm_difference
from tests.gpu.runs import RECIPES, WITHOUT_SAM, recipe, train

pytestmark = pytest.mark.gpu
STEPS = 5
DOUBLE = ("train.precision=fp64", f"train.steps={STEPS}", "train.batch_size=16")
FIRST = range(1)
# Where a network has kinks, two roundings fall on two sides of one sooner or later; the demo's detectors have none.
EXACT = {
    "erm": (),
    "daid": (),
    "sfd_gda": (),
    "daw_fdd": (),
    "pg_fdd": (),
    "pg_fdd without SAM": (WITHOUT_SAM,),
}


@pytest.mark.parametrize("name", RECIPES)
def test_single_precision(name, drawn, tmp_path):
    gpu = train(tmp_path / "gpu", recipe(name))
    cpu = train(tmp_path / "cpu", recipe(name, "train.stop_after=1"), device="cpu")
    assert np.isfinite(losses(gpu)).all()
    assert len(losses(gpu)) == 3
    assert difference(cpu, gpu, FIRST) < 1e-4
    assert norm_difference(cpu, gpu, FIRST) < 1e-3


@pytest.mark.parametrize("name", RECIPES)
def test_half_precision(name, drawn, tmp_path):
    gpu = train(tmp_path / "gpu", recipe(name, "train.precision=bf16"))
    assert np.isfinite(losses(gpu)).all()
    assert len(losses(gpu)) == 3


@pytest.mark.parametrize("case", EXACT)
def test_double_precision_is_that_of_the_cpu(case, drawn, tmp_path):
    arguments = recipe(case.split()[0], *DOUBLE, *EXACT[case])
    gpu, cpu = train(tmp_path / "gpu", arguments), train(tmp_path / "cpu", arguments, device="cpu")
    assert len(losses(cpu)) == STEPS
    assert difference(cpu, gpu) < 1e-8
    assert norm_difference(cpu, gpu) < 1e-8
    assert masks(cpu) == masks(gpu)


def masks(run):
    """Which channels the steps of a run masked."""
    return [line.get("restructured", {}).get("channel_decoupling", {}).get("hash") for line in metrics(run)]
