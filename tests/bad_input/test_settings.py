"""Attributes, numbers and names that do not fit."""

import pytest

from dist_fair import cli
from tests.bad_input.making import data_set
from tests.command_line.runs import launch


def test_an_attribute_that_training_data_lack(good, refused):
    error = refused("+data.attributes.rase=[Asian]")
    assert f"no sample of {good}/train has attribute 'rase': did you mean 'race'?" in error


def test_an_attribute_that_an_evaluation_set_lacks(tmp_path, refused):
    data = data_set(tmp_path / "data", near={"without": "race"})
    assert f"no sample of {data}/near has attribute 'race'" in refused(data=data)


def test_a_value_without_training_samples(good, refused):
    error = refused("data.attributes.race=[Asian,Black,White,Indian]")
    assert f"data.attributes=['race']: no training sample of group Indian in {good}/train" in error
    assert "leave the value out of data.attributes" in error


def test_a_group_of_an_intervention_without_training_samples(tmp_path, refused):
    data = data_set(tmp_path / "data", train={"without_group": ("female", "Asian")})
    chosen = "+interventions.distribution_alignment={attributes: [gender, race]}"
    error = refused(chosen, data=data)
    assert "interventions.distribution_alignment.attributes=['gender', 'race']: no training sample of group " in error
    assert f"female/Asian in {tmp_path}/data/train" in error


def test_an_attribute_of_an_intervention_that_is_not_declared(refused):
    error = refused("+interventions.distribution_alignment={attributes: [rase]}")
    assert "data.attributes has no 'rase': did you mean 'race'? (+data.attributes.rase=[] adds it)" in error


def test_ranks_that_do_not_divide_the_lanes_are_told_once(good, tmp_path):
    files = [f"recipe={good}/quick.yaml", f"data={good}/card.yaml", f"out={tmp_path / 'out'}"]
    done = launch(2, "dist_fair.train", *files, "data.lanes=3", "train.batch_size=9")
    assert done.returncode != 0
    assert done.stderr.count("2 ranks do not divide data.lanes=3: start one of [1, 3] ranks") == 1
    assert "dist_fair/training.py" not in done.stderr  # torchrun shows a traceback of its own, we show none of ours
    assert not (tmp_path / "out").exists()


TAPES = ["+data.tapes.real.label=0", "+data.tapes.fake.label=1"]


@pytest.mark.parametrize(("settings", "said"), [
    (["train.accumulate=3"], "train.accumulate=3 (command line) does not divide train.batch_size=8 ("),
    (["data.lanes=3"], "data.lanes=3 (command line) does not divide train.batch_size / train.accumulate = 8"),
    (["train.batch_size=9", *TAPES], "use a multiple of 2"),
    (["data.lanes=8", *TAPES], "set data.lanes to one of [1, 2, 4]"),
    (["train.batch_size=32", "data.lanes=32"], "every lane needs one"),
    (["train.batch_size=0"], "train.batch_size=0 (command line): at least 1"),
    (["train.ranks=2"], "train.ranks=2, but there are 1 ranks: launch with `dist-fair train --ranks N"),
])  # fmt: skip
def test_numbers_that_do_not_fit(refused, settings, said):
    assert said in refused(*settings)


def test_ranks_within_ranks(refused, monkeypatch):
    assert "--ranks 0: at least 1" in refused("--ranks=0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--ranks 2: this is one of 2 launched ranks; leave it out" in refused("--ranks=2")


@pytest.mark.parametrize(("setting", "said"), [
    ("detector=smal", "detector=smal: no such detector card: did you mean 'small'?"),
    ("detector.name=resnet19", "did you mean 'resnet1"),
    ("train.step=5", "did you mean 'train.steps'?"),
    ("+interventions.channel_decouplin={}", "did you mean 'channel_decoupling'?"),
    ("interventions.cross_entropy.reductoin=mean", "did you mean 'interventions.cross_entropy.reduction'?"),
    ("optimizer.name=adamx", "optimizer.name=adamx: no such optimizer: did you mean 'adam"),
    ("optimizer.arguments={betta: 1}", "does not take these settings"),
    ("train.precision=fp16", "train.precision=fp16"),
    ("train.steps=many", "train.steps"),
    ("schedule.every=0.5", "schedule.every=0.5 (command line) has no effect with schedule.name=cosine"),
    ("~interventions.cross_entropy", "add cross_entropy"),
    ("data.eval=[nowhere]", "nowhere is no folder"),
    ("detector.init_from=nowhere", "nowhere is neither a checkpoint nor a run folder"),
    ("nonsense", "key=value"),
])  # fmt: skip
def test_unknown_names_and_wrong_values(refused, setting, said):
    assert said in refused(setting)


@pytest.mark.parametrize(("choices", "said"), [
    (["recipe=sfd_gdaa"], "recipe=sfd_gdaa: no such recipe: did you mean 'sfd_gda'?"),
    (["recipe=erm", "data=deno"], "data=deno: no such data card: did you mean 'demo'?"),
    (["recipe=nowhere/my.yaml"], "nowhere/my.yaml cannot be read"),
    ([], "recipe=NAME is missing"),
])  # fmt: skip
def test_unknown_files(tmp_path, capsys, choices, said):
    assert cli.main(["train", *choices, f"out={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
