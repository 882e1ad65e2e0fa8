"""A step does not wait for the device: torch raises where it does."""

from unittest import mock

import pytest
import torch

from dist_fair.engine.loop import Trainer
from tests.command_line.runs import losses
from tests.gpu.runs import DEVICE, WITHOUT_SAM, recipe, train

pytestmark = pytest.mark.gpu
WARM = 2  # steps; constants are copied to the device, and memory is had from the driver
LAUNCH = Trainer._step


class Watched:
    """In the place of Trainer._step: within it, once warm, whoever waits raises. What is told of a step lies outside,
    and so does a wait that is planted."""

    def __init__(self, planted=False):
        self.steps, self.planted = 0, planted

    def __call__(self, trainer, stream):
        self.steps += 1
        mode = "error" if self.steps > WARM and DEVICE == "cuda" else "default"
        torch.cuda.set_sync_debug_mode(mode) if DEVICE == "cuda" else None
        try:
            launched = LAUNCH(trainer, stream)
            if self.planted:
                torch.ones(1, device=DEVICE).item()
            return launched
        finally:
            torch.cuda.set_sync_debug_mode("default") if DEVICE == "cuda" else None


def watched(out, arguments, planted=False):
    watch = Watched(planted)
    with mock.patch.object(Trainer, "_step", lambda trainer, stream: watch(trainer, stream)):
        train(out, arguments)
    assert watch.steps == len(losses(out)) == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["erm", "daid", "sfd_gda", "daw_fdd", "pg_fdd"])
def test_a_step_launches_and_goes_on(name, precision, drawn, tmp_path):
    arguments = [*recipe(name), "train.steps=5", f"train.precision={precision}", "train.clip=1.0"]
    watched(tmp_path / "run", [*arguments, WITHOUT_SAM] if name == "pg_fdd" else arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="nobody waits for a CPU")
def test_a_wait_would_be_noticed(drawn, tmp_path):
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched(tmp_path / "run", [*recipe("erm"), "train.steps=5"], planted=True)
