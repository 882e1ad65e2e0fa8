"""A compiled module is the module: the same losses, gradients and buffers, traced in the first step and never again.

By torch's tracer alone, which takes seconds; the code that is made of what it traces is torch's matter, and is run by
tests/gpu.
"""

import pytest
import torch

from dist_fair.collectives import Communicator
from dist_fair.engine.device import compilation
from tests.engine.accumulation_worlds import after, difference, loaded, trainer
from tests.ranks import run_ranks

CASES = ["daid", "daw", "grid", "pg_fdd"]


def steps(comm, case, what):
    """Each of three steps, and the steps in which something was traced."""
    chosen, made = trainer(case, comm, 1)
    traced = set()

    def noted(graph, inputs):
        traced.add(made.step)
        return graph.forward

    if what != "none":
        torch._dynamo.reset()
        compilation._compiled = lambda function: torch.compile(function, dynamic=False, backend=noted)
        compilation.compile_module(made.module, what)
    found = []
    for made.step in range(3):
        made.backend.optimizer.zero_grad()
        found.append(after(made, loaded(chosen, comm, made, case)))
    return found, traced


@pytest.fixture(autouse=True)
def tracer():
    """Nothing traced before, and torch's compiler in its place afterwards."""
    before = compilation._compiled
    yield
    compilation._compiled = before
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_compiled_steps_are_those_of_the_module(case):
    plain, _ = steps(Communicator(), case, "none")
    compiled, traced = steps(Communicator(), case, "all")
    assert max(difference(one, other) for one, other in zip(compiled, plain, strict=True)) < 1e-12
    assert traced == {0}


def test_collectives_between_ranks_are_outside_of_what_is_compiled():
    """Subgroup norm's moments, and their gradient, are all-reduced in the middle of a hook."""
    plain = run_ranks(2, steps, "daid", "none")
    for (compiled, traced), (expected, _) in zip(run_ranks(2, steps, "daid", "objectives"), plain, strict=True):
        assert max(difference(one, other) for one, other in zip(compiled, expected, strict=True)) < 1e-12
        assert traced == {0}


def test_a_chosen_cache_stays_and_torchs_own_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    _, made = trainer("plain", Communicator(), 1)
    assert str(tmp_path / "dist_fair" / "compiled") in compilation.compile_module(made.module, "objectives")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert str(tmp_path / "mine") in compilation.compile_module(made.module, "objectives")
    assert compilation.compile_module(made.module, "none") is None
