"""Lists of values become settings and runs whose names are unique, stable and readable."""

import re
from pathlib import Path

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from dist_fair.errors import DistFairError
from dist_fair.recipe.composition import load
from dist_fair.recipes import interventions
from dist_fair.studies.expansion import LONGEST, expand, shortest

OUT = Path("out")
ALIGNED, PROJECTED = "interventions.pair_alignment.weight", "interventions.low_rank_projection.weight"


def names(*arguments: str, rows: dict | None = None, overrides: tuple = ()) -> list[str]:
    settings, seeds = expand(overrides, rows or {"": []}, arguments)
    return [setting.run(OUT, seed).folder.name for setting in settings for seed in seeds]


def test_every_combination_with_every_seed():
    settings, seeds = expand(
        [], {"": []}, ["recipe=daid", f"{ALIGNED}=0.3,0.7", "seed=0,1", "~interventions.x", "+a=1"]
    )
    assert seeds == ["0", "1"]
    assert [setting.name for setting in settings] == ["weight=0.3", "weight=0.7"]
    assert settings[0].run(OUT, "1").arguments == (
        "recipe=daid", f"{ALIGNED}=0.3", "~interventions.x", "+a=1", "seed=1",
    )  # fmt: skip
    assert settings[0].run(OUT, "1").folder == OUT / "weight=0.3,seed=1"
    assert settings[0].varied == {ALIGNED: "0.3"}


@pytest.mark.parametrize(("arguments", "expected"), [
    (["recipe=erm", "seed=range(0,3)"], ["seed=0", "seed=1", "seed=2"]),
    (["recipe=erm,gda"], ["recipe=erm", "recipe=gda"]),
    (["recipe=erm"], ["run"]),
    (["recipe=erm", "seed=3"], ["seed=3"]),
    (["train.steps=range(9,0,-4)"], ["steps=9", "steps=5", "steps=1"]),
    (["optimizer.lr=choice(1e-3,0.01)"], ["lr=0.001", "lr=0.01"]),
    (["train.clip=null,1.0"], ["clip=null", "clip=1.0"]),
    (["+a.b=x,y", "a.c=1,2"], ["b=x,c=1", "b=x,c=2", "b=y,c=1", "b=y,c=2"]),
    ([f"{ALIGNED}=0.1,0.2", f"{PROJECTED}=0.3"], ["weight=0.1", "weight=0.2"]),
    ([f"{ALIGNED}=0.1,0.2", f"{PROJECTED}=3,4"],
     [f"pair_alignment.weight={one},low_rank_projection.weight={two}" for one in (0.1, 0.2) for two in (3, 4)]),
    (["seed=0,1", "seed=2,3"], ["seed=2", "seed=3"]),
])  # fmt: skip
def test_names(arguments, expected):
    assert names(*arguments) == expected


def test_a_value_that_is_no_file_name_or_too_long_gets_a_hash():
    lists = names("data.eval=[a/b],[a_b],'a,b'", "seed=0")
    assert [re.sub("[0-9a-f]{8}$", "#", name) for name in lists] == ["eval=a_b,seed=0-#"] * 3
    assert len({*lists}) == 3
    (long, other) = names(f"x={'a' * 300},{'a' * 299}b")
    assert long != other
    assert len(long) == LONGEST + 9


KEYS = st.lists(st.sampled_from(["optimizer.lr", ALIGNED, PROJECTED, "train.clip", "+data.where.x"]), min_size=1,
                max_size=3, unique=True)  # fmt: skip
TEXT = st.text(st.sampled_from("ab,=/ .'[]{}-_#+é"), max_size=8).map(lambda text: "'" + text.replace("'", r"\'") + "'")
VALUE = st.one_of(st.integers(-5, 5).map(str), st.floats(-1, 1).map(repr), TEXT, st.sampled_from(["[a,b]", "[a]", "a"]))


@given(st.data(), KEYS)
def test_names_are_unique_and_do_not_depend_on_the_other_values(data, keys):
    lists = {key: data.draw(st.lists(VALUE, min_size=2, max_size=4, unique=True)) for key in keys}
    try:
        all_names = names(*(f"{key}={','.join(values)}" for key, values in lists.items()), "seed=0,1")
    except DistFairError:  # 1 written in two ways, or a text that the grammar does not have
        reject()
    assert len({*all_names}) == len(all_names)
    assert not any("/" in name or name.startswith(".") or len(name) > LONGEST + 9 for name in all_names)
    fewer = {key: values[:2] for key, values in lists.items()}
    assert {*names(*(f"{key}={','.join(values)}" for key, values in fewer.items()), "seed=1")} <= {*all_names}


def test_the_arguments_are_a_command_line_of_train():
    """Hydra's grammar gives each value back."""
    settings, _ = expand([], {"": []}, ["recipe=erm", r"wandb.name='a,b','it\'s'", "data.eval=[x],[y,z]"])
    values = [load(setting.arguments, interventions()).recipe for setting in settings]
    assert [(one.wandb.name, one.data.eval) for one in values] == [
        (name, sets) for name in ("a,b", "it's") for sets in (["x"], ["y", "z"])
    ]


def test_shortest():
    assert shortest(["a.b.c", "a.x.c", "c", "d.e"]) == {"a.b.c": "b.c", "a.x.c": "x.c", "c": "c", "d.e": "e"}


def test_named_settings_of_a_file_and_the_command_line():
    rows = {"plain": [], "L_attr, many": [f"{ALIGNED}=0.1,0.2"]}
    overrides = ("recipe=daid", "seed=0,1", "train.steps=9")
    assert names("seed=5", rows=rows, overrides=overrides) == [
        "plain,seed=5", "L_attr_many,weight=0.1,seed=5", "L_attr_many,weight=0.2,seed=5",
    ]  # fmt: skip
    settings, _ = expand(overrides, rows, ["recipe=daid_xception"])
    assert [setting.name for setting in settings] == ["plain", "L_attr, many, weight=0.1", "L_attr, many, weight=0.2"]
    assert settings[1].arguments == ("train.steps=9", f"{ALIGNED}=0.1", "recipe=daid_xception")


@pytest.mark.parametrize(("arguments", "message"), [
    (["optimizer.lr=interval(0,1)"], "a sweep goes over values that are listed"),
    (["recipe=glob(*)"], "a sweep goes over values that are listed"),
    (["~a=1,2"], "a sweep goes over values that are listed"),
    (["optimizer.lr=1,1.0,1"], "optimizer.lr=1,1.0,1: 1 is listed twice"),
    (["optimizer.lr=range(0.1,0.4,0.1)"], "fractions gather rounding errors: list them"),
    (["a=range(3,3)"], "a=range(3,3): lists no value"),
    (["seed"], "seed: key=value, +key=value or ~key is expected"),
    (["a=[1,2"], "a=[1,2: key=value, +key=value or ~key is expected"),
])  # fmt: skip
def test_no_sweeps(arguments, message):
    with pytest.raises(DistFairError) as error:
        names(*arguments)
    assert message in str(error.value)


def test_what_a_setting_sets_is_not_given_for_all():
    with pytest.raises(DistFairError, match=r"weight=1,2 of the sweep's setting 'a': .*weight is the same for all"):
        names(f"{ALIGNED}=3", rows={"a": [f"{ALIGNED}=1,2"]})
