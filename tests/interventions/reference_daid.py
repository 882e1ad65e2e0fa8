"""DAID's alignment and projection once more, naively: loops over pairs, from eq. 8 to 11 of the paper, fp64.

Nothing here uses a group code, a closed form or a chunk of the package. Gradients are autograd's.
"""


def direction(h):
    """h over its length; 0 for a vector that has none."""
    return h / (h * h).sum().sqrt() if (h != 0).any() else 0.0 * h


def cosine(a, b):
    return (direction(a) * direction(b)).sum()


def partners(i, batch, attributes, match, opposite):
    """All j with (i, j) in P."""

    def value(row, name):
        return int(batch.attributes[name][row])

    def kind(row):
        """What must be equal in a pair."""
        fake = int(batch.labels[row]) == 1
        return ("real", "fake")[fake] if match == "label" or not fake else f"fake {int(batch.manipulations[row])}"

    found = []
    for j in range(len(batch.labels)):
        known = all(value(row, name) >= 0 for row in (i, j) for name in attributes)
        if j == i or not known or kind(i) != kind(j) or kind(i) == "fake -1":
            continue
        differ = [name for name in attributes if value(i, name) != value(j, name)]
        if differ if opposite is None else differ == [opposite]:
            found.append(j)
    return found


def pair_alignment(
    features, batch, attributes=("gender", "race"), match="label", pairs="all", hardest=None, balanced=False,
    epsilon=1e-6,
):  # fmt: skip
    """L_attr of eq. 8: the mean over P of eq. 9."""
    opposite = pairs.removeprefix("opposite:") if pairs.startswith("opposite:") else None
    losses, kinds, units = [], [], [direction(h) for h in features]
    for i in range(len(features)):
        own = [(j, (units[i] * units[j]).sum()) for j in partners(i, batch, attributes, match, opposite)]
        if pairs == "hardest":
            own = sorted(own, key=lambda pair: (round(pair[1].item(), 9), pair[0]))[:hardest]
        for j, similarity in own:
            losses.append(1 - similarity + epsilon)
            sides = sorted(tuple(int(batch.attributes[name][row]) for name in attributes) for row in (i, j))
            manipulation = int(batch.manipulations[i]) if match == "manipulation" else None
            kinds.append((int(batch.labels[i]), manipulation if batch.labels[i] else None, *sides))
    if not losses:
        return 0.0 * features.sum()
    if not balanced:
        return sum(losses) / len(losses)
    means = []
    for one in sorted(set(kinds), key=str):
        members = [loss for loss, kind in zip(losses, kinds, strict=True) if kind == one]
        means.append(sum(members) / len(members))
    return sum(means) / len(means)


def orthogonality(basis, printed=False):
    """||U^T U - I||_F^2 entry by entry; printed: ||U U^T - I||_F^2."""
    lines = list(basis) if printed else list(basis.T)
    total = 0.0
    for a, one in enumerate(lines):
        for b, other in enumerate(lines):
            total = total + ((one * other).sum() - float(a == b)) ** 2
    return total


def project(features, basis, normalise=False):
    """h~_i = U^T h^_i, sample by sample."""
    rows = []
    for h in features:
        scaled = direction(h) if normalise else h
        rows.append([(scaled * column).sum() for column in basis.T])
    return rows
