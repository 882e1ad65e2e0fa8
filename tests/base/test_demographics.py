"""Groups: products of attribute values, codes on arrays and tensors, unknowns."""

import numpy as np
import pytest
import torch

from dist_fair.demographics import Groups, attribute_sets
from dist_fair.errors import DistFairError

VOCABULARY = {"gender": ("female", "male"), "race": ("Asian", "Black", "White")}


def test_the_last_attribute_runs_fastest():
    groups = Groups.of(["gender", "race"], VOCABULARY)
    assert groups.names == ("female/Asian", "female/Black", "female/White", "male/Asian", "male/Black", "male/White")
    assert len(groups) == 6
    assert groups.label == "gender x race"


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_codes_name_the_group_and_unknown_is_minus_one(kind):
    columns = {"gender": kind([0, 1, 1, -1, 0]), "race": kind([0, 2, 0, 1, -1])}
    assert Groups.of(["gender", "race"], VOCABULARY).codes(columns).tolist() == [0, 5, 3, -1, -1]
    assert Groups.of(["race"], VOCABULARY).codes(columns).tolist() == [0, 2, 0, 1, -1]


def test_an_attribute_the_data_lacks_is_named_with_the_nearest():
    with pytest.raises(DistFairError, match="'gendr' is not in the data: did you mean 'gender'"):
        Groups.of(["gendr"], VOCABULARY)
    with pytest.raises(DistFairError, match="at least one attribute, each once"):
        Groups.of(["race", "race"], VOCABULARY)


def test_fairness_is_reported_over_singles_and_the_intersection():
    assert attribute_sets(["gender", "race"]) == [("gender",), ("race",), ("gender", "race")]
    assert attribute_sets(["gender"]) == [("gender",)]
