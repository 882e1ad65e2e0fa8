"""Every way to share a module out, on a GPU: the losses of DDP."""

import pytest

from tests.command_line.runs import difference, losses
from tests.gpu.runs import WITHOUT_SAM, alone, recipe

pytestmark = pytest.mark.gpu
BACKENDS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
CASES = {"erm": (), "pg_fdd": (WITHOUT_SAM,)}
# In this order: DeepSpeed leaves marks in the environment.
RUNS = [(f"{name} {backend}", recipe(name, *extra, f"train.backend={backend}"))
        for backend in BACKENDS for name, extra in CASES.items()]  # fmt: skip
APART = {"backends": alone(RUNS)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_losses_are_those_of_ddp(backend, name, apart):
    ddp, other = (apart("backends")[f"{name} {one}"] for one in ("ddp", backend))
    assert len(losses(ddp)) == 3
    assert difference(ddp, other) < 1e-4
