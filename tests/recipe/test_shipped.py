"""Every shipped recipe and card resolves with the real interventions; the keys that people type are frozen."""

import pytest
import yaml

from dist_fair import recipes
from dist_fair.recipe import cards
from dist_fair.recipe.composition import load
from dist_fair.recipe.resolved import differences
from dist_fair.recipe.schema import Recipe, walk

KEYS = """
recipe seed out
data.name data.root data.train data.eval data.attributes data.image_size data.mean data.std data.lanes data.window
data.workers data.stage_to data.tapes data.bad_samples data.max_pixels
data.augment.flip data.augment.shift data.augment.brightness data.augment.contrast data.augment.noise data.augment.blur
data.augment.jpeg data.augment.jpeg_quality
detector.name detector.pretrained detector.norm detector.init_from detector.arguments
interventions
train.steps train.epochs train.stop_after train.batch_size train.accumulate train.accumulate_exact
train.precision train.tf32 train.deterministic train.compile train.backend train.offload
train.checkpoint_activations train.ranks
train.clip
optimizer.name optimizer.lr optimizer.weight_decay optimizer.momentum optimizer.arguments
optimizer.sam.rho optimizer.sam.adaptive optimizer.sam.scope
schedule.name schedule.warmup schedule.floor schedule.every schedule.factor
checkpoint.every checkpoint.keep checkpoint.best
resume
evaluation.at_end evaluation.batch_size evaluation.bootstrap evaluation.figures
wandb.mode wandb.project wandb.name wandb.tags
log.every
""".split()  # noqa: SIM905


def files() -> list[tuple[str, str]]:
    return [(group, name) for group in cards.GROUPS for name in cards.names(group)]


def test_keys_are_frozen():
    assert [key for key, _, _ in walk(Recipe())] == KEYS


def test_every_key_has_a_meaning():
    assert [key for key, _, field in walk(Recipe()) if not field.metadata.get("meaning")] == []


@pytest.mark.parametrize("name", cards.names("recipe"))
def test_recipes_resolve_with_the_real_interventions(name):
    resolved = load([f"recipe={name}"], recipes.interventions())
    assert resolved.recipe.recipe == name
    assert resolved.recipe.out == f"runs/{name}"
    assert {"cross_entropy", "conditional_value_at_risk"} & {*resolved.recipe.interventions}


@pytest.mark.parametrize(("group", "name"), [pair for pair in files() if pair[0] != "recipe"])
def test_cards_resolve(group, name):
    resolved = load(["recipe=sfd_gda", f"{group}={name}"], recipes.interventions())
    assert f"{cards.GROUPS[group]}/{name}.yaml" in resolved.provenance.values()


@pytest.mark.parametrize(("group", "name"), files())
def test_files_are_short_and_say_what_they_are(group, name):
    text = (cards.shipped(cards.GROUPS[group]) / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 30


@pytest.mark.parametrize("name", ["daid", "daid_xception", "daid_efficientnet_b4"])
def test_constants_of_daid(name):
    resolved = load([f"recipe={name}"], recipes.interventions())
    interventions = resolved.values["interventions"]
    assert interventions["pair_alignment"]["weight"] == 0.7
    assert interventions["low_rank_projection"]["weight"] == 0.2
    assert interventions["inverse_propensity"]["propensity"] == "product_marginals"
    if name != "daid":
        recipe = resolved.recipe
        assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ("adamw", 1e-3, 4e-3)
        assert (recipe.train.batch_size, recipe.data.image_size) == (64, 224)
        assert all(interventions[part].get("delay", 0) == 0 for part in interventions)


@pytest.mark.parametrize("name", ["sfd_gda", "sfd_gda_xception", "sfd_gda_resnet50"])
def test_constants_of_the_paper(name):
    values = load([f"recipe={name}"], recipes.interventions()).values
    alignment, decoupling = (values["interventions"][key] for key in ("distribution_alignment", "channel_decoupling"))
    assert (alignment["weight"], alignment["epsilon"]) == (0.005, 5e-4)
    assert (decoupling["part"], len(decoupling["at"])) == (0.02, 3)
    assert alignment["delay"] > max(decoupling["at"])
    assert values["interventions"]["cross_entropy"]["reduction"] == "class_balanced"


@pytest.mark.parametrize(
    ("name", "detector"), [("sfd_gda_xception", "legacy_xception"), ("sfd_gda_resnet50", "resnet50.tv_in1k")]
)
def test_scale_of_the_paper(name, detector):
    recipe = load([f"recipe={name}"], recipes.interventions()).recipe
    assert (recipe.detector.name, recipe.detector.pretrained, recipe.detector.arguments) == (detector, True, {})
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("sgd", 1e-3)
    assert (recipe.train.epochs, recipe.train.steps, recipe.train.batch_size) == (50, None, 64)
    assert (recipe.data.name, recipe.data.image_size) == ("ffpp", 256)
    assert recipe.data.mean == recipe.data.std == [0.5] * 3


def test_ablations_differ_by_what_they_leave_out():
    def without_interventions(name: str) -> dict:
        trajectory = load([f"recipe={name}"], recipes.interventions()).trajectory()
        return {key: value for key, value in trajectory.items() if not key.startswith("interventions")}

    kept = {name: [*load([f"recipe={name}"], recipes.interventions()).recipe.interventions]
            for name in ("erm", "gda", "sfd", "sfd_gda")}  # fmt: skip
    assert kept == {
        "erm": ["cross_entropy"],
        "gda": ["cross_entropy", "distribution_alignment"],
        "sfd": ["cross_entropy", "channel_decoupling"],
        "sfd_gda": ["cross_entropy", "channel_decoupling", "distribution_alignment"],
    }
    assert all(without_interventions(name) == without_interventions("sfd_gda") for name in kept)


def test_data_folder_from_the_environment(monkeypatch):
    monkeypatch.setenv("DIST_FAIR_DATA", "/faces")
    assert load(["recipe=erm"], recipes.interventions()).recipe.data.root == "/faces/demo"


def test_list(capsys):
    assert recipes.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for _, name in files())
    assert "ERM, the baseline" in text


def test_show(capsys):
    assert recipes.main(["show", "gda", "train.steps=7"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["train"]["steps"] == 7
    assert "steps: 7  # command line" in text


def test_keys_help_names_every_key():
    text = recipes.schema_help()
    assert all(f"\n{key}=" in text for key in KEYS[1:])
    assert "\ninterventions.distribution_alignment.epsilon=" in text
    assert "(synced | local | frozen)" in text


@pytest.mark.parametrize("name", ["pg_fdd", "pg_fdd_xception", "pg_fdd_resnet50", "pg_fdd_efficientnet_b3"])
def test_constants_of_pg_fdd(name):
    resolved = load([f"recipe={name}"], recipes.interventions())
    recipe, interventions = resolved.recipe, resolved.values["interventions"]
    weights = {part: settings["weight"] for part, settings in interventions.items()}
    assert weights == {"shared_forgery": 1.0, "specific_forgery": 0.1, "reconstruction_loss": 0.3,
                       "contrastive_loss": 0.05, "margin_loss": 0.1, "conditional_value_at_risk": 1.0}  # fmt: skip
    risk, margins = interventions["conditional_value_at_risk"], interventions["margin_loss"]
    assert (risk["inner_alpha"], risk["alpha"], risk["outer"], risk["delay"]) == (0.9, 0.5, "smoothed", 0.0)
    assert (margins["scale"], margins["max_margin"]) == (30.0, 0.5)
    assert interventions["contrastive_loss"]["margin"] == 3.0
    assert (recipe.optimizer.sam.rho, recipe.optimizer.sam.adaptive) == (0.01 if name == "pg_fdd" else 0.05, False)
    assert {tape.label for tape in recipe.data.tapes.values()} == {0, 1}
    assert recipe.data.mean == recipe.data.std == [0.5] * 3  # what the decoder can reach
    if name != "pg_fdd":
        optimizer, schedule = recipe.optimizer, recipe.schedule
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 5e-4, 0.9, 5e-3)
        assert (schedule.name, schedule.every, schedule.factor) == ("step", 0.6, 0.9)
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.image_size) == (100, 32, 256)


def test_the_release_of_pg_fdd_differs_by_what_its_code_does():
    release, paper = (load([f"recipe={name}"], recipes.interventions()) for name in ("pg_fdd_release",
                                                                                     "pg_fdd_xception"))  # fmt: skip
    changed = differences(paper.trajectory(), release.trajectory())
    keys = ("detector.arguments.pooling", "detector.arguments.heads", "self_pairs", "outer")
    assert len(changed) == len(keys)
    assert all(any(key in line for line in changed) for key in keys)
