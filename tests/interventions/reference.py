"""The interventions once more, naively: explicit loops over samples, written from the papers, fp64, one process.

Nothing here uses a kernel, a group code or a solver of the package. Gradients are autograd's, through every iteration.
"""

import itertools
import math

import torch

KINDS = {0: "real", 1: "fake"}


def groups(attributes, names, vocabulary):
    """Members of each group by row number; rows with an unknown value are in none."""
    found = {}
    for values in itertools.product(*(range(len(vocabulary[name])) for name in names)):
        rows = range(len(attributes[names[0]]))
        found[values] = [i for i in rows if all(int(attributes[n][i]) == v for n, v in zip(names, values, strict=True))]
    return found


def cross_entropy(logits, labels, weights, reduction):
    """DAID's E[w l], or SFD's L_cls: the mean over reals plus the one over fakes."""
    parts = [range(len(labels))] if reduction == "mean" else [rows_of(labels, c) for c in KINDS]
    total = 0.0 * logits.sum()
    for rows in parts:
        if len(rows):
            losses = [-torch.log_softmax(logits[i], 0)[int(labels[i])] * weights[i] for i in rows]
            total = total + sum(losses) / len(rows)
    return total


def rows_of(labels, c):
    return [i for i in range(len(labels)) if int(labels[i]) == c]


def density(predictions, bins, bandwidth):
    """Kernel density of a list of predictions at the midpoints of the bins, reflected, summing to one."""
    h = silverman(predictions, bins) if bandwidth == "silverman" else bandwidth
    t = torch.tensor([(b + 0.5) / bins for b in range(bins)], dtype=torch.float64)
    q = torch.zeros(bins, dtype=torch.float64)
    for p in predictions:
        for image in (p, -p, 2 - p):
            q = q + torch.exp(-((t - image) ** 2) / (2 * h * h))
    q = q / q.sum() + 1e-12
    return q / q.sum()


def silverman(predictions, bins):
    values = sorted(p.item() for p in predictions)
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / n)

    def quantile(u):
        place = u * (n - 1)
        low = math.floor(place)
        return values[low] + (place - low) * (values[min(low + 1, n - 1)] - values[low])

    h = 0.9 * min(deviation, (quantile(0.75) - quantile(0.25)) / 1.34) * n**-0.2
    return min(max(h, 1 / bins), 0.2)


def transport(x, q, y, r, epsilon, error=1e-13):
    """min <P, C> + epsilon I(X; Y), by Sinkhorn in the log domain, every iteration differentiated."""
    cost = (x[:, None] - y[None, :]) ** 2
    f, g = torch.zeros_like(q), torch.zeros_like(r)
    for iteration in range(10_000):
        f = -epsilon * torch.logsumexp((g[None, :] - cost) / epsilon + r.log()[None, :], 1)
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon + q.log()[:, None], 0)
        if iteration % 20 == 19:
            plan = torch.exp((f[:, None] + g[None, :] - cost) / epsilon) * q[:, None] * r[None, :]
            if (plan.sum(1) - q).abs().sum().item() < error:
                break
    information = (plan * (plan / (q[:, None] * r[None, :])).log()).sum()
    return (plan * cost).sum() + epsilon * information


def distribution_alignment(
    logits, labels, attributes, names, vocabulary, *,
    epsilon, grid=None, bandwidth=None, support="grid", debias=False, average="present",
):  # fmt: skip
    """L_fair: every (group, class) that has samples against all samples of its class."""
    p = [torch.sigmoid(z[1] - z[0]) for z in logits]
    members = groups(attributes, names, vocabulary)
    midpoints = None if grid is None else torch.tensor([(b + 0.5) / grid for b in range(grid)], dtype=torch.float64)

    def distribution(rows):
        if support == "samples":
            return torch.stack([p[i] for i in rows]), torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        return midpoints, density([p[i] for i in rows], grid, bandwidth)

    terms = []
    for rows in members.values():
        for c in KINDS:
            own = [i for i in rows if int(labels[i]) == c]
            if not own:
                continue
            one, all_ = distribution(own), distribution(rows_of(labels, c))
            value = transport(*one, *all_, epsilon)
            if debias:
                value = value - transport(*one, *one, epsilon) / 2 - transport(*all_, *all_, epsilon) / 2
            terms.append(value)
    if not terms:
        return 0.0 * logits.sum()
    return sum(terms) / (len(terms) if average == "present" else len(members))


def soft_nearest_neighbour_loss(maps, codes, temperature, distance):
    """l_k of maps (b, C, HW), one number per channel, infinity for channels that are zero."""
    rows = [i for i in range(len(codes)) if codes[i] >= 0]
    losses = []
    for k in range(maps.shape[1]):
        m = {i: maps[i, k].double().numpy() for i in rows}
        if all(abs(v).sum() == 0 for v in m.values()):
            losses.append(math.inf)
            continue
        apart = {(i, j): pair_distance(m[i], m[j], distance) for i in rows for j in rows if i != j}
        mean = sum(apart.values()) / len(apart) if distance == "raw" else 1.0
        found = []
        for i in rows:
            e = {j: math.exp(-apart[i, j] / mean / temperature) for j in rows if j != i}
            same = sum(value for j, value in e.items() if codes[j] == codes[i])
            if any(codes[j] == codes[i] for j in e):
                found.append(-math.log(same / sum(e.values())))
        losses.append(sum(found) / len(found))
    return losses


def pair_distance(a, b, distance):
    if distance == "raw":
        return float(((a - b) ** 2).sum())
    a, b = (v / max(math.sqrt((v * v).sum()), 1e-300) for v in (a, b))
    return float(((a - b) ** 2).sum()) if distance == "normalised" else 1 - float((a * b).sum())
