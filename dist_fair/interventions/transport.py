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
to 23 ms. In place of epsilon scaling from 1 downward:

  1. Warm start by transport without entropy, whose dual has a closed form on a line.
  2. Sinkhorn sweeps at 4 eps, then at eps: what is left of epsilon scaling.
  3. Newton's method for the fixed point of a sweep, with a Levenberg-Marquardt term, the marginal error, that keeps
     it quadratic where distant masses hardly interact and the Hessian is all but singular.

The last sweep and the value are in fp64: the value of a group that is nearly aligned is 1e-3, its potentials are 1e-1.
"""

import torch
from torch.autograd.function import once_differentiable

SWEEPS = 3  # Sinkhorn sweeps per level; more do not save a round
LEVELS = (4.0, 1.0)  # of epsilon scaling, in units of epsilon
ROUNDS = 40  # of Newton; 8 was the most in 2,400 random problems, saturated and bimodal ones among them
DAMPING = 0.3  # times the marginal error (L1)
LONGEST = 8.0  # change of a potential in one round, in units of epsilon
MEETING = 1e-7  # cumulated masses closer than this are equal


def entropic_transport(points: torch.Tensor, q: torch.Tensor, r: torch.Tensor, epsilon: float) -> torch.Tensor:
    """OT_eps(q_b, r_b) for each b, (b,), differentiable in all three tensors.

    points: (n,) in [0, 1], ascending. q, r: (b, n), rows sum to one; zeros are allowed where only the gradient of
    `points` is asked for. One more Newton step follows the first marginal error (L1) below 1e-3 in fp32, 1e-8 in
    fp64: values to 1e-5 and 1e-10, relative. Inputs that are not finite give NaN.
    Same inputs, same bits: every rank may solve on its own.
    """
    return _EntropicTransport.apply(points, q, r, epsilon)


def potentials(
    points: torch.Tensor, q: torch.Tensor, r: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The optimal f, g, both (b, n) fp64, such that P = q_i exp((f_i + g_j - C_ij) / epsilon) r_j."""
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        g = _Solver(points, q, r).solve(_warm_start(points, q, r).to(q.dtype), epsilon)
        final = _Solver(points.double(), q.double(), r.double())
        g = final.half(final.half(g.double(), epsilon, final.log_r), epsilon, final.log_q)
        return final.half(g, epsilon, final.log_r), g


class _EntropicTransport(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points: torch.Tensor, q: torch.Tensor, r: torch.Tensor, epsilon: float) -> torch.Tensor:
        f, g = potentials(points, q, r, epsilon)
        ctx.save_for_backward(points, q, r, f, g)
        ctx.epsilon = epsilon
        return ((q * f).sum(1) + (r * g).sum(1)).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        points, q, r, f, g = ctx.saved_tensors
        to_points = None
        if ctx.needs_input_grad[0]:
            x = points.double()
            difference = x[:, None] - x
            exponents = (f[:, :, None] + g[:, None, :] - difference**2) / ctx.epsilon
            plan = torch.exp(exponents + q.log()[:, :, None] + r.log()[:, None, :]) * gradient[:, None, None]
            to_points = (2 * (plan + plan.mT) * difference).sum((0, 2)).to(points.dtype)
        # The constant is free; this one makes the gradient small where the mass is, and its rounding with it.
        f, g = f - (q * f).sum(1, keepdim=True), g - (r * g).sum(1, keepdim=True)
        return to_points, (f * gradient[:, None]).to(q.dtype), (g * gradient[:, None]).to(q.dtype), None


class _Solver:
    """State that all steps share. K (b, n, n) is the plan over q: rows sum to one at f; P = q_i K_ij."""

    def __init__(self, points: torch.Tensor, q: torch.Tensor, r: torch.Tensor):
        single = q.dtype == torch.float32
        self.q, self.r, self.log_q, self.log_r = q, r, q.log(), r.log()
        self.cost = (points[:, None] - points).square()
        self.tiny = torch.finfo(q.dtype).tiny
        self.tolerance = 1e-3 if single else 1e-8
        # Below these, products are denormal numbers, which a CPU multiplies 100 times slower, and change nothing.
        self.lowest, self.least = (-40.0, 1e-10) if single else (-90.0, 1e-20)
        self.ridge = 1e-5 if single else 1e-12

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
        for _ in range(ROUNDS):
            plan = self.rows(g, epsilon)
            a, b = self.sweep(plan, SWEEPS)
            plan = plan.mul_(a[:, :, None]).mul_(b[:, None, :])
            columns = self.columns(plan).clamp_min(self.tiny)
            error = (columns - self.r).abs().sum(1)
            step = b.log() + self.newton(plan, columns, error).clamp(-LONGEST, LONGEST)
            g = g + epsilon * step
            if not bool(error.max() >= self.tolerance):  # leaves on NaN too
                break
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
        system.diagonal(dim1=1, dim2=2).add_(1 + self.ridge + DAMPING * error[:, None])
        return torch.linalg.solve_ex(system, (root * self.log_ratio(columns))[:, :, None])[0][:, :, 0] / root


def _warm_start(points: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """g (b, n) fp64 of transport without entropy, in closed form.

    The optimal plan is the monotone one: r's first j points are served by q's points up to i(j), where the cumulated
    masses meet. There f_i + g = C_i on both sides of the border between j and j + 1, so g rises by C_i,j+1 - C_ij.
    Where masses meet in a gap between points, both of its ends would do; entropy prefers the middle.
    """
    points, heights, levels = points.double(), q.double().cumsum(1), r.double().cumsum(1)[:, :-1]
    ends = [torch.searchsorted(heights, levels + shift).clamp(max=q.shape[1] - 1) for shift in (-MEETING, MEETING)]
    served = (points[ends[0]] + points[ends[1]]) / 2
    steps = points.diff() * (points[1:] + points[:-1] - 2 * served)
    return torch.nn.functional.pad(steps.cumsum(1), (1, 0))
