"""Hydra's grammar over the typed schema; where values come from; a user's own files."""

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dist_fair.recipe.composition import load


@pytest.fixture
def own(tmp_path):
    """own(name, text) -> path of a file."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("train.steps=40", "train.steps", 40),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("out='runs/a, b=c'", "out", "runs/a, b=c"),
        ("out=123", "out", "123"),
        ("data.train=[a,b/c]", "data.train", ["a", "b/c"]),
        ("wandb.tags=['x y',z]", "wandb.tags", ["x y", "z"]),
        ("data.lanes=null", "data.lanes", None),
        ("+data.tapes.fake={label: 1, share: 3}", "data.tapes.fake", {"label": 1, "share": 3, "where": {}}),
        ("+data.attributes.age=[]", "data.attributes.age", []),
        ("+optimizer.arguments.nesterov=true", "optimizer.arguments.nesterov", True),
        ("optimizer={lr: 0.5, momentum: null}", "optimizer.lr", 0.5),
        ("interventions.distribution_alignment.bandwidth=silverman",
         "interventions.distribution_alignment.bandwidth", "silverman"),
        ("interventions.distribution_alignment.attributes=[gender]",
         "interventions.distribution_alignment.attributes", ["gender"]),
        ("++train.clip=2", "train.clip", 2.0),
        ("detector.pretrained=a/file.safetensors", "detector.pretrained", "a/file.safetensors"),
    ],
)  # fmt: skip
def test_set(resolve, argument, key, value):
    resolved = resolve("recipe=sfd_gda", argument)
    found = resolved.values
    for name in key.split("."):
        found = found[name]
    assert found == value


def test_remove(resolve):
    recipe = resolve("recipe=sfd_gda", "~interventions.channel_decoupling", "~data.attributes.race").recipe
    assert [*recipe.interventions] == ["cross_entropy", "distribution_alignment"]
    assert [*recipe.data.attributes] == ["gender"]


def test_null_removes_too(resolve):
    recipe = resolve("recipe=sfd_gda", "interventions.channel_decoupling=null").recipe
    assert [*recipe.interventions] == ["cross_entropy", "distribution_alignment"]


def test_add_takes_the_defaults_of_the_rest(resolve):
    resolved = resolve("recipe=erm", "+interventions.channel_decoupling.part=0.2", "seed=3")
    settings = resolved.recipe.interventions["channel_decoupling"]
    assert (settings.part, settings.at) == (0.2, [0.5])
    assert resolved.provenance["interventions.channel_decoupling.part"] == "command line"
    assert resolved.provenance["interventions.channel_decoupling.at"] == "default"


def test_remove_then_add_and_change_in_order(resolve):
    recipe = resolve("recipe=sfd_gda", "~interventions.cross_entropy", "+interventions.cross_entropy={}",
                     "interventions.cross_entropy.weight=2", "interventions.cross_entropy.weight=3").recipe  # fmt: skip
    assert [*recipe.interventions][-1] == "cross_entropy"
    assert (recipe.interventions["cross_entropy"].weight, recipe.interventions["cross_entropy"].reduction) == (
        3,
        "mean",
    )


def test_settings_are_typed_objects(resolve):
    recipe = resolve("recipe=sfd_gda", "+data.tapes.real.label=0", "train.epochs=2").recipe
    assert type(recipe.interventions["cross_entropy"]).__name__ == "CrossEntropy"
    assert (recipe.data.tapes["real"].label, recipe.data.tapes["real"].share) == (0, 1)
    assert isinstance(recipe.train.epochs, float)


def test_provenance(resolve):
    provenance = resolve("recipe=gda", "detector=resnet50", "train.batch_size=8").provenance
    assert provenance["seed"] == "default"
    assert provenance["data.eval"] == "shards/demo.yaml"
    assert provenance["detector.name"] == "recipes/detector/resnet50.yaml"
    assert provenance["optimizer.lr"] == "recipes/erm.yaml"
    assert provenance["train.batch_size"] == "command line"
    assert provenance["interventions.distribution_alignment.bandwidth"] == "default"


def test_later_files_win_and_say_so(resolve):
    resolved = resolve("recipe=sfd_gda_xception")
    assert resolved.recipe.optimizer.lr == 1e-3
    assert resolved.provenance["optimizer.lr"] == "recipes/sfd_gda_xception.yaml"
    assert resolved.provenance["interventions.distribution_alignment.epsilon"] == "recipes/sfd_gda.yaml"
    assert resolved.provenance["data.train"] == "shards/ffpp.yaml"


def test_the_command_line_chooses_over_the_recipe(resolve):
    recipe = resolve("recipe=sfd_gda_xception", "data=demo", "detector=small").recipe
    assert (recipe.data.name, recipe.detector.name) == ("demo", "resnet18")


@pytest.mark.parametrize(("given", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_length_on_the_command_line_replaces_that_of_the_recipe(resolve, given, other):
    resolved = resolve("recipe=sfd_gda" if given == "epochs" else "recipe=sfd_gda_xception", f"train.{given}=3")
    assert getattr(resolved.recipe.train, given) == 3
    assert getattr(resolved.recipe.train, other) is None
    assert resolved.provenance[f"train.{other}"] == f"command line, by train.{given}"


def test_another_detector_does_not_inherit_the_arguments_of_a_card(resolve):
    recipe = resolve("recipe=erm", "detector.name=mobilenetv3_small_050", "+detector.arguments.drop_rate=0.1").recipe
    assert recipe.detector.arguments == {"drop_rate": 0.1}
    assert resolve("recipe=erm", "detector.norm=local").recipe.detector.arguments["layers"] == [1, 1, 1, 1]


def test_own_files(resolve, own):
    recipe = own("my-run.yaml", "defaults: [sfd_gda, override /detector: resnet50]\ntrain: {steps: 9}\n"
                                "interventions: {cross_entropy: null}\n")  # fmt: skip
    data = own("demo.yaml", "name: mine\nroot: /d\ntrain: [t]\nattributes: {age: []}\n")
    detector = own("d.yml", "name: vit_tiny_patch16_224\n")
    resolved = resolve(f"recipe={recipe}", f"data={data}")
    assert (resolved.recipe.recipe, resolved.recipe.out, resolved.recipe.train.steps) == ("my-run", "runs/my-run", 9)
    assert resolved.recipe.detector.name == "resnet50.tv_in1k"
    assert (resolved.recipe.data.name, [*resolved.recipe.data.attributes]) == ("mine", ["age"])
    assert "cross_entropy" not in resolved.recipe.interventions
    assert resolved.provenance["train.steps"] == recipe
    assert resolved.provenance["data.name"] == data
    assert resolve("recipe=erm", f"detector={detector}").recipe.detector.name == "vit_tiny_patch16_224"


def test_own_file_may_bear_the_name_of_the_one_it_builds_on(resolve, own):
    path = own("sfd_gda.yaml", "defaults: [sfd_gda]\nseed: 5\n")
    assert resolve(f"recipe={path}").recipe.seed == 5
    assert resolve("recipe=sfd_gda").recipe.seed == 0


def test_files_of_the_working_directory_are_not_picked_up(resolve, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "erm.yaml").write_text("seed: 99\n")
    monkeypatch.chdir(tmp_path)
    assert resolve("recipe=erm").recipe.seed == 0


def test_hydra_is_left_as_it_was(resolve):
    ConfigStore.instance().store("theirs", {"a": 1})
    before = {*ConfigStore.instance().repo}
    resolve("recipe=erm")
    with pytest.raises(ValueError, match="recipe=NAME"):
        load([], {})
    assert {*ConfigStore.instance().repo} == before
    assert not GlobalHydra.instance().is_initialized()
    assert not OmegaConf.has_resolver("hydra")
