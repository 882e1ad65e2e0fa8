"""Switches are set as asked, and what torch refuses is an error with a fix."""

import os

import pytest
import torch

from dist_fair.engine.device.numerics import refusals_told, seed, set_numerics
from dist_fair.errors import DistFairError


@pytest.fixture(autouse=True)
def switches(monkeypatch):
    """As they were, whatever a test sets."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.parametrize(("tf32", "precision"), [(False, "highest"), (True, "high")])
def test_tf32_is_of_convolutions_and_products_alike(tf32, precision):
    set_numerics(torch.device("cuda"), tf32=tf32)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_fixes_kernels_choice_and_workspace():
    set_numerics(torch.device("cuda"), deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_on_the_cpu_only_what_torch_refuses_changes():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    set_numerics(torch.device("cpu"), tf32=True, deterministic=True)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before
    assert torch.are_deterministic_algorithms_enabled()
    set_numerics(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_torch_refuses_names_the_setting_and_the_operation():
    set_numerics(torch.device("cpu"), deterministic=True)
    values, places = torch.ones(3), torch.tensor([0, 0, 1])
    told = pytest.raises(DistFairError, match=r"^train\.deterministic=true: .*put_.*train\.deterministic=false")
    with told, refusals_told():
        torch.zeros(4).put_(places, values, accumulate=False)


def test_other_errors_are_left_as_they_are():
    set_numerics(torch.device("cpu"), deterministic=True)
    with pytest.raises(RuntimeError, match="size") as error, refusals_told():
        torch.ones(2) + torch.ones(3)
    assert not isinstance(error.value, DistFairError)


def test_a_seed_gives_the_numbers_of_torchs_own():
    torch.manual_seed(5)
    expected = torch.rand(3)
    seed(torch.device("cpu"), 5)
    assert torch.equal(torch.rand(3), expected)
