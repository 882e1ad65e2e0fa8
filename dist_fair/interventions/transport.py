"""Entropic optimal transport between distributions on a line, many at once, exact gradients without unrolling.

    OT_eps(q, r) = min over plans P with marginals q, r of  <P, C> + eps KL(P || q x r),      C_ij = (x_i - x_j)^2
                 = max over f, g of  <q, f> + <r, g> - eps <q x r, exp((f + g - C) / eps) - 1>

(SFD + GDA, CVPR 2026: "optimal transport with mutual information regularisation": I(X; Y) is that KL.) By the envelope
theorem the gradient is read off the solution: d/dq = f, d/dr = g (each up to a constant, because q and r sum to
one), d/dC = P.

Sinkhorn's iteration contracts by about 1 - 5 eps / L^2 where mass must travel L: at the paper's eps = 5e-4 that is
thousands of iterations. Measured for 12 problems of 128 points, fp32, one CPU thread: POT's batched log-domain solver
(ot.solve_batch, which has no warm start) takes 10 s for 1,000 iterations and a marginal error of 7e-3, 30 s for 2e-5.
A training step of the demo is 0.1 s. So POT is the oracle of the tests, and the solver is this one: 3 or 4 rounds, 16
to 23 ms; 16 problems in fp64, as in training, take 60 ms. In place of epsilon scaling from 1 downward:

  1. Warm start by transport without entropy, whose dual has a closed form on a line.
  2. Sinkhorn sweeps at 4 eps, then at eps: what is left of epsilon scaling.
  3. Newton's method for the fixed point of a sweep, with a Levenberg-Marquardt term, the marginal error, that keeps
     it quadratic where distant masses hardly interact and the Hessian is all but singular.

The last sweep and the value are in fp64: the value of a group that is nearly aligned is 1e-3, its potentials are 1e-1.

The host never waits for a device. On a GPU with Triton all of it is one launch, up to 512 points (see
`transport_kernel`: its own way through Newton's system, the same fixed point). Elsewhere it is this file, whose rounds
are fixed in number: a problem that has converged stands still while others go on, so its bits do not depend on them.
On the CPU, where looking costs nothing, the rounds end when all have converged, with the same bits again.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch.autograd.function import once_differentiable

SWEEPS = 3  # Sinkhorn sweeps per level; more do not save a round
LEVELS = (4.0, 1.0)  # of epsilon scaling, in units of epsilon
ROUNDS = 24  # of Newton; 17 was the most in 48,600 random problems, saturated, bimodal and empty ones among them
DAMPING = 0.3  # times the marginal error (L1)
LONGEST = 8.0  # change of a potential in one round, in units of epsilon; halved whenever the marginal error rises
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the marginal error; one more step follows
RIDGE = {torch.float32: 1e-5, torch.float64: 1e-12}
MEETING = {torch.float32: 1e-7, torch.float64: 1e-9}  # cumulated masses closer than this are equal
# At 1e-7 in fp64 a gap that 1e-8 of the mass must cross was one that nothing crosses, and the potentials on its two
# sides took up to 60 rounds to come apart.


def entropic_transport(
    points: torch.Tensor,
    q: torch.Tensor,
    r: torch.Tensor,
    epsilon: float,
    weights: torch.Tensor | None = None,
    floor: float = 0.0,
) -> torch.Tensor:
    """weight_b OT_eps(q_b, r_b) for each b, (...), differentiable in points, q and r, once.

    points: (n,) in [0, 1], ascending. q: (..., n), r: likewise or fewer rows, which then go round: the k-th row of q
    meets the k-th row of r modulo their number. Rows are not negative; each stands for the distribution it is
    proportional to, with `floor` added to every probability (and divided again), a row of zeros for the uniform one,
    with zero gradients. Without a floor, zeros are allowed where only the gradient of `points` is asked for.
    weights: (...), constants; None is 1. Where one is 0 its problem is left out: cost and gradients are 0, whatever
    the rows of q hold.

    One more Newton step follows the first marginal error (L1) below 1e-4 in fp32, 1e-8 in fp64: values to 1e-5 and
    1e-10, relative. Inputs that are not finite give NaN. Same inputs, same bits: every rank may solve on its own.
    """
    weights = q.new_ones(q.shape[:-1]) if weights is None else weights
    return _EntropicTransport.apply(points, q, r, weights, epsilon, floor)


class _EntropicTransport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, q, r, weights, epsilon: float, floor: float) -> torch.Tensor:
        rows = [tensor.reshape(-1, len(points)) for tensor in (q, r)]
        cost, *slopes = solution(points, *rows, weights.reshape(-1), epsilon, floor, ctx.needs_input_grad[0])
        ctx.save_for_backward(*slopes)
        ctx.shapes = q.shape, r.shape
        return cost.view(q.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        (to_points, to_q, to_r), (q, r) = ctx.saved_tensors, ctx.shapes
        wanted, gradient = ctx.needs_input_grad, gradient.reshape(-1, 1)
        to_points = (gradient * to_points).sum(0) if wanted[0] else None
        to_q = (gradient * to_q).view(q) if wanted[1] else None
        to_r = (gradient * to_r).view(-1, *r) if wanted[2] else None
        if wanted[2]:
            to_r = to_r[0] if len(to_r) == 1 else to_r.sum(0)
        return to_points, to_q, to_r, None, None, None


@torch.library.custom_op("dist_fair::entropic_transport", mutates_args=())
def solution(
    points: torch.Tensor,
    q: torch.Tensor,
    r: torch.Tensor,
    weights: torch.Tensor,
    epsilon: float,
    floor: float,
    along: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`solve`, by whoever is to. One operation to torch: a compiler need not look inside."""
    return _solver(points)(points, q, r, weights, epsilon, floor, along)


@solution.register_fake
def _(points, q, r, weights, epsilon, floor, along):
    to_points = q.new_empty(len(q) if along else 0, q.shape[1])
    return q.new_empty(len(q)), to_points, torch.empty_like(q), torch.empty_like(q)


def _solver(points: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The kernel's `solve` where there are a GPU and Triton, for as many points as it takes; else the one below."""
    kernel = _kernel() if points.is_cuda else None
    return solve if kernel is None or len(points) > kernel.LARGEST else kernel.solve


@cache
def _kernel():
    """The module `transport_kernel`, or None where Triton is missing or cannot build anything."""
    try:
        from dist_fair.interventions import transport_kernel
    except ImportError:
        return None
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return transport_kernel
    warnings.warn(
        "optimal transport: Triton finds no C compiler (gcc, clang or CC=...), so it takes some hundred small kernels "
        "a step instead of one, for the same result",
        stacklevel=2,
    )
    return None


def _may_look(tensor: torch.Tensor) -> bool:
    """Whether the host may look at a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


@torch.no_grad()
def solve(
    points: torch.Tensor,
    q: torch.Tensor,
    r: torch.Tensor,
    weights: torch.Tensor,
    epsilon: float,
    floor: float,
    along: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted costs (b,) and their gradients with respect to the points, q and r, (b, n) each.

    q: (b, n), r: (c, n), weights: (b,), see `entropic_transport`. along: whether the gradients with respect to the
    points are wanted; else there are 0 rows of them.
    """
    kind, active = q.dtype, (weights != 0)[:, None]
    with torch.autocast(points.device.type, enabled=False):
        q, q_scale = _distributions(torch.where(active, q, 0).double(), floor)
        r, r_scale = _distributions(torch.where(active, r.repeat(len(q) // len(r), 1), 0).double(), floor)
        start = _warm_start(points.double(), q, r, MEETING[kind])
        g = _Solver(points, q.to(kind), r.to(kind)).solve(start.to(kind), epsilon)
        final = _Solver(points.double(), q, r)
        g = final.half(final.half(g.double(), epsilon, final.log_r), epsilon, final.log_q)
        f = final.half(g, epsilon, final.log_r)
        f_mean, g_mean = (q * f).sum(1, keepdim=True), (r * g).sum(1, keepdim=True)
        weights = weights[:, None].double()
        to_q = weights * q_scale * _tilted(f - f_mean, floor)
        to_r = weights * r_scale * _tilted(g - g_mean, floor)
        to_points = weights * final.along(g, epsilon) if along else f[:0]
        cost = (weights * (f_mean + g_mean))[:, 0]
    return cost.to(kind), to_points.to(kind), to_q.to(kind), to_r.to(kind)


def _distributions(rows: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (b, n) as distributions, and what a gradient is multiplied by on its way back, (b, 1)."""
    total, most = rows.sum(1, keepdim=True), 1 + rows.shape[1] * floor
    empty = total == 0
    shares = torch.where(empty, 1 / rows.shape[1], rows / torch.where(empty, 1, total))
    return (shares + floor) / most, torch.where(empty, 0, 1 / (most * torch.where(empty, 1, total)))


def _tilted(potential: torch.Tensor, floor: float) -> torch.Tensor:
    """The gradient with respect to a row that sums to 1, before the floor, if the potential's mean after it is 0."""
    return potential + floor * potential.sum(1, keepdim=True)


class _Solver:
    """State that all steps share. K (b, n, n) is the plan over q: rows sum to one at f; P = q_i K_ij."""

    def __init__(self, points: torch.Tensor, q: torch.Tensor, r: torch.Tensor):
        single = q.dtype == torch.float32
        self.points, self.q, self.r, self.log_q, self.log_r = points, q, r, q.log(), r.log()
        self.cost = (points[:, None] - points).square()
        self.tiny = torch.finfo(q.dtype).tiny
        self.tolerance = TOLERANCE[q.dtype]
        # Below these, products are denormal numbers, which a CPU multiplies 100 times slower, and change nothing.
        self.lowest, self.least = (-40.0, 1e-10) if single else (-90.0, 1e-20)
        self.ridge = RIDGE[q.dtype]

    def half(self, potential: torch.Tensor, epsilon: float, log_weights: torch.Tensor) -> torch.Tensor:
        """Half a sweep in the log domain: the other potential, at every point, also where there is no mass."""
        exponents = torch.sub((potential / epsilon + log_weights)[:, None, :], self.cost, alpha=1 / epsilon)
        highest = exponents.amax(2, keepdim=True)
        return (
            -epsilon
            * (highest + exponents.sub_(highest).clamp_min_(2 * self.lowest).exp_().sum(2, keepdim=True).log())[..., 0]
        )

    def rows(self, g: torch.Tensor, epsilon: float) -> torch.Tensor:
        """K for the f that meets q's marginal exactly."""
        plan = torch.sub((g / epsilon + self.log_r)[:, None, :], self.cost, alpha=1 / epsilon)
        plan = plan.sub_(plan.amax(2, keepdim=True)).clamp_min_(self.lowest).exp_()
        return plan.div_(plan.sum(2, keepdim=True))

    def columns(self, plan: torch.Tensor) -> torch.Tensor:
        """Column sums of P, (b, n)."""
        return (self.q[:, None] @ plan)[:, 0]

    def along(self, g: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The gradient of <P, C> with respect to the points, (b, n): 2 sum over j of (P_kj + P_jk) (x_k - x_j)."""
        # Where r is 0 nothing goes; `rows` has e^lowest there.
        plan, x = self.rows(g, epsilon).mul_(self.r[:, None] > 0), self.points
        return 2 * (self.q * (x - plan @ x) + x * self.columns(plan) - ((self.q * x)[:, None] @ plan)[:, 0])

    def log_ratio(self, columns: torch.Tensor) -> torch.Tensor:
        """log(r / columns), zero where r is zero."""
        return torch.where(self.r > 0, self.log_r - columns.clamp_min(self.tiny).log(), 0)

    def sweep(self, plan: torch.Tensor, times: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sinkhorn's iteration: a, b (b, n) such that diag(a) K diag(b) has rows that sum to one."""
        a, b = torch.ones_like(self.q), torch.ones_like(self.r)
        for _ in range(times):
            b = self.r / ((self.q * a)[:, None] @ plan)[:, 0].clamp_min(self.tiny)
            a = 1 / (plan @ b[:, :, None])[:, :, 0].clamp_min(self.tiny)
        return a, torch.where(self.r > 0, b.clamp_min(self.tiny), 1)

    def solve(self, g: torch.Tensor, epsilon: float) -> torch.Tensor:
        """g (b, n) at the solution, from a start."""
        for level in LEVELS:
            g = self.half(self.half(g, level * epsilon, self.log_r), level * epsilon, self.log_q)
            _, b = self.sweep(self.rows(g, level * epsilon), SWEEPS)
            g = g + level * epsilon * b.log()
        error, longest = g.new_full((len(g), 1), torch.inf), g.new_full((len(g), 1), LONGEST)
        for _ in range(ROUNDS):
            active = error >= self.tolerance  # ends on NaN too, and with one more step after the first error below
            if _may_look(active) and not active.any():
                break
            plan = self.rows(g, epsilon)
            a, b = self.sweep(plan, SWEEPS)
            plan = plan.mul_(a[:, :, None]).mul_(b[:, None, :])
            columns, before = self.columns(plan).clamp_min(self.tiny), error
            error = torch.where(active, (columns - self.r).abs().sum(1, keepdim=True), error)
            longest = torch.where(error > before, longest / 2, longest)
            step = self.newton(plan, columns, error)
            step = b.log() + torch.minimum(torch.maximum(step, -longest), longest)
            g = torch.where(active, g + epsilon * step, g)
        return g

    def newton(self, plan: torch.Tensor, columns: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """The step of g / epsilon that makes Sinkhorn's sweep stand still, to first order, (b, n).

        A sweep maps a small d to N d with N = diag(1/columns) P^T diag(1/q) P; so (1 - N) d = log(r / columns). Solved
        in the symmetric form, with the constant vector, which changes nothing, taken out.
        """
        root = columns.sqrt()
        half = plan * self.q.sqrt()[:, :, None] / root[:, None, :]
        half = torch.nn.functional.threshold(half, self.least, 0.0)
        system = torch.baddbmm(root[:, :, None] * root[:, None, :], half.mT, half, alpha=-1)
        system.diagonal(dim1=1, dim2=2).add_(1 + self.ridge + DAMPING * error)
        return torch.linalg.solve_ex(system, (root * self.log_ratio(columns))[:, :, None])[0][:, :, 0] / root


def _warm_start(points: torch.Tensor, q: torch.Tensor, r: torch.Tensor, meeting: float) -> torch.Tensor:
    """g (b, n) of transport without entropy, in closed form; all in fp64.

    The optimal plan is the monotone one: r's first j points are served by q's points up to i(j), where the cumulated
    masses meet. There f_i + g = C_i on both sides of the border between j and j + 1, so g rises by C_i,j+1 - C_ij.
    Where masses meet in a gap between points, both of its ends would do; entropy prefers the middle.
    """
    upwards = torch.ones_like(points[:, None] + points).triu()  # as a sum: cumsum of floats has no fixed order on a GPU
    heights, levels = q @ upwards, r @ upwards[:, :-1]
    ends = [torch.searchsorted(heights, levels + shift).clamp(max=q.shape[1] - 1) for shift in (-meeting, meeting)]
    served = (points[ends[0]] + points[ends[1]]) / 2
    steps = points.diff() * (points[1:] + points[:-1] - 2 * served)
    return torch.nn.functional.pad(steps @ upwards[:-1, :-1], (1, 0))
