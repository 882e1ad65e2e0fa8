"""PG-FDD's detector: the trap in pooling AdaIN, parts on demand, what evaluation runs, errors."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors import build_detector
from dist_fair.detectors.conditional_decoder import adain
from dist_fair.detectors.pg_fdd import ScaledSiLU
from dist_fair.errors import DistFairError
from tests.detectors.images import LAYOUTS, both_layouts
from tests.detectors.pg_fdd_detectors import ALL, TINY, build, everything, loss_of, of_patches, pictures

torch.set_num_threads(1)
SCORE = ("forgery", "demographic")  # encoders that the score takes


@both_layouts
@pytest.mark.parametrize(
    ("arguments", "pixels", "positions"),
    [
        ({}, 64, 4),
        ({}, 96, 6),
        ({"output_stride": 32}, 64, 2),
        ({"output_stride": 32, "smooth": False}, 96, 3),
        ({"output_stride": 8}, 40, 5),
        ({"width": 8, "heads": {"hidden": 3}}, 80, 5),
    ],
)
def test_shapes(layout, arguments, pixels, positions):
    detector = build(norm="synced", double=False, **arguments)
    half, images, keys = (TINY | arguments)["width"] // 2, pictures(2, pixels, layout), torch.arange(2)
    found = everything(detector, images, keys)
    maps = {"code": 2 * half, "condition": 2 * half, "map": half}
    assert {name: value.shape for name, value in found.items()} == (
        {name: (2, channels, positions, positions) for name, channels in maps.items()}
        | {"shared_logits": (2, 2), "specific_logits": (2, 5), "demographic_logits": (2, 6), "logits": (2, 2)}
        | {"shared": (2, half), "specific": (2, half), "features": (2, half)}
        | {"self": images.shape, "cross": images.shape}
    )
    assert (detector.channels, detector.features) == (half, half)
    assert found["self"].abs().max() < 1
    torch.testing.assert_close(found["features"], found["map"].mean((2, 3)))


@both_layouts
@pytest.mark.parametrize(
    ("backbone", "pixels", "others"),
    [
        ("mobilenetv3_small_050", 64, {}),
        ("legacy_xception", 96, {}),
        ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 1}),
    ],
)
def test_any_backbone(layout, backbone, pixels, others):
    torch.manual_seed(0)
    arguments = {"backbone": backbone, "width": 16, "heads": {"hidden": 8}} | others
    detector = build_detector("pg_fdd", False, "synced", arguments, Communicator(), {"demographic_logits": 3})
    found = everything(detector, pictures(2, pixels, layout), torch.arange(2))
    assert found["demographic_logits"].shape == (2, 3)
    loss_of(found).backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


def literally_averaged(detector, images):
    """Features as the released code has them: AdaIN first, then the mean."""
    shared = detector.blocks["shared"](detector.encoders["forgery"](images))
    return adain(detector.blocks["demographic"](detector.encoders["demographic"](images)), shared).mean((2, 3))


def demographic_gradient(detector):
    """Largest part of the gradient of the demographic encoder and block; None if there is none."""
    parts = [detector.encoders["demographic"], detector.blocks["demographic"]]
    gradients = [parameter.grad for part in parts for parameter in part.parameters()]
    return max((gradient.abs().max().item() for gradient in gradients if gradient is not None), default=None)


@both_layouts
def test_the_pooling_trap(layout):
    """Averaged, the fusion is the mean of f_share, and the detection loss does not reach the demographic encoder."""
    images = pictures(layout=layout)
    detector = build(norm="local", pooling="average", needs={"demographic_logits": 6})
    torch.testing.assert_close(detector(images).features, literally_averaged(detector, images), rtol=0, atol=1e-12)
    detector(images).logits.square().sum().backward()
    assert demographic_gradient(detector) is None
    # The literal form has a gradient by rounding alone.
    detector.classify(literally_averaged(detector, images)).square().sum().backward()
    assert 0 < demographic_gradient(detector) < 1e-12
    # Another demographic encoder, the same score; rectified, another score, and a gradient.
    for pooling, equal in (("average", True), ("rectified", False)):
        detector = build(norm="local", pooling=pooling, needs={"demographic_logits": 6})
        before = detector(images).logits
        before.square().sum().backward()
        for parameter in detector.encoders["demographic"].parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        assert torch.equal(detector(images).logits, before) == equal
        assert equal or demographic_gradient(detector) > 1e-3
    assert torch.equal(build(pooling="average")(images).logits, build(pooling="average", fusion="none")(images).logits)


def bent_by_its_spread(x):
    return x * torch.sigmoid(x / (x.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt())


@both_layouts
@pytest.mark.parametrize(
    ("smooth", "rectified"), [(True, bent_by_its_spread), (False, lambda x: nn.functional.leaky_relu(x, 0.01))]
)
def test_fusion(layout, smooth, rectified):
    images, detector = pictures(layout=layout), build(norm="local", smooth=smooth)
    shared = detector.blocks["shared"](detector.encoders["forgery"](images))
    fair = detector.blocks["demographic"](detector.encoders["demographic"](images))
    torch.testing.assert_close(detector(images).feature_map, rectified(adain(fair, shared)), rtol=0, atol=0)
    detector.fuses = False
    torch.testing.assert_close(detector(images).feature_map, rectified(shared), rtol=0, atol=0)
    assert not build({}, smooth=smooth, fusion="none").fuses


def test_fusion_counts_however_small_the_maps():
    """With SiLU for a rectifier the difference vanishes as the maps do: AdaIN fixes their mean square too."""
    generator = torch.Generator().manual_seed(0)
    shared, fair, other = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64, generator=generator)
    moved = {}
    for scale in (1, 1e-1):
        for name, rectifier in {"ours": ScaledSiLU(), "silu": nn.SiLU(), "leaky": nn.LeakyReLU(0.01)}.items():
            features = [rectifier(adain(x, scale * shared)).mean((2, 3)) for x in (fair, other)]
            moved[name, scale] = ((features[0] - features[1]).norm() / scale).item()
    assert moved["leaky", 0.1] == pytest.approx(moved["leaky", 1], rel=0.05)
    assert moved["ours", 0.1] == pytest.approx(moved["ours", 1], rel=0.05)
    assert moved["silu", 0.1] < 0.05 * moved["silu", 1]


@both_layouts
@pytest.mark.parametrize("pooling", ["rectified", "average"])
def test_masked_channels_are_exactly_zero(layout, pooling):
    detector = build(pooling=pooling)
    detector.channel_mask[::2] = 0
    outputs = detector(pictures(layout=layout))
    assert (outputs.feature_map[:, ::2] == 0).all()
    assert (outputs.features[:, 1::2] != 0).all()
    outputs.logits.square().sum().backward()
    assert (detector.classifier[0].weight.grad[:, ::2] == 0).all()
    assert (detector.blocks["shared"][-1].bias.grad[::2] == 0).all()


@pytest.mark.parametrize("fusion", ["rectified", "average", "none"])
def test_every_parameter_has_a_gradient_whatever_is_needed(fusion):
    arguments = {"fusion": "none"} if fusion == "none" else {"pooling": fusion}
    layouts, keys = itertools.cycle([pictures(2, 32, layout) for layout in LAYOUTS]), torch.arange(2)
    for count in range(len(ALL) + 1):
        for names, images in zip(itertools.combinations(ALL, count), layouts, strict=False):
            detector = of_patches({name: ALL[name] for name in names}, **arguments)
            found = everything(detector, images, keys)
            del found["map"], found["features"]
            assert {*found} >= {*names} - {"reconstruction"}
            loss_of(found).backward()
            idle = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
            assert idle == [], names
            assert ("content" in detector.encoders) == (detector.decoder is not None) == ("reconstruction" in names)


@both_layouts
def test_extras_by_their_definition(layout):
    detector, images = of_patches(), pictures(layout=layout)
    forgery, content, demographic = (
        detector.encoders[name](images) for name in ("forgery", "content", "demographic")
    )  # fmt: skip
    shared, specific = detector.blocks["shared"](forgery), detector.blocks["specific"](forgery)
    fair = detector.blocks["demographic"](demographic)
    expected = {"shared": shared.mean((2, 3)), "specific": specific.mean((2, 3))}
    for name, block in (("shared", shared), ("specific", specific), ("demographic", fair)):
        expected[f"{name}_logits"] = detector.heads[f"{name}_logits"](block.mean((2, 3)))
    expected |= {"code": torch.cat([specific, shared], dim=1), "condition": adain(demographic, content)}
    extras = detector.extract(images).extras
    assert extras.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(extras[name], value, rtol=0, atol=1e-12)


@both_layouts
def test_no_extras_unless_needed(layout):
    detector = build({})
    outputs = detector.extract(pictures(layout=layout), torch.arange(4))
    assert outputs.extras == {}
    assert outputs.decode is None
    assert [*detector.encoders] == ["forgery", "demographic"]
    assert [*build({}, fusion="none").encoders] == [*build({}, pooling="average").encoders] == ["forgery"]


@both_layouts
@pytest.mark.parametrize(("pooling", "encoders"), [("rectified", SCORE), ("average", SCORE[:1])])
def test_evaluation_runs_what_the_score_needs(layout, pooling, encoders):
    detector, ran = build(pooling=pooling, norm="synced"), []
    for name, module in detector.named_modules():
        if [*module.parameters(recurse=False)]:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    detector.eval()
    outputs = detector(pictures(layout=layout))
    assert outputs.extras == {}
    assert outputs.decode is None
    assert {name.split(".")[1] for name in ran if name.startswith("encoders")} == {*encoders}
    assert len(ran) == len({*ran})
    assert sum(p.numel() for name in ran for p in detector.get_submodule(name).parameters()) == (
        detector.scoring_parameters()
    )
    ran.clear()
    detector.train()
    detector.extract(pictures(layout=layout))
    assert {name.split(".")[1] for name in ran if name.startswith("encoders")} == {"forgery", "content", "demographic"}


@both_layouts
def test_evaluation_scores_as_training_does_without_dropout(layout):
    detector, images = build(), pictures(layout=layout)
    trained = detector(images).logits
    detector.eval()
    assert torch.equal(detector(images).logits, trained)


@both_layouts
def test_copies_and_resized_classifiers(layout):
    detector, images = build(), pictures(2, layout=layout)
    twin = copy.deepcopy(detector)
    assert torch.equal(twin(images).logits, detector(images).logits)
    detector.resize_classifier(3)
    features = detector.extract(images).features[:, :3]
    assert detector.classify(features, torch.arange(2)).shape == (2, 2)
    assert features.dtype == detector.classifier[0].weight.dtype == torch.float64
    changed = {name for name, value in detector.state_dict().items() if value.shape != twin.state_dict()[name].shape}
    assert changed == {"classifier.0.weight"}


def test_no_kinks():
    smooth, plain = build(), build(smooth=False)
    assert not [m for m in smooth.modules() if isinstance(m, nn.ReLU | nn.LeakyReLU | nn.MaxPool2d)]
    assert smooth.state_dict().keys() == plain.state_dict().keys()
    assert {type(plain.rectifier), type(plain.classifier[1]), type(plain.blocks["shared"][1])} == {nn.LeakyReLU}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"width": 12}, "detector.arguments.width=12: a multiple of 8"),
        ({"width": True}, "detector.arguments.width=True: a multiple of 8"),
        ({"fusion": "adian"}, "detector.arguments.fusion=adian: adain or none"),
        ({"pooling": None}, "detector.arguments.pooling=None: rectified or average"),
        ({"heads": {"dropuot": 0.1}}, "detector.arguments.heads.dropuot: no such argument: did you mean 'dropout'?"),
        ({"heads": {"dropout": 1}}, "detector.arguments.heads.dropout=1: a rate, at least 0 and below 1"),
        ({"heads": {"dropout": "0.1"}}, "heads.dropout=0.1: a rate"),
        ({"heads": {"dropout_on": "both"}}, "heads.dropout_on=both: features or logits"),
        ({"heads": {"hidden": 0}}, "heads.hidden=0: a number of channels"),
        ({"heads": 3}, "detector.arguments.heads=3: a mapping of dropout, dropout_on, hidden"),
        ({"decoder": {"dropout": float("nan")}}, "decoder.dropout=nan: a rate"),
        ({"backbone": "resnet19"}, "detector.arguments.backbone=resnet19: no such .*did you mean 'resnet1"),
        ({"backbone": 18}, "detector.arguments.backbone=18: a timm model"),
        ({"widht": 16}, "detector.arguments.backbone=resnet18: timm cannot build .*unexpected keyword"),
        ({"num_classes": 5}, "detector.arguments.num_classes: set by dist_fair"),
        ({"drop_rate": 0.5}, "drop_rate=0.5: dropout draws other numbers"),
        ({"smooth": "yes"}, "smooth=yes .* true or false"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(DistFairError, match=text):
        build(**arguments)
    with pytest.raises(DistFairError, match=re.escape("detector.arguments.backbone=None: a timm model")):
        build_detector("pg_fdd", False, "synced", {}, Communicator(), {})


@both_layouts
def test_one_position_has_no_spread(layout):
    text = "images of 32x32 pixels leave the backbone as one position.*larger data.image_size.*output_stride=16"
    for arguments in ({}, {"needs": {}}, {"pooling": "average"}):
        with pytest.raises(DistFairError, match=text):
            build(output_stride=32, **arguments)(pictures(2, 32, layout))
    with pytest.raises(DistFairError, match=text):
        build(output_stride=32).reconstruct(pictures(2, 32, layout), torch.arange(2))
    assert build({}, output_stride=32, pooling="average")(pictures(2, 32, layout)).logits.isfinite().all()
