"""`train.deterministic=true`: the same command gives the same bytes, in another process too."""

import pytest

from tests.command_line.runs import metrics
from tests.gpu.runs import alone, recipe

pytestmark = pytest.mark.gpu
RECIPES = ("erm", "daid", "sfd_gda", "pg_fdd")
TIMES = (
    "seconds",
    "samples_per_second",
    "tflops_per_second",
    "data_wait",
    "checkpoint",
)  # what a line's keys begin with
RUNS = [
    (name, recipe(name, "train.steps=4", "train.deterministic=true", f"train.precision={precision}"))
    for name, precision in zip(RECIPES, ("bf16", "fp32", "fp32", "fp32"), strict=True)
]
# Another order: other memory, and other kernels, lie before each run.
APART = {
    "once": lambda folder: alone(folder, RUNS),
    "again": lambda folder: alone(folder, RUNS[::-1]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bytes(name, apart):
    one, other = (apart(when) / name for when in ("once", "again"))
    assert told(one) == told(other)
    assert len(told(one)) == 4
    files = [path.relative_to(one) for path in sorted((one / "checkpoints").rglob("*.safetensors"))]
    assert len(files) >= 2
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def told(run):
    """The lines of metrics.jsonl, without what a clock says."""
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in metrics(run)]
