"""Worst-part means and margins of PG-FDD, DAG-FDD and DAW-FDD once more, naively: loops over samples, fp64.

Nothing here uses a group code or a closed form of the package. Gradients are autograd's.
"""

import math

import torch
from scipy import optimize

from tests.interventions.cases import VOCABULARY
from tests.interventions.reference import groups

TAU_1, TAU_2, GUARD = 1e-3, 1e-4, 88.7228391  # the last is log of fp32's largest number


def worst_part(values, alpha):
    """The mean of the worst alpha n of a list, taken one by one; of equal ones the first is taken first."""
    k = left = alpha * len(values)
    total = 0.0
    for value in sorted(values, key=lambda one: -float(one.detach())):
        taken = min(1.0, left)
        total, left = total + taken * value, left - taken
    return total / min(k, len(values))


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def smoothed_objective(lam, values, alpha):
    """F(lambda) of floats."""
    soft = sum(TAU_1 * softplus((value - lam) / TAU_1) for value in values)
    return lam + TAU_2 / (2 * alpha) * lam**2 + soft / (alpha * len(values))


def smoothed_slope(lam, values, alpha):
    parts = sum(0.5 * (1 + math.tanh((value - lam) / TAU_1 / 2)) for value in values)
    return 1 + TAU_2 / alpha * lam - parts / (alpha * len(values))


def smoothed(values, alpha, guarded=False):
    """F at its minimum, lambda by root finding; guarded: lambda in [max - .0887, max]."""
    floats = [float(value.detach()) for value in values]
    lam = optimize.brentq(smoothed_slope, -1.5, max(floats) + 1.5, args=(floats, alpha), xtol=1e-15, rtol=1e-15)
    if guarded:
        lam = min(max(lam, max(floats) - GUARD * TAU_1), max(floats))
    total = lam + TAU_2 / (2 * alpha) * lam**2
    for value in values:
        excess = (value - lam) / TAU_1
        total = total + TAU_1 * torch.logaddexp(excess, torch.zeros_like(excess)) / (alpha * len(values))
    return total


def conditional_value_at_risk(
    logits, batch, weights, attributes=("gender", "race"), inner_alpha=0.9, alpha=0.5, outer="hinge"
):
    losses = [-torch.log_softmax(logits[i], 0)[int(batch.labels[i])] * weights[i] for i in range(len(logits))]
    return bi_level(losses, batch, attributes, inner_alpha, alpha, outer)


def bi_level(losses, batch, attributes=("gender", "race"), inner_alpha=0.9, alpha=0.5, outer="hinge"):
    """The worst part over groups of the worst part in each; over samples without attributes."""
    if attributes:
        found = groups(batch.attributes, attributes, VOCABULARY).values()
        values = [worst_part([losses[i] for i in members], inner_alpha) for members in found if members]
    else:
        values = losses
    if not values:
        return 0.0 * sum(losses)
    return worst_part(values, alpha) if outer == "hinge" else smoothed(values, alpha, outer == "guarded")


def margin_loss(logits, batch, counts, attributes=("gender", "race"), scale=30.0, max_margin=0.5):
    """counts: how often each group is drawn, by its values."""
    largest = max(count**-0.25 for count in counts.values() if count > 0)
    losses = []
    for place, (values, members) in enumerate(groups(batch.attributes, attributes, VOCABULARY).items()):
        for i in members:
            margin = max_margin * counts[values] ** -0.25 / largest
            terms = [scale * (z - margin if q == place else z) for q, z in enumerate(logits[i])]
            losses.append(torch.logsumexp(torch.stack(terms), 0) - terms[place])
    return sum(losses) / len(losses) if losses else 0.0 * logits.sum()
