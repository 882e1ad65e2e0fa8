"""Keyed randomness: a draw depends on its key, on all of it and on nothing else."""

import numpy as np

from dist_fair import keyed


def test_the_same_key_draws_the_same_numbers_in_any_order_of_calls():
    first = keyed.generator(3, "augment", 1, 17).random(5)
    keyed.generator(3, "augment", 1, 18).random(100)
    assert np.array_equal(first, keyed.generator(3, "augment", 1, 17).random(5))


def test_every_part_its_position_and_its_type_matter():
    keys = [(1, 2), (2, 1), (12,), ("1", 2), (1, "2"), ("a", "b"), ("ab",), ("a\x1f", "b"), ("a", "\x1fb")]
    assert len({keyed.digest(*key) for key in keys}) == len(keys)


def test_numpy_integers_are_integers():
    assert keyed.digest(np.int64(7), "x") == keyed.digest(7, "x")


def test_permutation_holds_every_number_once_and_is_pinned():
    assert sorted(keyed.permutation(1000, 0, "window")) == list(range(1000))
    # Written down once: a plan of last year must be the plan of this year.
    assert keyed.permutation(8, 0, "window", 1).tolist() == PINNED


def test_integer_fits_torch_seeds():
    assert all(0 <= keyed.integer(seed, "step") < 2**63 for seed in range(100))


PINNED = [5, 7, 4, 0, 1, 6, 2, 3]
