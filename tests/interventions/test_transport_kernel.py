"""The transport kernel against the solver in torch and POT: under Triton's interpreter, built for a GPU, and on one.

Triton reads TRITON_INTERPRET when it is imported, so what is interpreted runs in a process of its own, all at once.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch

from dist_fair.interventions import transport
from dist_fair.interventions.density import FLOOR
from tests.interventions.test_transport import PAPER, problems

NAMES = ("cost", "to_points", "to_q", "to_r")
needs_triton = pytest.mark.skipif(transport._kernel() is None, reason="Triton is not installed, or has no compiler")


def cases():
    """Name -> arguments of `solve`. All in one or two tiles: the interpreter takes seconds for a problem."""
    points, q, r = problems(4, 16, seed=16)
    weights = torch.tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64)
    strange = q.clone()
    strange[1] = torch.nan  # of weight 0
    ones = torch.ones(2, dtype=torch.float64)
    found = {"rows go round": (points, 3 * strange, r[:2] / 7, weights, PAPER, FLOOR, False)}
    points, q, r = problems(2, 21, seed=3)
    found["padded"] = (points, q, r, ones, 5e-3, FLOOR, True)
    found["single"] = (*(tensor.float() for tensor in (points, q, r, ones)), 0.05, 1e-3, True)
    found["with a floor"] = (points, q, r, ones, 0.05, 0.02, True)
    points, q, r = problems(2, 32, seed=8, kinds=["spread"])
    found["of POT"] = (points, q, r, ones, 5e-3, 0.0, True)
    random = torch.Generator().manual_seed(2)
    points = torch.rand(12, generator=random, dtype=torch.float64).sort()[0]
    points[4] = points[5]
    r = torch.tensor([[1.0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1]], dtype=torch.float64)
    q = torch.stack([r[0] * (torch.arange(12) % 3 == 0), r[0], torch.zeros(12, dtype=torch.float64)])
    found["samples"] = (points, q, r, torch.ones(3, dtype=torch.float64), 0.01, 0.0, True)
    points, q, r = problems(2, 16, seed=1)
    q[0, 3] = torch.nan
    found["not a number"] = (points, q, r, ones, 0.05, FLOOR, True)
    return found


def interpret(out):
    """Solves all cases by the kernel, in a process that interprets it, and one of them again with smaller blocks."""
    from dist_fair.interventions import transport_kernel

    found = {name: transport_kernel.solve(*arguments) for name, arguments in cases().items()}
    transport_kernel._BLOCK = 64
    found["padded, in blocks"] = transport_kernel.solve(*cases()["padded"])
    torch.save(found, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Name -> what the kernel gave."""
    out = tmp_path_factory.mktemp("interpreted") / "found.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", __name__, str(out)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2], timeout=600)
    return torch.load(out)


def compare(found, expected, arguments, tolerance):
    """Costs and slopes. Where distant masses hardly interact, nothing determines how far their potentials are apart:
    at a small epsilon those are compared, where there is mass, by how they change from point to point."""
    _, q, r, weights, epsilon, floor, _ = arguments
    rows = torch.where(weights[:, None] != 0, q, 0).double(), r.repeat(len(q) // len(r), 1).double()
    masses = {name: transport._distributions(row, floor)[0] for name, row in zip(NAMES[2:], rows, strict=True)}
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = one.double(), other.double()
        if name in masses and epsilon < 0.05:
            mass, scale = masses[name], other.abs().max()
            one, other = (rows.diff(dim=1) * torch.minimum(mass[:, 1:], mass[:, :-1]) / scale for rows in (one, other))
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@needs_triton
@pytest.mark.parametrize("case", ["rows go round", "padded", "padded, in blocks", "single", "with a floor", "of POT",
                                  "samples"])  # fmt: skip
def test_it_comes_to_the_same_fixed_point(interpreted, case):
    arguments = cases()[case.partition(",")[0]]
    expected = transport.solve(*arguments)
    compare(interpreted[case], expected, arguments, 1e-5 if case == "single" else 1e-10)


@needs_triton
def test_weight_zero_empty_rows_and_what_is_not_a_number(interpreted):
    cost, _, to_q, to_r = interpreted["rows go round"]
    assert cost[1] == 0
    assert not to_q[1].any()
    assert not to_r[1].any()
    assert not interpreted["samples"][2][2].any()  # a row of zeros stands for the uniform one, and stays it
    assert interpreted["not a number"][0].isnan().tolist() == [True, False]


@needs_triton
def test_plan_and_value_are_those_of_pot(interpreted):
    points, q, r, *_ = cases()["of POT"]
    distance = (points[:, None] - points) ** 2
    costs, _, f, g = interpreted["of POT"]
    for b, value in enumerate(costs):
        theirs, log = ot.sinkhorn(
            q[b].numpy(), r[b].numpy(), distance.numpy(), 5e-3, method="sinkhorn_stabilized", numItermax=20_000,
            stopThr=1e-12, log=True
        )  # fmt: skip
        assert log["err"][-1] < 1e-12
        product = q[b][:, None] * r[b]
        mine = torch.exp((value + f[b][:, None] + g[b] - distance) / 5e-3) * product
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=0, atol=1e-8)
        information = np.sum(theirs * np.log(np.maximum(theirs, 1e-300) / product.numpy()))
        assert value.item() == pytest.approx(np.sum(theirs * distance.numpy()) + 5e-3 * information, rel=1e-6)


# Built for a GPU ------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("along", [False, True])
def test_it_builds_for_a_gpu(along, tmp_path, monkeypatch):
    """Without one. What only the compiler refuses, the interpreter does not see."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = transport._kernel()._solve
    constants = {"N": 16, "BLOCK": 16, "EPSILON": PAPER, "FLOOR": FLOOR} | ({} if along else {"to_points": None})
    kinds = dict.fromkeys(kernel.arg_names, "*fp64") | {"n": "i32", "cycle": "i32"}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), places)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"]


def test_without_triton_or_a_compiler_the_solver_in_torch_serves(monkeypatch):
    monkeypatch.setattr(transport, "_kernel", transport._kernel.__wrapped__)
    with monkeypatch.context() as patch:
        patch.delattr("dist_fair.interventions.transport_kernel", raising=False)
        patch.setitem(sys.modules, "dist_fair.interventions.transport_kernel", None)
        assert transport._kernel() is None
    if "triton" in sys.modules:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
        with pytest.warns(UserWarning, match="Triton finds no C compiler"):
            assert transport._kernel() is None


def test_the_kernel_serves_gpus_as_far_as_it_goes(monkeypatch):
    kernel = SimpleNamespace(LARGEST=128, solve=lambda *arguments: None)

    class Points(list):
        is_cuda = True

    def solver(number, is_cuda=True):
        points = Points(range(number))
        points.is_cuda = is_cuda
        return transport._solver(points)

    monkeypatch.setattr(transport, "_kernel", lambda: kernel)
    assert solver(128) is kernel.solve
    assert solver(129) is transport.solve
    assert solver(128, is_cuda=False) is transport.solve
    monkeypatch.setattr(transport, "_kernel", lambda: None)
    assert solver(128) is transport.solve


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("bins", [2, 128, 512])
def test_on_a_gpu_it_comes_to_the_same_fixed_point(bins):
    arguments = *problems(16, bins, seed=bins), torch.ones(16, dtype=torch.float64), PAPER, FLOOR, True
    expected = transport.solve(*arguments)
    found = [transport.solution(*(one.cuda() if isinstance(one, torch.Tensor) else one for one in arguments))
             for _ in range(2)]  # fmt: skip
    assert all(map(torch.equal, *found))  # the same bits each time
    compare([one.cpu() for one in found[0]], expected, arguments, 1e-9)


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_sixteen_problems_of_128_points_take_half_a_millisecond():
    points, q, r = (one.cuda() for one in problems(16, 128, seed=4))
    weights = torch.ones(16, dtype=torch.float64, device="cuda")
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        transport.solution(points, q, r, weights, PAPER, FLOOR, False)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    assert sorted(times)[10] < 0.5


if __name__ == "__main__":
    interpret(sys.argv[1])
