"""Random numbers of rows: functions of the row's key, uniform, independent, and the same for ever."""

import math

import pytest
import torch

from dist_fair import keyed
from dist_fair.keyed_rows import dropout, mixed, uniform

KEYS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])  # neighbours, and the ends of int64
COUNT = 2**18


def drawn(count=COUNT, rows=4):
    return uniform(torch.arange(rows), count)


def test_pinned():
    """Written down once: a run of last year must be the run of this year, on any device."""
    assert (uniform(KEYS, 3) * 2**24).tolist() == PINNED
    assert mixed(KEYS, 7).tolist() == MIXED


def test_hash_is_splitmix64():
    """The finaliser in Python's integers, without wrapping, signs or tensors: two numbers of 24 bits from each hash."""

    def finalised(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for key in KEYS.tolist():
        state = finalised(key % 2**64)
        hashes = [finalised((state + number * 0x9E3779B97F4A7C15) % 2**64) for number in (1, 2)]
        expected = [part for bits in hashes for part in (bits >> 40, bits >> 16 & 0xFFFFFF)]
        assert (uniform(torch.tensor([key]), 4) * 2**24).tolist() == [expected]
        assert mixed(torch.tensor([key]), 1).item() % 2**64 == hashes[1]


def test_a_row_depends_on_its_key_alone():
    x, keys = torch.randn(6, 4, 5), torch.arange(100, 106)
    order = torch.randperm(6)
    for function in (lambda x, keys: uniform(keys, 4, 5), lambda x, keys: dropout(x, 0.5, keys)):
        whole = function(x, keys)
        assert torch.equal(function(x[order], keys[order]), whole[order])
        parts = [function(x[rows], keys[rows]) for rows in (slice(0, 1), slice(1, 1), slice(1, 6))]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(uniform(keys, 4, 5).flatten(1), uniform(keys, 20))
    assert torch.equal(uniform(keys, 20)[:, :7], uniform(keys, 7))
    assert uniform(keys).shape == (6,)
    assert uniform(keys, 0, 3).shape == (6, 0, 3)


def test_uniform():
    numbers = drawn()
    assert numbers.dtype == torch.float32
    assert 0 <= numbers.min() < numbers.max() < 1
    assert torch.equal(numbers * 2**24, (numbers * 2**24).round())
    for row in numbers.double():  # 5 standard deviations; each row, and every second number, which share hashes
        for part in (row, row[::2], row[1::2]):
            bound = 5 / math.sqrt(len(part))
            assert abs(part.mean() - 0.5) < bound * math.sqrt(1 / 12)
            assert abs(part.square().mean() - 1 / 3) < bound * math.sqrt(4 / 45)
            counts = torch.histc(part, 64, 0, 1)
            assert ((counts - len(part) / 64).square() / (len(part) / 64)).sum() < 63 + 5 * math.sqrt(126)


def correlation(first, second):
    return (torch.corrcoef(torch.stack([first, second]).double())[0, 1] * math.sqrt(len(first))).abs()


def test_rows_elements_and_salts_are_independent():
    numbers = drawn()
    pairs = [(numbers[0], numbers[1]), (numbers[2], numbers[3])]  # neighbouring keys
    pairs += [(numbers[0, :-lag], numbers[0, lag:]) for lag in (1, 2, 3, 64)]
    keys = torch.arange(COUNT)
    pairs += [(uniform(keys), uniform(keys + 1)), (uniform(keys), uniform(mixed(keys, 0)))]
    pairs += [(uniform(mixed(keys, salt)), uniform(mixed(keys, salt + 1))) for salt in (0, keyed.integer("dropout"))]
    pairs += [(uniform(mixed(mixed(keys, 1), 2)), uniform(mixed(mixed(keys, 2), 1)))]
    assert max(correlation(*pair) for pair in pairs) < 5
    assert len(uniform(keys, 2).unique(dim=0)) == COUNT


def test_salts_may_be_tensors_and_of_any_size():
    for salt in (0, 5, -1, -(2**63), 2**63 - 2, keyed.integer("dropout", "head")):
        assert torch.equal(mixed(KEYS, salt), mixed(KEYS, torch.full_like(KEYS, salt)))
    salts = torch.arange(5)
    assert mixed(KEYS, salts).tolist() == [mixed(KEYS[i : i + 1], i).item() for i in range(5)]
    assert mixed(torch.arange(1000)[:, None], torch.arange(1000)).unique().numel() == 10**6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout(dtype):
    keys, rate = torch.arange(4), 0.3
    x = torch.ones(4, 100, 300, dtype=dtype, requires_grad=True)
    y = dropout(x, rate, keys)
    assert y.dtype == dtype
    # Kept elements are scaled so that the mean stays; gradients go where values go.
    assert y.unique().tolist() == [0, (torch.ones((), dtype=dtype) / (1 - rate)).item()]
    kept = (y != 0).double().mean(dim=(1, 2))
    assert ((kept - 0.7).abs() < 5 * math.sqrt(0.3 * 0.7 / 30000)).all()
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    # At a higher rate, more of the same.
    assert (dropout(x, 0.5, keys)[y == 0] == 0).all()
    assert dropout(x, 0, keys) is x


PINNED = [
    [14819496, 3767069, 7239838],
    [12578688, 3202498, 6247724],
    [10844024, 2868522, 11830564],
    [9349088, 1417341, 11229934],
    [6883465, 11409918, 16170781],
]
MIXED = [
    -4214222208109204676,
    3430088234347965294,
    -4166297692289072321,
    4550485020936571926,
    -8962949061332145548,
]
