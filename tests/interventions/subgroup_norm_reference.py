"""Subgroup norm once more, naively: loops over samples, written from the paper and the documented rules, fp64.

A population is a list of (weight, row); its moments are plain weighted sums. Topping up and forgetting are weights.
"""

import torch

from dist_fair.interventions.subgroup_norm import SubgroupNorm
from tests.interventions import reference
from tests.interventions.cases import VOCABULARY
from tests.interventions.subgroup_norm_worlds import BUFFERS, STEPS, WIDTH, index, matrices, step_batch


def moments(population):
    """Mean and biased variance, each (d,), of [(weight, row), ...]."""
    total = sum(weight for weight, _ in population)
    mean = sum(weight * row for weight, row in population) / total
    return mean, sum(weight * (row - mean) ** 2 for weight, row in population) / total


def members_of(attributes, settings):
    return list(reference.groups(attributes, settings.attributes, VOCABULARY).values())


def normalise(row, population, settings):
    mean, variance = moments(population)
    return (row - mean) / (variance + settings.epsilon).sqrt()


def naive_transform(h, attributes, settings):
    """Each row by its own group, with a share of everybody where the group is small; the unknown by everybody."""
    everybody = list(range(len(h)))
    group_of = {i: members for members in members_of(attributes, settings) for i in members}
    rows = []
    for i in everybody:
        members = group_of.get(i, everybody)
        missing = max(0, settings.minimum - len(members)) if i in group_of else 0
        population = [(1.0, h[j]) for j in members] + [(missing / len(h), h[j]) for j in everybody]
        if settings.detach:
            population = [(weight, row.detach()) for weight, row in population]
        rows.append(normalise(h[i], population, settings))
    return torch.stack(rows)


def naive_track(populations, h, attributes, settings):
    for population, members in zip(populations, members_of(attributes, settings), strict=True):
        if members:
            population[:] = [(weight * (1 - settings.momentum), row) for weight, row in population]
            population += [(1.0, h[i].detach()) for i in members]


def naive_evaluation(populations, h, attributes, settings):
    if settings.inference == "none":
        return h
    codes, frequencies = index()
    drawn = [sum(frequencies[i] for i in members) for members in members_of(codes, settings)]
    mixture = [
        (share * weight / sum(w for w, _ in population), row)
        for share, population in zip(drawn, populations, strict=True)
        for weight, row in population
    ]
    group_of = {i: p for p, members in zip(populations, members_of(attributes, settings), strict=True) for i in members}
    own = settings.inference == "group"
    return torch.stack([normalise(h[i], (own and group_of.get(i)) or mixture, settings) for i in range(len(h))])


def naive_train(settings):
    """The dictionary of `train`, for the whole batch."""
    settings, (before, after) = SubgroupNorm.Settings(**settings), matrices()
    populations = [[] for _ in members_of(index()[0], settings)]
    found = {}
    for step in range(len(STEPS)):
        whole, features, weights = step_batch(step)
        h = features @ before
        h.retain_grad()
        normalised = naive_transform(h, whole.attributes, settings)
        loss = reference.cross_entropy(normalised @ after, whole.labels, weights, "mean")
        before.grad = after.grad = None
        loss.backward()
        naive_track(populations, h, whole.attributes, settings)
        found |= {f"loss {step}": loss.detach(), f"outputs {step}": normalised.detach(), f"inputs {step}": h.grad}
        found |= {f"before {step}": before.grad, f"after {step}": after.grad}
        found |= dict(zip((f"{name} {step}" for name in BUFFERS), buffers(populations), strict=True))
    found["outputs in evaluation"] = naive_evaluation(populations, h, whole.attributes, settings).detach()
    return found


def buffers(populations):
    nothing = torch.zeros(WIDTH, dtype=torch.float64), torch.ones(WIDTH, dtype=torch.float64)
    counts = torch.tensor([[sum(weight for weight, _ in p)] for p in populations], dtype=torch.float64)
    each = [moments(population) if population else nothing for population in populations]
    return [counts, *(torch.stack(tensors) for tensors in zip(*each, strict=True))]
