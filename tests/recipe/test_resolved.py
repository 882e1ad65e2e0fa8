"""What a run keeps: readable, read back as it was, never executed; and what makes two runs the same experiment."""

import json

import pytest
import yaml

from dist_fair import recipes
from dist_fair.errors import DistFairError
from dist_fair.recipe.composition import load, read
from dist_fair.recipe.resolved import differences, flatten
from tests.recipe.conftest import INTERVENTIONS

SFD_GDA = "recipe=sfd_gda"


@pytest.fixture(scope="module")
def plain():
    """sfd_gda as shipped."""
    return load([SFD_GDA], INTERVENTIONS)


@pytest.mark.parametrize(
    "arguments",
    [
        [SFD_GDA],
        [SFD_GDA, "optimizer.lr=1e-7", "wandb.tags=['a: b','# c','null','1',\"it's\"]", "out='runs/é # x'"],
        [SFD_GDA, "+data.tapes.fake={label: 1}", "+data.attributes.age=[]", "+optimizer.arguments={a: {b: [1, 2.5]}}"],
        ["recipe=sfd_gda_xception", "interventions.distribution_alignment.bandwidth=silverman"],
    ],
)
def test_round_trip(resolve, tmp_path, arguments):
    resolved = resolve(*arguments)
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved.yaml())
    again = read(path, INTERVENTIONS)
    assert again.recipe == resolved.recipe
    assert again.values == resolved.values == yaml.safe_load(resolved.yaml())
    assert again.fingerprint() == resolved.fingerprint()
    assert {*again.provenance.values()} == {str(path)}


def test_every_value_says_where_it_comes_from(resolve):
    resolved = resolve(SFD_GDA, "seed=4")
    assert resolved.provenance.keys() == flatten(resolved.values).keys()
    lines = [line for line in resolved.yaml().splitlines()[1:] if not line.endswith(":")]
    assert len(lines) == len(resolved.provenance)
    assert all("  # " in line for line in lines)
    assert "seed: 4  # command line" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!python/object/apply:os.system ['echo hello']", "is not plain YAML"),
        ("seed: !!python/name:os.system", "is not plain YAML"),
        ("out: ${oc.env:HOME}", "stored recipes are resolved"),
        ("wandb: {tags: [a, '${oc.env:HOME}']}", "stored recipes are resolved"),
        ("detector: {arguments: {_target_: os.system}}", "name no code"),
        ("trian: {steps: 3}", "unknown key trian"),
        ("seed: x", "expected int"),
    ],
)
def test_hostile_or_broken_stored_recipe(plain, tmp_path, text, message):
    values = {key: value for key, value in plain.values.items() if not text.startswith(f"{key}:")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values) + text)
    with pytest.raises(DistFairError, match=str(path)) as error:
        read(path, INTERVENTIONS)
    assert message in str(error.value)


def test_no_stored_recipe(tmp_path):
    with pytest.raises(DistFairError, match="cannot be read"):
        read(tmp_path / "recipe.yaml", INTERVENTIONS)


@pytest.mark.parametrize(
    "argument",
    ["out=x", "resume=never", "data.root=/elsewhere", "data.eval=[x]", "data.workers=4", "train.stop_after=3",
     "data.stage_to=$TMPDIR/faces",
     "train.ranks=2", "wandb.mode=disabled", "checkpoint.every=7", "checkpoint.keep=9", "evaluation.at_end=false",
     "evaluation.bootstrap=0", "evaluation.batch_size=5", "log.every=1", "train.steps=300"],
)  # fmt: skip
def test_same_experiment(resolve, plain, argument):
    assert resolve(SFD_GDA, argument).fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    "argument",
    ["seed=1", "train.steps=301", "train.batch_size=128", "train.accumulate=2", "train.precision=bf16", "train.clip=1",
     "data.lanes=4", "data.window=7", "data.image_size=96", "data.train=[other]", "data.name=other",
     "data.bad_samples=substitute", "data.augment.flip=0", "data.attributes.race=[Black,White,Asian]",
     "+data.tapes.all={}", "detector.name=resnet34", "detector.norm=local", "detector.init_from=x", "optimizer.lr=1",
     "+optimizer.arguments.nesterov=true", "schedule.floor=0.1", "interventions.cross_entropy.weight=2",
     "interventions.channel_decoupling.at=[0.1]", "~interventions.channel_decoupling"],
)  # fmt: skip
def test_another_experiment(resolve, plain, argument):
    after = resolve(SFD_GDA, argument)
    assert plain.fingerprint() != after.fingerprint()
    changed = differences(plain.trajectory(), after.trajectory())
    assert any(line.startswith(argument.lstrip("+~").partition("=")[0].partition(".")[0]) for line in changed)


def test_inference_is_no_part_of_training():
    one, other = (load(["recipe=daid", f"interventions.subgroup_norm.inference={name}"], recipes.interventions())
                  for name in ("none", "group"))  # fmt: skip
    assert differences(one.trajectory(), other.trajectory()) == []
    assert one.fingerprint() != other.fingerprint()  # the scores are others


def test_order_counts(resolve):
    turned = resolve(
        SFD_GDA, "~interventions.cross_entropy", "+interventions.cross_entropy={reduction: class_balanced}"
    )
    assert turned.fingerprint() != resolve(SFD_GDA).fingerprint()
    assert turned.values["interventions"] == resolve(SFD_GDA).values["interventions"]
    assert [line.partition(":")[0] for line in differences(resolve(SFD_GDA).trajectory(), turned.trajectory())] == [
        "interventions"
    ]


def test_spelling_does_not_count(resolve):
    first = resolve(SFD_GDA, "+optimizer.arguments.a=1", "+optimizer.arguments.b=2")
    assert first.fingerprint() == resolve(SFD_GDA, "+optimizer.arguments={b: 2, a: 1}").fingerprint()


def test_differences_name_the_keys(resolve):
    stored = json.loads(json.dumps(resolve(SFD_GDA).trajectory()))
    assert differences(stored, resolve(SFD_GDA).trajectory()) == []
    asked = resolve(SFD_GDA, "seed=1", "optimizer.lr=0.5", "~interventions.channel_decoupling").trajectory()
    found = differences(stored, asked)
    assert "seed: 0, 1" in found
    assert "optimizer.lr: 0.001, 0.5" in found
    assert "interventions.channel_decoupling.part: 0.02, absent" in found
