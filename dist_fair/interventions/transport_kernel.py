"""Entropic optimal transport in one launch: each program of this Triton kernel solves a whole problem on its own.

The fixed point is that of `transport`; so are the warm start, the sweeps, the damping and when to stop. Newton's system
is solved in another way: a program cannot call a factorisation, and elimination of n x n numbers is n steps that wait
for each other. What it is good at is the product of K with a vector, 128 KB of 128 points that stay in the cache of its
multiprocessor. So the system is solved by conjugate gradients. With P = q_i K_ij the plan and c its column sums,

    H d = c log(r / c),      H = diag(c) (1 + damping) - K^T diag(q) K      (d: the step of g, in units of epsilon).

H is nearly a diffusion on a line: mass moves between neighbours within sqrt(epsilon), so that its condition is about
1 / (5 epsilon). But a diffusion between next neighbours alone, L, is inverted by two cumulated sums, and the L that
does to the coordinate x what H does needs no more than H x (its conductances are the cumulated sums of H x). The
preconditioner diag(1/c) + L^+ has both ends of the spectrum right: where H is c (1 - exp(-a)) and L is c a, their
product is (1 - exp(-a)) (1 + 1/a), between 1 and 1.3.

Measured with this arithmetic in torch, for 180 problems of 128 points at the paper's epsilon (predictions spread,
saturated, at two or three places, alike or none; bandwidths from 0.003 to 0.2): 4.3 rounds of Newton (11 at most) and
26 products with H in all of them together (61 at most); without L it is 54 (151). Of 3,440 problems of 16 to 128 points
none took more than 14 rounds, at epsilon 1e-4 none more than 17.

K is walked through in blocks of rows, which are added to by element and reduced once; what a row needs is reduced at
once. So a pass is the same few instructions, whatever n: unrolled over a whole K of 128 points they took minutes to
compile. Everything is in fp64, and products are not fused with sums where this file does not say so: all threads must
come to the same bits of what loops depend on. Programs share nothing: a problem's bits do not depend on the others.
"""

import torch
import triton
import triton.language as tl

from dist_fair.interventions.transport import DAMPING, LEVELS, LONGEST, MEETING, RIDGE, SWEEPS, TOLERANCE

LARGEST = 512  # points
_BLOCK = 4096  # numbers of K that a program looks at together, 8 a thread of 512

_SWEEPS, _DAMPING, _LONGEST = tl.constexpr(SWEEPS), tl.constexpr(DAMPING), tl.constexpr(LONGEST)
_TOLERANCE, _MEETING = tl.constexpr(TOLERANCE[torch.float64]), tl.constexpr(MEETING[torch.float64])
_RIDGE = tl.constexpr(RIDGE[torch.float64])
_FIRST, _LEVELS = tl.constexpr(LEVELS[0]), tl.constexpr(len(LEVELS))  # rounds of sweeps alone; the others at epsilon
_ROUNDS = tl.constexpr(40)  # with those; nobody waits for a problem that ends early
_PRODUCTS = tl.constexpr(60)  # of a solution by conjugate gradients; where it takes more, masses hardly interact
_COARSEST = tl.constexpr(1e-3)  # reduction of its residual; down to 1e-7 as the marginal error falls
_FINEST = tl.constexpr(1e-7)
_LEAST = tl.constexpr(1e-18)  # conductance that is told from rounding
_TINY = tl.constexpr(1e-300)


def solve(
    points: torch.Tensor,
    q: torch.Tensor,
    r: torch.Tensor,
    weights: torch.Tensor,
    epsilon: float,
    floor: float,
    along: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `transport.solve`, for at most LARGEST points, on a GPU (or anywhere under Triton's interpreter)."""
    number, n = q.shape
    size = max(16, triton.next_power_of_2(n))
    block = min(size, _BLOCK // size)
    cost = q.new_empty(number)
    to_points, to_q, to_r = (q.new_empty(rows, n) for rows in (number if along else 0, number, number))
    scratch = q.new_empty(number, size + 3, size, dtype=torch.float64)
    inputs = (tensor.contiguous() for tensor in (points, q, r, weights))
    with torch.cuda.device(q.device if q.is_cuda else -1):
        _solve[(number,)](
            *inputs, cost, to_points if along else None, to_q, to_r, scratch, n, len(r), size, block, epsilon, floor,
            num_warps=max(1, block * size // 256), enable_fp_fusion=False,
        )  # fmt: skip
    return cost, to_points, to_q, to_r


@triton.jit(do_not_specialize=["n", "cycle"])  # an n of 1 would not be a number of the device
def _solve(points, q, r, weights, cost, to_points, to_q, to_r, scratch, n, cycle,
           N: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr, FLOOR: tl.constexpr):  # fmt: skip
    problem, lane = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    here, inside = problem * n + lane, lane < n
    weight = tl.load(weights + problem).to(tl.float64)
    read = lane < tl.where(weight == 0, 0, n)  # nothing of a problem that does not count: it is of uniform rows then
    x = tl.load(points + lane, inside, 0).to(tl.float64)
    gaps = tl.where(lane < n - 1, tl.load(points + lane + 1, lane < n - 1, 0).to(tl.float64) - x, 0)
    q, q_scale = _distribution(q + here, read, inside, n, FLOOR)
    r, r_scale = _distribution(r + problem % cycle * n + lane, read, inside, n, FLOOR)
    epsilon = tl.full((), EPSILON, tl.float64)

    plan = scratch + problem * (N + 3) * N
    marginal = plan + N * N
    tl.store(marginal + lane, q)
    tl.debug_barrier()
    g = _warm_start(points, x, gaps, q, r, lane, n)
    longest = tl.full((), _LONGEST, tl.float64)
    error = tl.full((), float("inf"), tl.float64)
    turn, last = 0, 0
    while last < 2:
        level = tl.where(turn == 0, _FIRST * epsilon, epsilon)
        columns = _rows(plan, points, g, x, tl.log(r), level, n, N, BLOCK)
        b = r
        if (turn < _ROUNDS) & (error >= _TOLERANCE):  # not on NaN either
            for _ in range(_SWEEPS):
                b = _over(r, columns)
                columns = _sweep(plan, b, N, BLOCK)
            columns *= b
            step = tl.log(tl.where(r == 0, 1, b))
            if turn >= _LEVELS:
                before = error
                error = tl.sum(tl.abs(columns - r), axis=0)
                longest = tl.where(error > before, longest / 2, longest)
                newton = _newton(plan, b, r, columns, x, gaps, error, N, BLOCK)
                step += tl.minimum(tl.maximum(newton, -longest), longest)
            g += level * step
            turn += 1
        else:  # one more step has followed the first error below: half a sweep, and the plan that belongs to it
            g += tl.where(last == 0, epsilon, 0) * tl.log(tl.where(r == 0, 1, _over(r, columns)))
            last += 1

    f = tl.load(marginal + 2 * N + lane)
    f_mean, g_mean = tl.sum(q * f, axis=0), tl.sum(r * g, axis=0)
    tl.store(cost + problem, weight * (f_mean + g_mean))
    tl.store(to_q + here, weight * q_scale * _tilted(f - f_mean, inside, FLOOR), inside)
    tl.store(to_r + here, weight * r_scale * _tilted(g - g_mean, inside, FLOOR), inside)
    if to_points is not None:
        tl.store(to_points + here, weight * 2 * _along(plan, points, x, q, n, N, BLOCK), inside)


@triton.jit
def _distribution(places, read, inside, n, FLOOR: tl.constexpr):
    """The row as probabilities, and what a gradient is multiplied by on its way back: 0 where they are made up."""
    row = tl.load(places, read, 0).to(tl.float64)
    total = tl.sum(row, axis=0)
    empty = total == 0
    inverse = 1 / tl.where(empty, 1, total)
    share = tl.where(empty, 1 / n.to(tl.float64), row * inverse)
    most = 1 + n * tl.full((), FLOOR, tl.float64)
    return tl.where(inside, (share + FLOOR) / most, 0), tl.where(empty, 0, inverse / most)


@triton.jit
def _tilted(potential, inside, FLOOR: tl.constexpr):
    """The gradient with respect to q (1 + n FLOOR) + FLOOR, at a sum of 1, of a potential whose mean over q is 0."""
    return potential + FLOOR * tl.sum(tl.where(inside, potential, 0), axis=0)


@triton.jit
def _warm_start(points, x, gaps, q, r, lane, n):
    """g of transport without entropy; see `transport`."""
    heights, levels = tl.cumsum(q, axis=0), tl.cumsum(r, axis=0)
    below = tl.sum((heights[:, None] < levels[None, :] - _MEETING).to(tl.int32), axis=0)
    above = tl.sum((heights[:, None] < levels[None, :] + _MEETING).to(tl.int32), axis=0)
    served = tl.load(points + tl.minimum(below, n - 1)).to(tl.float64)
    served += tl.load(points + tl.minimum(above, n - 1)).to(tl.float64)
    steps = gaps * (2 * x + gaps - served)
    return tl.cumsum(steps, axis=0) - steps


@triton.jit
def _over(r, columns):
    return r / tl.maximum(columns, _TINY)


@triton.jit
def _rows(plan, points, g, x, log_r, epsilon, n, N: tl.constexpr, BLOCK: tl.constexpr):
    """K whose rows sum to one and the f that belongs to it; its columns' sums over q."""
    inverse, lane = 1 / epsilon, tl.arange(0, N)
    scaled = g * inverse + log_r
    sums = tl.zeros([BLOCK, N], tl.float64)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        distance = tl.load(points + row, row < n, 0).to(tl.float64)[:, None] - x[None, :]
        exponents = scaled[None, :] - distance * distance * inverse
        highest = tl.max(exponents, axis=1)
        k = tl.exp(exponents - highest[:, None])
        total = tl.sum(k, axis=1)
        k *= (1 / total)[:, None]
        tl.store(plan + row[:, None] * N + lane[None, :], k)
        tl.store(plan + (N + 2) * N + row, -epsilon * (highest + tl.log(total)))
        sums = tl.fma(k, tl.load(plan + N * N + row)[:, None], sums)
    tl.debug_barrier()
    return tl.sum(sums, axis=0)


@triton.jit
def _sweep(plan, b, N: tl.constexpr, BLOCK: tl.constexpr):
    """Half of Sinkhorn's iteration: the a that makes the rows of a K b sum to one; keeps q a^2, gives sums of q a K."""
    lane, sums = tl.arange(0, N), tl.zeros([BLOCK, N], tl.float64)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        k = tl.load(plan + row[:, None] * N + lane[None, :])
        a = 1 / tl.maximum(tl.sum(k * b[None, :], axis=1), _TINY)
        mass = a * tl.load(plan + N * N + row)
        tl.store(plan + (N + 1) * N + row, a * mass)
        sums = tl.fma(k, mass[:, None], sums)
    tl.debug_barrier()
    return tl.sum(sums, axis=0)


@triton.jit
def _along(plan, points, x, q, n, N: tl.constexpr, BLOCK: tl.constexpr):
    """Half of the gradient of <P, C> with respect to the points: sum over j of (P_kj + P_jk) (x_k - x_j)."""
    lane, received, arrived = tl.arange(0, N), tl.zeros([BLOCK, N], tl.float64), tl.zeros([BLOCK, N], tl.float64)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        k = tl.load(plan + row[:, None] * N + lane[None, :])
        mass, place = tl.load(plan + N * N + row), tl.load(points + row, row < n, 0).to(tl.float64)
        tl.store(plan + (N + 1) * N + row, tl.sum(k * x[None, :], axis=1))
        received = tl.fma(k, mass[:, None], received)
        arrived = tl.fma(k, (mass * place)[:, None], arrived)
    tl.debug_barrier()
    there = tl.load(plan + (N + 1) * N + lane)
    return q * (x - there) + x * tl.sum(received, axis=0) - tl.sum(arrived, axis=0)


@triton.jit
def _product(plan, b, diagonal, d, N: tl.constexpr, BLOCK: tl.constexpr):
    """H d."""
    lane, sums = tl.arange(0, N), tl.zeros([BLOCK, N], tl.float64)
    scaled = b * d
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        k = tl.load(plan + row[:, None] * N + lane[None, :])
        there = tl.sum(k * scaled[None, :], axis=1) * tl.load(plan + (N + 1) * N + row)
        sums = tl.fma(k, there[:, None], sums)
    tl.debug_barrier()
    return diagonal * d - b * tl.sum(sums, axis=0)


@triton.jit
def _newton(plan, b, r, columns, x, gaps, error, N: tl.constexpr, BLOCK: tl.constexpr):
    """d by conjugate gradients, orthogonal to the constant, which changes nothing."""
    mass = tl.sum(columns, axis=0)
    present = columns > 0
    inverse = tl.where(present, 1 / tl.where(present, columns, 1), 0)
    diagonal = columns * (1 + _RIDGE + _DAMPING * error)
    centred = x - tl.sum(columns * x, axis=0) / mass
    flux = -tl.cumsum(_product(plan, b, diagonal, centred, N, BLOCK), axis=0)
    resistance = gaps / tl.maximum(flux, _LEAST)

    residual = columns * tl.log(tl.where(present, r, 1) / tl.where(present, columns, 1))
    residual -= columns * (tl.sum(residual, axis=0) / mass)
    solution = residual * 0
    z = _preconditioned(residual, inverse, resistance, columns, mass)
    direction = z
    size = tl.sum(residual * z, axis=0)
    reduction = tl.minimum(tl.maximum(error, _FINEST), _COARSEST)
    goal = size * reduction * reduction
    turn = 0
    while (turn < _PRODUCTS) & (size > goal):
        product = _product(plan, b, diagonal, direction, N, BLOCK)
        length = size / tl.maximum(tl.sum(direction * product, axis=0), _TINY)
        solution += length * direction
        residual -= length * product
        z = _preconditioned(residual, inverse, resistance, columns, mass)
        before = size
        size = tl.sum(residual * z, axis=0)
        direction = z + size / before * direction
        turn += 1
    return solution


@triton.jit
def _preconditioned(v, inverse, resistance, columns, mass):
    """v / c + L^+ v, for v that sums to 0: what flows across a gap is the sum of v on one side of it."""
    drops = tl.cumsum(v, axis=0) * resistance
    d = drops - tl.cumsum(drops, axis=0)
    return v * inverse + d - tl.sum(columns * d, axis=0) / mass
