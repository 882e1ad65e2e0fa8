"""The arithmetic of a sample: counted as by hand, of the detector alone, and without leaving a trace."""

import pytest
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.engine.device import flops
from dist_fair.engine.device.flops import flops_per_sample, known_peak
from dist_fair.engine.module import TrainingModule
from dist_fair.interventions.base import Intervention
from dist_fair.recipe.schema import Sam
from tests.engine.sharpness_worlds import Run, Small, build, plan

SIDE = 8
ATTRIBUTES = ("gender", "race")
FORWARD = 2 * SIDE**2 * 8 * (3 * 9 + 8 * 9) + 2 * 8 * 2  # of Small: two convolutions of 3 x 3, 8 features, 2 logits


def module(methods="moments", precision="fp32"):
    return build(Run(Sam(), methods=methods, precision=precision), plan(), Communicator())


@pytest.mark.parametrize("methods", ["moments", "pairs"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_that_of_the_detector_whatever_is_learned(methods, precision):
    assert flops_per_sample(module(methods, precision), SIDE, ATTRIBUTES) == 3 * FORWARD


def test_it_grows_with_the_image():
    assert flops_per_sample(module(), 2 * SIDE, ATTRIBUTES) == 3 * (4 * (FORWARD - 32) + 32)


def test_the_module_stays_as_it_is():
    made = module()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    drawn = torch.random.get_rng_state()
    flops_per_sample(made, SIDE, ATTRIBUTES)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert made.comm.drain() == {}
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.parametrize("benchmark", [False, True])
def test_numerics_stay_as_they_are(monkeypatch, benchmark):
    def switches():
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return (cudnn.benchmark, cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32,
                torch.get_float32_matmul_precision())  # fmt: skip

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    before, seen, made = switches(), [], module()
    made.detector.first.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    flops_per_sample(made, SIDE, ATTRIBUTES)
    assert switches() == before
    assert seen == [False]


def test_the_module_itself_would_not(monkeypatch):
    """Planted: no copy. Its norm has seen two black images then."""
    monkeypatch.setattr(flops, "_twin", lambda module: module)
    made = module()
    before = made.detector.norm.running_var.clone()
    flops_per_sample(made, SIDE, ATTRIBUTES)
    assert not torch.equal(made.detector.norm.running_var, before)


class Decoding(Small):
    """A detector with a decoder, a matrix of 8 x 8."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d)
        self.decoder = nn.Linear(8, 8, bias=False)

    def extract(self, images, keys=None):
        outputs = super().extract(images, keys)
        outputs.decode = lambda code, condition, keys=None: self.decoder(code)
        return outputs


class Rebuilding(Intervention):
    """Decodes twice, and does arithmetic of its own, which is not the detector's."""

    def __init__(self):
        nn.Module.__init__(self)
        self.settings, self.reads = None, ("code",)

    def summarise(self, outputs, batch, weights):
        for _ in range(2):
            outputs.decode(outputs.features, outputs.features)
        outputs.features @ outputs.features.T
        return {}


def test_a_decoder_counts_as_often_as_it_is_asked():
    made = TrainingModule(Decoding(), nn.ModuleDict({"rebuilding": Rebuilding()}), Communicator())
    made._objectives = lambda summaries, active: (torch.zeros(()), {})
    assert flops_per_sample(made, SIDE, ()) == 3 * (FORWARD + 2 * 2 * 8 * 8)


def test_a_detector_that_cannot_run_has_none():
    made = module()
    made.detector.first = nn.Conv2d(4, 8, 3)
    assert flops_per_sample(made, SIDE, ATTRIBUTES) is None


@pytest.mark.parametrize(
    ("card", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 67),
        ("NVIDIA H100 80GB HBM3", "fp64", False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, None),
        ("NVIDIA H100 PCIe", "bf16", False, 756),
        ("NVIDIA H200", "bf16", False, 989),
        ("NVIDIA H200 NVL", "bf16", False, 835),
        ("NVIDIA GH200 480GB", "bf16", False, None),
        ("NVIDIA B200", "bf16", False, 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312),
        ("NVIDIA A100 80GB PCIe", "fp32", True, 156),
        ("NVIDIA A100-SXM-64GB", "bf16", False, None),
        ("NVIDIA A10", "bf16", False, 125),
        ("NVIDIA A10G", "bf16", False, None),
        ("Tesla V100-SXM2-32GB", "bf16", False, None),
        ("Tesla V100-PCIE-16GB", "fp32", False, 14.0),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
    ],
)
def test_peaks_are_those_of_the_very_card(card, precision, tf32, peak):
    assert known_peak(card, precision, tf32) == peak
