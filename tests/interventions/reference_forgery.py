"""PG-FDD's forgery, contrastive and reconstruction losses once more, naively: loops over samples, fp64.

Written from the paper and the description of its code. Nothing here uses a sort on codes or a mask of the package.
Random numbers, and how keys are mixed, are given. Gradients are autograd's.
"""

import torch


def halves(batch, rows=None):
    """Row numbers of the reals, and of the fakes, in order."""
    rows = list(range(len(batch))) if rows is None else rows
    return [[i for i in rows if int(batch.labels[i]) == label] for label in (0, 1)]


def kind(batch, i):
    """What a sample is called: "real", the number of its manipulation, None for an unknown one."""
    if int(batch.labels[i]) == 0:
        return "real"
    return int(batch.manipulations[i]) if int(batch.manipulations[i]) >= 0 else None


def mean(losses, whole):
    return sum(losses) / len(losses) if losses else 0.0 * whole.sum()


def shared_forgery(logits, batch):
    losses = [-torch.log_softmax(logits[i], 0)[int(batch.labels[i])] for i in range(len(batch))]
    return mean(losses, logits)


def specific_forgery(logits, batch):
    losses = []
    for i in range(len(batch)):
        if kind(batch, i) is not None:
            place = 0 if kind(batch, i) == "real" else 1 + kind(batch, i)
            losses.append(torch.logsumexp(logits[i], 0) - logits[i][place])
    return mean(losses, logits)


def contrastive(space, features, draws, batch, parts, margin, self_pairs=False):
    """The two terms of one space; triplets in each part (slice) of the batch, means over the anchors of all."""
    total = 0.0 * features.sum()
    for label in (0, 1):
        losses = []
        for part in parts:
            losses += of_half(space, features, draws, batch, list(range(len(batch)))[part], label, margin, self_pairs)
        total = total + mean(losses, features)
    return total


def of_half(space, features, draws, batch, rows, label, margin, self_pairs):
    own, others = halves(batch, rows)[label], halves(batch, rows)[1 - label]
    own_row, others_row = by_draw(own, draws, 0), by_draw(others, draws, 1)
    losses = []
    for anchor in own:
        if space == "specific" and kind(batch, anchor) is None:
            continue
        members = [i for i in own if space == "shared" or kind(batch, i) == kind(batch, anchor)]
        positive = positive_of(anchor, members, draws, self_pairs)
        if positive is None or not others:
            continue
        negative = others_row[own_row.index(anchor) % len(others)]
        excess = distance(features[anchor], features[positive]) - distance(features[anchor], features[negative])
        losses.append(torch.clamp(excess + margin, min=0))
    return losses


def by_draw(rows, draws, column):
    return sorted(rows, key=lambda i: (float(draws[i, column]), i))


def positive_of(anchor, members, draws, self_pairs):
    """The next one in the circle; with self pairs the one that a second order has in its place."""
    circle = by_draw(members, draws, 0)
    place = circle.index(anchor)
    if self_pairs:
        return by_draw(members, draws, 1)[place]
    return circle[(place + 1) % len(circle)] if len(circle) > 1 else None


def distance(x, y):
    return ((x - y + 1e-6) ** 2).sum().sqrt()


def reconstruction(outputs, batch, mixed):
    """L_rec, then its parts: self and cross of the reals, self and cross of the fakes. One image at a time."""
    code, condition = outputs.extras["code"], outputs.extras["condition"]
    reals, fakes = halves(batch)
    partner = {**dict(zip(reals, fakes, strict=True)), **dict(zip(fakes, reals, strict=True))}
    parts = []
    for rows in (reals, fakes):
        for giver in (lambda i: i, partner.__getitem__):
            errors = []
            for i in rows:
                keys = mixed(batch.keys[i : i + 1], batch.keys[giver(i) : giver(i) + 1])
                image = outputs.decode(code[giver(i)][None], condition[i][None], keys)[0]
                errors.append((image - batch.images[i]).abs().sum() / batch.images[i].numel())
            parts.append(mean(errors, code))
    return [sum(parts), *parts]
