"""A checkpoint knows no device: a run that goes from the GPU to the CPU and back is the run that stayed."""

import pytest

from tests.command_line.runs import difference, losses
from tests.gpu.runs import DEVICE, recipe, train

pytestmark = pytest.mark.gpu
STOPS = ((DEVICE, 2), ("cpu", 2), (DEVICE, 2))  # where, and how many steps
MASKS = "+interventions.channel_decoupling={batch_size: 50, batches: 1, at: [0.2], part: 0.05}"


# SGD too: its moments are laid out as the weights are, and on a GPU these are channels_last.
@pytest.mark.parametrize("optimizer", [(), ("optimizer.name=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.9")])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-8), ("fp32", 1e-4)])
def test_from_the_gpu_to_the_cpu_and_back(precision, tolerance, optimizer, drawn, tmp_path):
    steps = sum(count for _, count in STOPS)
    arguments = recipe("daid", f"train.steps={steps}", f"train.precision={precision}", MASKS, *optimizer)
    stayed = train(tmp_path / "stayed", arguments)
    for device, count in STOPS:
        went = train(tmp_path / "went", [*arguments, f"train.stop_after={count}"], device)
    assert len(losses(went)) == len(losses(stayed)) == steps
    assert difference(stayed, went) < tolerance
