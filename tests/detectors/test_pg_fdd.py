"""PG-FDD's detector: AdaIN and the trap in pooling it, parts on demand, rows that know nothing of each other."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors import build_detector
from dist_fair.detectors.conditional_decoder import ConditionalDecoder, adain
from dist_fair.detectors.norm import convert_norms
from dist_fair.detectors.pg_fdd import PGFDD, Encoder, ScaledSiLU
from dist_fair.detectors.pg_fdd_arguments import chosen_arguments
from dist_fair.errors import DistFairError
from dist_fair.keyed_rows import mixed
from tests.ranks import run_ranks

torch.set_num_threads(1)
NARROW = {"backbone": "resnet18", "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "output_stride": 16}
TINY = NARROW | {"width": 16, "heads": {"hidden": 8}, "smooth": True}
ALL = {"shared_logits": 2, "specific_logits": 5, "demographic_logits": 6, "shared": 0, "specific": 0,
       "reconstruction": 0}  # fmt: skip
SCORE = ("forgery", "demographic")  # encoders that the score takes


def build(needs=ALL, norm="frozen", comm=None, seed=0, double=True, **arguments) -> PGFDD:
    torch.manual_seed(seed)
    detector = build_detector("pg_fdd", False, norm, TINY | arguments, comm or Communicator(), needs)
    # Convolutions start without a pattern to speak of: give the blocks one, so that nothing here is tiny.
    for parameter in (*detector.blocks.parameters(), *detector.classifier.parameters()):
        nn.init.normal_(parameter, std=0.5)
    return detector.double() if double else detector


class Patches(nn.Module):
    """A backbone that takes no time: a patch, a position."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 16, 16)

    def forward_features(self, images):
        return self.convolution(images)


def of_patches(needs=ALL, seed=0, **arguments) -> PGFDD:
    """Without norms that couple rows: the adjustments' are frozen."""
    torch.manual_seed(seed)
    chosen = chosen_arguments({"backbone": "patches", "width": 16} | arguments)[0]
    detector = PGFDD(lambda: Encoder(Patches(), 6, 16), chosen, needs).double()
    return convert_norms(detector, "frozen", Communicator())


def pictures(count=4, pixels=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, pixels, pixels, dtype=torch.float64, generator=generator).clamp(-1, 1)


def everything(detector, images, keys):
    """All that can enter a loss, (B, ...) each: extras, both reconstructions, features, logits."""
    outputs = detector.extract(images, keys)
    found = dict(outputs.extras) | {"features": outputs.features, "map": outputs.feature_map}
    if outputs.decode is not None:
        code, condition = outputs.extras["code"], outputs.extras["condition"]
        found["self"] = outputs.decode(code, condition, None if keys is None else mixed(keys, 1))
        found["cross"] = outputs.decode(code * 2, condition, None if keys is None else mixed(keys, 2))
    return found | {"logits": detector.classify(outputs.features, keys)}


def loss_of(found):
    return sum(value.tanh().square().mean() for value in found.values())


def test_adain_by_its_definition():
    x, y = torch.randn(3, 5, 4, 6, dtype=torch.float64), torch.randn(3, 5, 2, 3, dtype=torch.float64) * 3 + 1
    result = adain(x, y)
    for row, channel in itertools.product(range(3), range(5)):
        content, style = x[row, channel].flatten().tolist(), y[row, channel].flatten().tolist()
        mean, wanted = sum(content) / len(content), sum(style) / len(style)
        variance = sum((value - mean) ** 2 for value in content) / (len(content) - 1) + 1e-5
        spread = sum((value - wanted) ** 2 for value in style) / (len(style) - 1) + 1e-5
        expected = [(value - mean) / variance**0.5 * spread**0.5 + wanted for value in content]
        assert result[row, channel].flatten().tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(result.mean((2, 3)), y.mean((2, 3)), rtol=0, atol=1e-12)
    assert adain(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    # A channel without a pattern has a gradient all the same.
    flat = torch.zeros(1, 1, 2, 2, requires_grad=True)
    adain(flat, torch.randn(1, 1, 2, 2)).square().sum().backward()
    assert flat.grad.isfinite().all()


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
def test_shapes(arguments, pixels, positions):
    detector = build(norm="synced", double=False, **arguments)
    half, images, keys = (TINY | arguments)["width"] // 2, pictures(2, pixels), torch.arange(2)
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


@pytest.mark.parametrize(
    ("backbone", "pixels", "others"),
    [
        ("mobilenetv3_small_050", 64, {}),
        ("legacy_xception", 96, {}),
        ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 1}),
    ],
)
def test_any_backbone(backbone, pixels, others):
    torch.manual_seed(0)
    arguments = {"backbone": backbone, "width": 16, "heads": {"hidden": 8}} | others
    detector = build_detector("pg_fdd", False, "synced", arguments, Communicator(), {"demographic_logits": 3})
    found = everything(detector, pictures(2, pixels), torch.arange(2))
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


def test_the_pooling_trap():
    """Averaged, the fusion is the mean of f_share, and the detection loss does not reach the demographic encoder."""
    images = pictures()
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


@pytest.mark.parametrize(
    ("smooth", "rectified"), [(True, bent_by_its_spread), (False, lambda x: nn.functional.leaky_relu(x, 0.01))]
)
def test_fusion(smooth, rectified):
    images, detector = pictures(), build(norm="local", smooth=smooth)
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


@pytest.mark.parametrize("pooling", ["rectified", "average"])
def test_masked_channels_are_exactly_zero(pooling):
    detector = build(pooling=pooling)
    detector.channel_mask[::2] = 0
    outputs = detector(pictures())
    assert (outputs.feature_map[:, ::2] == 0).all()
    assert (outputs.features[:, 1::2] != 0).all()
    outputs.logits.square().sum().backward()
    assert (detector.classifier[0].weight.grad[:, ::2] == 0).all()
    assert (detector.blocks["shared"][-1].bias.grad[::2] == 0).all()


@pytest.mark.parametrize("fusion", ["rectified", "average", "none"])
def test_every_parameter_has_a_gradient_whatever_is_needed(fusion):
    arguments = {"fusion": "none"} if fusion == "none" else {"pooling": fusion}
    images, keys = pictures(2, 32), torch.arange(2)
    for count in range(len(ALL) + 1):
        for names in itertools.combinations(ALL, count):
            detector = of_patches({name: ALL[name] for name in names}, **arguments)
            found = everything(detector, images, keys)
            del found["map"], found["features"]
            assert {*found} >= {*names} - {"reconstruction"}
            loss_of(found).backward()
            idle = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
            assert idle == [], names
            assert ("content" in detector.encoders) == (detector.decoder is not None) == ("reconstruction" in names)


def test_extras_by_their_definition():
    detector, images = of_patches(), pictures()
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


def test_no_extras_unless_needed():
    detector = build({})
    outputs = detector.extract(pictures(), torch.arange(4))
    assert outputs.extras == {}
    assert outputs.decode is None
    assert [*detector.encoders] == ["forgery", "demographic"]
    assert [*build({}, fusion="none").encoders] == [*build({}, pooling="average").encoders] == ["forgery"]


@pytest.mark.parametrize(("pooling", "encoders"), [("rectified", SCORE), ("average", SCORE[:1])])
def test_evaluation_runs_what_the_score_needs(pooling, encoders):
    detector, ran = build(pooling=pooling, norm="synced"), []
    for name, module in detector.named_modules():
        if [*module.parameters(recurse=False)]:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    detector.eval()
    outputs = detector(pictures())
    assert outputs.extras == {}
    assert outputs.decode is None
    assert {name.split(".")[1] for name in ran if name.startswith("encoders")} == {*encoders}
    assert len(ran) == len({*ran})
    assert sum(p.numel() for name in ran for p in detector.get_submodule(name).parameters()) == (
        detector.scoring_parameters()
    )
    ran.clear()
    detector.train()
    detector.extract(pictures())
    assert {name.split(".")[1] for name in ran if name.startswith("encoders")} == {"forgery", "content", "demographic"}


def test_evaluation_scores_as_training_does_without_dropout():
    detector, images = build(), pictures()
    trained = detector(images).logits
    detector.eval()
    assert torch.equal(detector(images).logits, trained)


@pytest.mark.parametrize("place", ["features", "logits"])
def test_dropout(place):
    detector = of_patches(heads={"dropout": 0.5, "dropout_on": place})
    images, keys = pictures(1, 32).expand(64, -1, -1, -1), torch.arange(64)
    dropped, kept = everything(detector, images, keys), everything(detector, images, None)
    for name in ("shared_logits", "specific_logits", "demographic_logits", "logits"):
        if place == "logits":
            assert ((dropped[name] == 0) | torch.isclose(dropped[name], 2 * kept[name])).all()
            part = (dropped[name] == 0).double().mean()
            assert abs(part - 0.5) < 2.5 * dropped[name].numel() ** -0.5
        else:
            assert (dropped[name] != 0).all()
            assert not torch.isclose(dropped[name], kept[name]).any(dim=0).all()
    # Features are pooled ones, for any place; the decoder drops too, and other elements for other keys.
    for name in ("shared", "specific", "features", "code", "condition"):
        torch.testing.assert_close(dropped[name], kept[name])
    assert not torch.isclose(dropped["self"], kept["self"]).all()
    assert not torch.isclose(dropped["self"][0], dropped["self"][1]).all()
    rateless = of_patches(heads={"dropout": 0, "dropout_on": place}, decoder={"dropout": 0})
    for name, value in everything(rateless, images[:2], keys[:2]).items():
        torch.testing.assert_close(value, kept[name][:2])


def test_every_place_drops_other_elements(monkeypatch):
    """Heads, and the stages of the decoder on either path, each with other numbers for the same key."""
    from dist_fair.detectors import conditional_decoder, pg_fdd

    seen = []

    def noted(x, rate, keys):
        seen.append(keys[0].item())
        return x

    monkeypatch.setattr(pg_fdd, "dropout", noted)
    monkeypatch.setattr(conditional_decoder, "dropout", noted)
    everything(of_patches(), pictures(2), torch.arange(2))
    assert len(seen) == len({*seen}) == 4 + 2 * 5


def test_rows_do_not_know_each_other():
    detector, images, keys = build(), pictures(6), torch.tensor([5, 3, 9, 1, 8, 2])
    whole = everything(detector, images, keys)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    permuted = everything(detector, images[order], keys[order])
    parts = [everything(detector, images[rows], keys[rows]) for rows in (slice(0, 1), slice(1, 6))]
    for name, value in whole.items():
        torch.testing.assert_close(permuted[name], value[order], rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=0, atol=1e-12)


def test_decoder_by_its_definition():
    """The code through all stages, the condition through all but the last, AdaIN before each."""
    torch.manual_seed(0)
    decoder = ConditionalDecoder(16, 0.3).double()
    code, condition = torch.randn(2, 2, 16, 3, 3, dtype=torch.float64)

    def stage(number, x):
        doubled = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        first, _, second, _ = decoder.stages[number]
        return second(first(doubled).relu()).relu()

    code1, condition1 = stage(0, adain(code, condition)), stage(0, condition)
    code2, condition2 = stage(1, adain(code1, condition1)), stage(1, condition1)
    code3 = stage(2, adain(code2, condition2))
    expected = nn.functional.interpolate(decoder.rgb(code3), (48, 40), mode="bilinear", align_corners=True).tanh()
    torch.testing.assert_close(decoder(code, condition, (48, 40)), expected, rtol=0, atol=1e-12)
    assert [layer.out_channels for stage in decoder.stages for layer in stage[::2]] == [8, 8, 4, 4, 2, 2]


def test_reconstructions_for_a_gallery():
    detector, images, partners = build(norm="synced"), pictures(), torch.tensor([2, 3, 0, 1])
    detector.eval()
    own, crossed = detector.reconstruct(images, partners)
    assert own.shape == crossed.shape == images.shape
    torch.testing.assert_close(detector.reconstruct(images, torch.arange(4))[1], own)
    # In training without dropout the same, if the norms are as in evaluation.
    for module in detector.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    outputs = detector.extract(images)
    code, condition = outputs.extras["code"], outputs.extras["condition"]
    torch.testing.assert_close(outputs.decode(code, condition), own)
    torch.testing.assert_close(outputs.decode(code[partners], condition), crossed)
    with pytest.raises(DistFairError, match=r"trained without a decoder.*reconstruction"):
        build({}).reconstruct(images, partners)


def test_half_precision_reaches_the_decoder(monkeypatch):
    detector, types = build(double=False), []
    detector.decoder.rgb.register_forward_hook(lambda *arguments: types.append(arguments[-1].dtype))
    for head in detector.heads.values():  # small, and margins need digits
        head[-1].register_forward_hook(lambda *arguments: types.append(arguments[-1].dtype))
    for half in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=half == torch.bfloat16):
            outputs = detector.extract(pictures(2).float(), torch.arange(2))
        assert [types.pop() for _ in detector.heads] == [torch.float32] * 3
        code, condition = (outputs.extras[name].float() for name in ("code", "condition"))
        images = outputs.decode(code, condition, torch.arange(2))
        assert types.pop() == half
        logits = [value for name, value in outputs.extras.items() if name.endswith("logits")]
        assert {value.dtype for value in (images, outputs.features, *logits)} == {torch.float32}
        (images.mean() + outputs.features.mean()).backward()


def test_copies_and_resized_classifiers():
    detector, images = build(), pictures(2)
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


def test_one_position_has_no_spread():
    text = "images of 32x32 pixels leave the backbone as one position.*larger data.image_size.*output_stride=16"
    for arguments in ({}, {"needs": {}}, {"pooling": "average"}):
        with pytest.raises(DistFairError, match=text):
            build(output_stride=32, **arguments)(pictures(2, 32))
    with pytest.raises(DistFairError, match=text):
        build(output_stride=32).reconstruct(pictures(2, 32), torch.arange(2))
    assert build({}, output_stride=32, pooling="average")(pictures(2, 32)).logits.isfinite().all()


class Objective(nn.Module):
    """A loss of all outputs over the whole batch, by sums over ranks."""

    def __init__(self, detector, comm, count):
        super().__init__()
        self.detector, self.comm, self.count = detector, comm, count

    def forward(self, images, keys):
        found = everything(self.detector, images, keys)
        sums = torch.stack([value.tanh().square().flatten(1).mean(dim=1).sum() for value in found.values()])
        return (self.comm.replicated_sum(sums, "test") / self.count).square().sum()


def train(comm, sizes, norm, keyed_by):
    """Gradients as real DDP averages them, fp64."""
    detector = build(comm=comm, norm=norm)
    objective = Objective(detector, comm, sum(sizes))
    wrapped = nn.parallel.DistributedDataParallel(objective) if comm.world > 1 else objective
    start = sum(sizes[: comm.rank])
    rows = slice(start, start + sizes[comm.rank])
    keys = torch.arange(sum(sizes))[rows] if keyed_by == "sample" else torch.arange(sizes[comm.rank])
    loss = wrapped(pictures(sum(sizes), 32)[rows], keys)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in detector.named_parameters()}


@pytest.mark.parametrize(
    ("norm", "keyed_by", "equal"),
    [("synced", "sample", True), ("frozen", "sample", True), ("local", "sample", False), ("frozen", "row", False)],
)
def test_a_step_on_two_ranks_is_a_step_on_one(norm, keyed_by, equal):
    """With norms per rank, or dropout by the place of a row on its rank, it is not."""
    sizes = (2, 3)
    loss, gradients = train(Communicator(), (sum(sizes),), "frozen" if norm == "frozen" else "local", "sample")

    def close(actual, expected):
        return torch.allclose(actual, expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item() + 1e-12)

    for found, actual in run_ranks(2, train, sizes, norm, keyed_by):
        same = [close(actual[name], expected) for name, expected in gradients.items()]
        assert all([close(found, loss), *same]) == equal
