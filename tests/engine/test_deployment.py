"""Detectors in use: the scores of the trained module, and nothing that only training needs."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dist_fair
from dist_fair.data.reading import Reader
from dist_fair.detectors.base import Detector
from dist_fair.engine import exporting
from dist_fair.engine.deployment import load_detector
from dist_fair.errors import DistFairError
from dist_fair.interventions.at_inference import Projection, Standardisation
from dist_fair.interventions.base import Intervention, Settings, registered
from tests.data.making import encoded, made_index, picture
from tests.engine import deployment_worlds
from tests.engine.deployment_worlds import SIZE, batch, deployed, trained

TOLERANCE = 1e-6
SOME, ALL_BUT_ONE = (0, 3, 4, 9, 11), (*range(7), *range(8, 12))


def apart(folder, recipe, module):
    """Largest difference between the scores of the exported and loaded detector and of the module."""
    exporting.write(folder, deployed(recipe, module))
    expected, found = module.score(batch()), load_detector(folder)(batch().images)
    assert expected.max() - expected.min() > 0.05, "all images have the same score: nothing is compared"
    assert found.dtype == torch.float32
    return float((found - expected).abs().max())


@pytest.mark.parametrize(("steps", "masked"), [
    *((steps, masked) for steps in deployment_worlds.STEPS for masked in ((), SOME)),
    *((steps, ALL_BUT_ONE) for steps in ("nothing", "norm", "projection", "norm, unit")),
])  # fmt: skip
def test_scores_are_those_of_the_module(tmp_path, steps, masked):
    assert apart(tmp_path / "out", *trained("relu", steps, masked)) < TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["masked"] == sorted(masked)
    assert len(config["steps"]) == (0 if "not" in steps else len(deployment_worlds.STEPS[steps]))


@pytest.mark.parametrize("masked", [(), SOME], ids=["unmasked", "masked"])
@pytest.mark.parametrize("detector", [*deployment_worlds.DETECTORS])
def test_every_kind_of_detector(tmp_path, detector, masked):
    recipe, module = trained(detector, "norm, projection", masked)
    assert apart(tmp_path / "out", recipe, module) < TOLERANCE
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = module.detector.channels - len(masked)
    assert tensors["steps.0.mean"].shape == (kept,)
    assert tensors["steps.1.basis"].shape == (kept + bool(masked), 5)
    if detector == "adjusted":
        assert {len(tensors[f"detector.adjust.{layer}.bias"]) for layer in (0, 1)} == {kept}
    if detector == "pg_fdd":
        assert {len(tensors[f"detector.blocks.{name}.4.bias"]) for name in ("shared", "demographic")} == {kept}


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precision_is_that_of_training(tmp_path, precision):
    assert apart(tmp_path / "out", *trained("smooth", "norm, projection", SOME, precision)) < TOLERANCE


def test_only_what_the_score_needs_is_in_the_file(tmp_path):
    recipe, module = trained("pg_fdd", masked=())
    exporting.write(tmp_path / "out", deployed(recipe, module))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    trained_names = {name for name in module.state_dict() if not name.endswith("num_batches_tracked")}
    left_out = {name.split(".")[1] + "." + name.split(".")[2] for name in trained_names - tensors.keys()
                if name != "detector.channel_mask"}  # fmt: skip
    assert {part.split(".")[0] for part in left_out} == {"encoders", "blocks", "heads", "decoder"}
    assert {part for part in left_out if part.startswith(("encoders", "blocks"))} == {"encoders.content",
                                                                                     "blocks.specific"}  # fmt: skip
    parameters = sum(one.numel() for one in load_detector(tmp_path / "out").parameters())
    assert parameters == module.detector.scoring_parameters() < sum(one.numel() for one in module.parameters()) / 1.3


def test_a_masked_channel_is_gone_from_the_file(tmp_path):
    recipe, module = trained("relu", "norm", SOME)
    exporting.write(tmp_path / "out", deployed(recipe, module))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith("detector.backbone")}
    assert shapes == {"detector.classifier.weight": (2, 7), "detector.classifier.bias": (2,),
                      "steps.0.mean": (7,), "steps.0.scale": (7,)}  # fmt: skip
    kept = [channel for channel in range(12) if channel not in SOME]
    assert torch.equal(tensors["detector.classifier.weight"], module.detector.classifier.weight[:, kept])


def shuffled(monkeypatch):
    prune = Detector.prune
    monkeypatch.setattr(Detector, "prune", lambda self, kept: prune(self, kept.roll(1)))


def constants_forgotten(monkeypatch):
    without = Standardisation.without

    def forgetful(self, kept, constants):
        step, constants = without(self, kept, constants)
        return step, constants * 0

    monkeypatch.setattr(Standardisation, "without", forgetful)


def length_forgotten(monkeypatch):
    without = Projection.without

    def forgetful(self, kept, constants):
        step, _ = without(self, kept, constants)
        step.constant = step.constant * 0.5
        step.basis[-1] *= 2
        return step, None

    monkeypatch.setattr(Projection, "without", forgetful)


@pytest.mark.parametrize(("bug", "detector", "steps"), [
    (shuffled, "relu", "nothing"), (shuffled, "adjusted", "nothing"), (shuffled, "pg_fdd", "norm"),
    (constants_forgotten, "relu", "norm"), (constants_forgotten, "relu", "norm, projection"),
    (length_forgotten, "relu", "norm, unit"),
])  # fmt: skip
def test_a_planted_bug_is_noticed(tmp_path, monkeypatch, bug, detector, steps):
    bug(monkeypatch)
    assert apart(tmp_path / "out", *trained(detector, steps, SOME)) > 100 * TOLERANCE


def test_what_cannot_be_exported_is_refused():
    recipe, module = trained("relu", "norm")
    recipe.interventions["subgroup_norm"].inference = "group"
    with pytest.raises(DistFairError, match=r"nobody knows a face's group: .*inference=mixture, or none"):
        deployed(recipe, module)
    with pytest.raises(DistFairError, match="channel_mask: 0 of 12 entries are 1, 12 are 0"):
        deployed(*trained(masked=range(12)))
    recipe, module = trained()
    recipe.detector.arguments = recipe.detector.arguments | {"channels": [4, 4, 8, 10]}
    with pytest.raises(DistFairError, match=r"here: not the weights of this TimmDetector.*\(10,\)"):
        deployed(recipe, module)
    recipe.interventions["subgroup_norm"] = registered()["subgroup_norm"].Settings()
    with pytest.raises(DistFairError, match=r"here does not fit its recipe: interventions\.subgroup_norm has no"):
        deployed(recipe, module)

    class Unknown(Intervention):
        def transform(self, features, batch, comm):
            return features * 2

    with pytest.raises(DistFairError, match="Unknown transforms features, but has no at_inference"):
        Unknown.at_inference(Settings(), {})


def test_a_loaded_detector_stays_as_it_is(tmp_path):
    exporting.write(tmp_path / "out", deployed(*trained("relu", "norm", SOME)))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    detector = dist_fair.load_detector(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    detector.train()
    assert not any(module.training for module in detector.modules())
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    images = batch().images.requires_grad_()
    detector(images).sum().backward()
    assert images.grad.abs().sum() > 0  # for saliency maps
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())
    torch.testing.assert_close(detector(images[:2]), detector(images)[:2], rtol=0, atol=TOLERANCE)


def test_images_are_prepared_as_in_training(tmp_path):
    """Sizes, kinds of file, grey and transparent ones, and what a camera says of how it was held."""
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(1)[:, :17]).save(turned, exif=exif)
    grey = cv2.imencode(".png", picture(2)[..., 0])[1].tobytes()
    transparent = cv2.imencode(".png", np.dstack([picture(3), picture(4)[..., :1]]))[1].tobytes()
    files = [turned.read_bytes(), encoded(picture(5, 100)), grey, transparent, encoded(picture(6, SIZE), "png"),
             encoded(picture(7)[:9], "webp")]  # fmt: skip
    recipe, module = trained()
    expected = Reader(made_index(tmp_path / "shards", files), SIZE).read(np.arange(6), np.zeros(6, int)).images
    paths = []
    for number, data in enumerate(files):
        paths.append(tmp_path / f"{number}.any")
        paths[-1].write_bytes(data)
    detector = deployed(recipe, module)
    assert torch.equal(detector.preprocess(paths), detector.normalised(expected))
    assert torch.equal(detector.preprocess([*expected]), detector.normalised(expected))
    assert np.ptp(expected[0], axis=(0, 1)).min() > 0
    with pytest.raises(DistFairError, match="image 1: an array of float64"):
        detector.preprocess([expected[0], expected[0] / 255])
    for single in (paths[0], str(paths[0]), expected[0]):
        with pytest.raises(DistFairError, match="put a single one into a list"):
            detector.preprocess(single)
    (tmp_path / "text.png").write_text("no image")
    for path, fault in (("text.png", "not a jpg, png or webp"), ("nowhere.png", "cannot be read")):
        with pytest.raises(DistFairError, match=f"{path}: .*{fault}"):
            detector.preprocess([tmp_path / path])
