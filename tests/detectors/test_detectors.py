"""Detectors by name: every parameter trains, masks act after the activation, ranks agree."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dist_fair import detectors
from dist_fair.collectives import Communicator
from dist_fair.detectors import Detector, Outputs, build_detector, register
from dist_fair.detectors.norm import SyncedBatchNorm
from dist_fair.errors import DistFairError
from tests.detectors.images import LAYOUTS, both_layouts, loaded
from tests.ranks import run_ranks

SMALL = "mobilenetv3_small_050"
# name, arguments, pixels, channels of the map, smallest value its activation can give (ReLU, SiLU, Hardswish)
BACKBONES = [
    ("legacy_xception", {}, 96, 2048, 0.0),
    ("legacy_xception", {"adjust_channels": 512}, 96, 512, 0.0),
    ("resnet50", {}, 64, 2048, 0.0),
    ("tf_efficientnet_b3", {}, 64, 1536, -0.2785),
    ("tf_efficientnet_b4", {}, 64, 1792, -0.2785),
    (SMALL, {}, 64, 288, -0.375),
    ("vit_tiny_patch16_224", {"img_size": 64}, 64, 192, None),
]


def build(name=SMALL, pretrained=False, norm="synced", arguments=None, seed=0):
    torch.manual_seed(seed)
    return build_detector(name, pretrained, norm, arguments or {}, Communicator())


@both_layouts
@pytest.mark.parametrize(("name", "arguments", "pixels", "channels", "least"), BACKBONES)
def test_backbones(layout, name, arguments, pixels, channels, least):
    detector = build(name, arguments=arguments)
    detector.channel_mask[::2] = 0
    outputs = detector(loaded(2, pixels, layout))
    assert outputs.logits.shape == (2, 2)
    assert outputs.features.shape == (2, channels) == (2, detector.features)
    assert outputs.feature_map.shape[:2] == (2, channels) == (2, detector.channels)
    torch.testing.assert_close(outputs.features, outputs.feature_map.mean((2, 3)))
    # The map is taken after its activation, and masked channels are exactly zero.
    assert least is None or outputs.feature_map.min() >= least
    assert (outputs.feature_map[:, ::2] == 0).all()
    assert (outputs.feature_map[:, 1::2] != 0).any()
    outputs.logits.square().sum().backward()
    assert [parameter for parameter, value in detector.named_parameters() if value.grad is None] == []
    assert (detector.classifier.weight.grad[:, ::2] == 0).all()


@both_layouts
def test_masked_channels_get_no_gradient(layout):
    detector = build("resnet50")
    detector.eval()
    detector.channel_mask[:1024] = 0
    detector(loaded(2, 64, layout)).logits.square().sum().backward()
    bias = detector.backbone.layer4[-1].bn3.bias.grad  # the last norm before the activation
    assert (bias[:1024] == 0).all()
    assert (bias[1024:] != 0).any()


def test_construction_depends_on_the_seed_only():
    first, second, other = build().state_dict(), build().state_dict(), build(seed=1).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert build(norm="local").state_dict().keys() == first.keys() == build(norm="frozen").state_dict().keys()
    assert any(isinstance(module, SyncedBatchNorm) for module in build().modules())


@both_layouts
def test_resized_classifier_and_half_precision(layout):
    detector = build()
    detector.resize_classifier(7)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = detector.extract(loaded(2, 64, layout))
        logits = detector.classify(outputs.features[:, :7])
    assert outputs.logits.shape == (2, 0)
    assert outputs.features.dtype == logits.dtype == torch.float32
    detector = build().double()
    assert detector(loaded(2, 64, layout).double()).logits.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "pretrained", "arguments", "text"),
    [
        (
            "legacy_xceptoin",
            False,
            {},
            "detector.name=legacy_xceptoin: no such detector: did you mean 'legacy_xception'",
        ),
        ("resnet50", "tv_in2k", {}, "detector.pretrained=tv_in2k: resnet50 has no such weights: did you mean"),
        ("resnet50", "there/is/none.pt", {}, "there/is/none.pt: no such file"),
        (SMALL, False, {"widht": 2}, "arguments {'widht': 2}: .*unexpected keyword"),
        (SMALL, False, {"num_classes": 5}, "detector.arguments.num_classes: set by dist_fair"),
        (SMALL, False, {"drop_path_rate": 0.2}, "drop_path_rate=0.2: dropout draws other numbers on every rank"),
        (SMALL, False, {"adjust_channels": "many"}, "adjust_channels=many: a number of channels"),
        ("deit_tiny_distilled_patch16_224", False, {}, "cannot build it headless"),
    ],
)
def test_errors(name, pretrained, arguments, text):
    with pytest.raises(DistFairError, match=text):
        build(name, pretrained, arguments=arguments)


def test_weights_of_the_hub(monkeypatch):
    """The hub is not asked in tests: what is asked of timm, and what is said when it cannot be reached."""
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **arguments):
        asked.append((name, pretrained))
        if pretrained:
            raise OSError("no network")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    for pretrained, full_name in ((True, "resnet50"), ("tv_in1k", "resnet50.tv_in1k")):
        with pytest.raises(DistFairError, match=rf"weights of {full_name} could not be had .*no network.* give a file"):
            build("resnet50", pretrained)
        assert asked[-2] == (full_name, True)


def test_pretrained_from_files(tmp_path):
    torch.manual_seed(5)
    whole = timm.create_model(SMALL, num_classes=10)
    save_file(whole.state_dict(), tmp_path / "timm.safetensors")
    detector = build(pretrained=str(tmp_path / "timm.safetensors"))
    assert torch.equal(detector.backbone.conv_stem.weight, whole.conv_stem.weight)
    torch.save({"state_dict": detector.state_dict()}, tmp_path / "detector.pth")
    other = build(pretrained=str(tmp_path / "detector.pth"), seed=6)
    assert torch.equal(other.backbone.conv_stem.weight, whole.conv_stem.weight)
    assert not torch.equal(other.classifier.weight, detector.classifier.weight)
    with pytest.raises(DistFairError, match="not the weights of this ResNet"):
        build("resnet18", str(tmp_path / "timm.safetensors"))


class Tiny(Detector):
    def __init__(self, pretrained, arguments, needs):
        super().__init__(4, 4)
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def extract(self, images, keys=None):
        feature_map = self.norm(self.convolution(images)).relu() * self.channel_mask[:, None, None]
        features = feature_map.mean((2, 3))
        return Outputs(features.new_empty((len(features), 0)), features, feature_map)


def test_registered_detectors(monkeypatch):
    monkeypatch.setattr(detectors.registry, "_registry", {})
    assert register("tiny_fair_net")(Tiny) is Tiny
    assert type(build("tiny_fair_net").norm) is SyncedBatchNorm
    with pytest.raises(DistFairError, match="did you mean 'tiny_fair_net'"):
        build("tiny_fair_nte")


def build_on_ranks(comm, seeds, files):
    torch.manual_seed(seeds[comm.rank])
    return build_detector(SMALL, files[comm.rank], "synced", {}, comm).classifier.weight.detach()


def test_ranks_have_the_same_weights_or_all_stop():
    first, second = run_ranks(2, build_on_ranks, [0, 0], [False, False])
    assert torch.equal(first, second)
    with pytest.raises(DistFairError, match=r"detector/weights: ranks \[1\] disagree"):
        run_ranks(2, build_on_ranks, [0, 1], [False, False])
    with pytest.raises(DistFairError, match=r"rank 1: absent\.pt: no such file"):
        run_ranks(2, build_on_ranks, [0, 0], [False, "absent.pt"])


def train_detector(comm, sizes, norm, layout):
    """Gradients as real DDP averages them, fp64, of an objective over the whole batch."""
    torch.manual_seed(0)
    detector = build_detector(SMALL, False, norm, {}, comm).double()
    wrapped = nn.parallel.DistributedDataParallel(detector) if comm.world > 1 else detector
    images = loaded(sum(sizes), 64, layout).double()
    start = sum(sizes[: comm.rank])
    outputs = wrapped(images[start : start + sizes[comm.rank]])
    means = comm.replicated_sum(torch.cat([outputs.logits.tanh().sum(0), outputs.features.square().sum(0)]), "test")
    (means / sum(sizes)).square().sum().backward()
    return {name: parameter.grad for name, parameter in detector.named_parameters()}, dict(detector.named_buffers())


def train_each(comm, sizes, norm):
    return {layout: train_detector(comm, sizes, norm, layout) for layout in LAYOUTS}


@pytest.mark.parametrize(("norm", "equal"), [("synced", True), ("local", False)])
def test_a_whole_detector_under_ddp_equals_one_rank(norm, equal):
    sizes = (3, 4, 2)
    whole = train_each(Communicator(), (sum(sizes),), "local")

    def close(actual, expected):
        return torch.allclose(actual, expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item() + 1e-12)

    for rank in run_ranks(3, train_each, sizes, norm):
        for layout, (actual, statistics) in rank.items():
            gradients, buffers = whole[layout]
            assert all(close(actual[name], expected) for name, expected in gradients.items()) == equal, layout
            moved = [close(statistics[name].double(), expected.double()) for name, expected in buffers.items()]
            assert all(moved) == equal, layout
