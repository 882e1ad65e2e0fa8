"""Numbers that come late, and steps that must not: what is not finite stays out of the weights without the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_fair.collectives import Communicator
from dist_fair.engine.backends.ddp import Ddp
from dist_fair.engine.checkpoint import load_optimizer, optimizer_tensors
from dist_fair.engine.device.readings import Reading, Verdict, mean_row
from dist_fair.engine.optimization import build_optimizer
from dist_fair.errors import DistFairError
from dist_fair.recipe.schema import Optimizer, Sam
from tests.engine import sharpness_worlds
from tests.engine.sharpness_worlds import Run, trainer

OPTIMIZERS = {
    "sgd": Optimizer("sgd", 0.1, momentum=0.9),
    "adam": Optimizer("adam", 0.01),
    "adamw": Optimizer("adamw", 0.01, weight_decay=0.1),
    "unfused": Optimizer("adamw", 0.01, arguments={"fused": False}),
    "timm's": Optimizer("lamb", 0.01),
}


@pytest.fixture(params=OPTIMIZERS)
def run(request, monkeypatch, tmp_path):
    """A trainer over an optimizer, and its batches."""
    settings = OPTIMIZERS[request.param]
    monkeypatch.setattr(sharpness_worlds, "optimizer_of", lambda module: build_optimizer(module, settings, fused=True))
    return trainer(Run(Sam(), steps=5), Communicator(), tmp_path)


def state(made):
    """Weights and moments."""
    moments = {f"{name} {key}": value for name, one in made.module.named_parameters()
               for key, value in made.backend.optimizer.state.get(one, {}).items() if value is not None}  # fmt: skip
    tensors = dict(made.module.named_parameters()) | moments
    return {name: torch.as_tensor(value).detach().clone() for name, value in tensors.items()}


def poisoned(made, stream, before):
    """Batches; the gradient of step 2 is not finite, those after it are. Notes the state before that step."""

    def batches(first, last):
        for number, batch in enumerate(stream(first, last)):
            if number == 2:
                before.update(state(made))
                hook = made.module.detector.first.weight.register_hook(lambda gradient: gradient * float("nan"))
            yield batch
            if number == 2:
                hook.remove()

    return batches


def test_a_step_that_is_not_finite_and_those_after_it_leave_weights_and_moments(run):
    (made, stream), before, told = run, {}, []
    with pytest.raises(DistFairError, match=r"step 2: loss [0-9.]+, gradient_norm nan"):
        made.run(poisoned(made, stream, before), None, [lambda step, values: told.append(step)])
    after = state(made)
    assert told == [0, 1]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_step_after_would_have_been_taken(run, monkeypatch):
    """Planted: a verdict that forgets. Step 3 is finite and under way before step 2 is read."""
    monkeypatch.setattr(Verdict, "judge", forgetful)
    (made, stream), before = run, {}
    with pytest.raises(DistFairError, match=r"step 2: loss [0-9.]+, gradient_norm nan"):
        made.run(poisoned(made, stream, before), None, [])
    assert any(not torch.equal(before[name], value) for name, value in state(made).items() if name in before)


def forgetful(self, numbers):
    self.broken = ~numbers.isfinite().all()
    return self.broken


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(function))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(("name", "waits"), [("sgd", False), ("adamw", False), ("unfused", True)])
def test_a_fused_optimizer_is_not_waited_for(name, waits):
    module = torch.nn.Linear(3, 2)
    backend = Ddp.__new__(Ddp)
    backend.module, backend.optimizer = module, build_optimizer(module, OPTIMIZERS[name], fused=True)
    for broken in (False, True):
        module(torch.ones(4, 3)).sum().backward()
        weights = module.weight.detach().clone()
        with Waits() as watch:
            verdict = Verdict().judge(torch.stack([backend.clip(1.0), torch.tensor(torch.inf if broken else 1.0)]))
            backend.step(verdict)
        assert bool(watch.found) == waits
        assert torch.equal(module.weight, weights) == broken


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_moments_come_back_laid_out_as_the_parameters_are(name):
    """A kernel over all tensors pairs elements by their place in memory: contiguous moments of channels-last weights
    would be other elements' moments."""
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    images, twin = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 4, 3)
    one = build_optimizer(module, OPTIMIZERS[name], fused=True)
    step(module, one, images)
    saved = {key: value.contiguous() for key, value in optimizer_tensors(module, one).items()}
    twin.load_state_dict(module.state_dict())
    twin = twin.to(memory_format=torch.channels_last)
    other = build_optimizer(twin, OPTIMIZERS[name], fused=True)
    load_optimizer(twin, other, saved)
    assert all(value.stride() == twin.weight.stride() for value in other.state[twin.weight].values() if value.dim())
    step(module, one, images), step(twin, other, images)
    torch.testing.assert_close(twin.weight, module.weight, rtol=0, atol=0)


def step(module, optimizer, images):
    module(images).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_reading_is_of_the_moment_it_was_made():
    row = torch.tensor([1.0, 2.0], dtype=torch.float64)
    reading = Reading(["loss", "norm"], row)
    row += 1
    assert reading.numbers() == {"loss": 1.0, "norm": 2.0}


def test_means_are_over_rows_of_any_types():
    rows = [[torch.tensor(1.0), torch.tensor(2.0, dtype=torch.float64)], [torch.tensor(3.0), torch.tensor(5)]]
    assert mean_row(rows).tolist() == [2.0, 3.5]
    assert mean_row(rows[:1]).tolist() == [1.0, 2.0]
