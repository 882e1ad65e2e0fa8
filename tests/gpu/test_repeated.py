"""`train.deterministic=true`: the same command gives the same bytes, in another process too; or it is refused."""

from unittest import mock

import pytest
import torch

from dist_fair.detectors import timm_backbone
from dist_fair.errors import DistFairError
from tests.command_line.runs import metrics
from tests.gpu.runs import DEVICE, alone, recipe, train

pytestmark = pytest.mark.gpu
PRECISION = {"erm": "bf16", "daid": "fp32", "sfd_gda": "fp32", "pg_fdd": "fp32"}
TIMES = (
    "seconds",
    "samples_per_second",
    "tflops_per_second",
    "data_wait",
    "checkpoint",
)  # what a line's keys begin with
RUNS = [(name, recipe(name, "train.steps=4", "train.deterministic=true", f"train.precision={precision}"))
        for name, precision in PRECISION.items()]  # fmt: skip
# In another order: other memory, and other kernels, lie before each run.
APART = {"once": alone(RUNS), "again": alone(RUNS[::-1])}


@pytest.mark.parametrize("name", PRECISION)
def test_the_same_bytes(name, apart):
    one, other = apart("once")[name], apart("again")[name]
    assert told(one) == told(other)
    assert len(told(one)) == 4
    files = [path.relative_to(one) for path in sorted((one / "checkpoints").rglob("*.safetensors"))]
    assert len(files) >= 2
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def told(run):
    """The lines of metrics.jsonl, without what a clock says."""
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in metrics(run)]


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU can repeat it")
def test_what_cannot_be_repeated_is_refused(tmp_path):
    """Planted: a backbone whose last map is pooled by an operation that has no repeatable backward kernel."""
    last_map, pool = timm_backbone.last_map, torch.nn.AdaptiveAvgPool2d(1)
    pooled = mock.patch.object(timm_backbone, "last_map", lambda backbone, images: pool(last_map(backbone, images)))
    try:
        with pooled, pytest.raises(DistFairError, match=r"train\.deterministic=true: .*adaptive_avg_pool2d"):
            train(tmp_path / "run", recipe("erm", "train.deterministic=true"))
    finally:
        torch.use_deterministic_algorithms(False)
