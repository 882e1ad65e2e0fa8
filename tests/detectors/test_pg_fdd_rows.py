"""PG-FDD's detector: AdaIN and the decoder by definition, rows that know nothing of each other, real ranks."""

import itertools

import pytest
import torch
from torch import nn

from dist_fair.collectives import Communicator
from dist_fair.detectors.conditional_decoder import ConditionalDecoder, adain
from dist_fair.errors import DistFairError
from tests.detectors.images import LAYOUTS, both_layouts
from tests.detectors.pg_fdd_detectors import build, everything, of_patches, pictures
from tests.ranks import run_ranks

torch.set_num_threads(1)


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


@both_layouts
@pytest.mark.parametrize("place", ["features", "logits"])
def test_dropout(layout, place):
    detector = of_patches(heads={"dropout": 0.5, "dropout_on": place})
    images, keys = pictures(1, 32, layout).expand(64, -1, -1, -1), torch.arange(64)
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


@both_layouts
def test_every_place_drops_other_elements(layout, monkeypatch):
    """Heads, and the stages of the decoder on either path, each with other numbers for the same key."""
    from dist_fair.detectors import conditional_decoder, pg_fdd

    seen = []

    def noted(x, rate, keys):
        seen.append(keys[0].item())
        return x

    monkeypatch.setattr(pg_fdd, "dropout", noted)
    monkeypatch.setattr(conditional_decoder, "dropout", noted)
    everything(of_patches(), pictures(2, layout=layout), torch.arange(2))
    assert len(seen) == len({*seen}) == 4 + 2 * 5


@both_layouts
def test_rows_do_not_know_each_other(layout):
    detector, images, keys = build(), pictures(6, layout=layout), torch.tensor([5, 3, 9, 1, 8, 2])
    whole = everything(detector, images, keys)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    permuted = everything(detector, images[order], keys[order])
    parts = [everything(detector, images[rows], keys[rows]) for rows in (slice(0, 1), slice(1, 6))]
    for name, value in whole.items():
        torch.testing.assert_close(permuted[name], value[order], rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=0, atol=1e-12)


def test_memory_formats_are_the_same_images():
    """Dropout, too, which is drawn for each element of a map."""
    detector, keys = build(heads={"dropout": 0.5}, decoder={"dropout": 0.5}), torch.arange(4)
    one, other = (everything(detector, pictures(4, 32, layout), keys) for layout in LAYOUTS)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-12)


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


@both_layouts
def test_reconstructions_for_a_gallery(layout):
    detector, images, partners = build(norm="synced"), pictures(layout=layout), torch.tensor([2, 3, 0, 1])
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


@both_layouts
def test_half_precision_reaches_the_decoder(layout, monkeypatch):
    detector, types = build(double=False), []
    detector.decoder.rgb.register_forward_hook(lambda *arguments: types.append(arguments[-1].dtype))
    for head in detector.heads.values():  # small, and margins need digits
        head[-1].register_forward_hook(lambda *arguments: types.append(arguments[-1].dtype))
    for half in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=half == torch.bfloat16):
            outputs = detector.extract(pictures(2, layout=layout).float(), torch.arange(2))
        assert [types.pop() for _ in detector.heads] == [torch.float32] * 3
        code, condition = (outputs.extras[name].float() for name in ("code", "condition"))
        images = outputs.decode(code, condition, torch.arange(2))
        assert types.pop() == half
        logits = [value for name, value in outputs.extras.items() if name.endswith("logits")]
        assert {value.dtype for value in (images, outputs.features, *logits)} == {torch.float32}
        (images.mean() + outputs.features.mean()).backward()


class Objective(nn.Module):
    """A loss of all outputs over the whole batch, by sums over ranks."""

    def __init__(self, detector, comm, count):
        super().__init__()
        self.detector, self.comm, self.count = detector, comm, count

    def forward(self, images, keys):
        found = everything(self.detector, images, keys)
        sums = torch.stack([value.tanh().square().flatten(1).mean(dim=1).sum() for value in found.values()])
        return (self.comm.replicated_sum(sums, "test") / self.count).square().sum()


def train(comm, sizes, norm, keyed_by, layout):
    """Gradients as real DDP averages them, fp64."""
    detector = build(comm=comm, norm=norm)
    objective = Objective(detector, comm, sum(sizes))
    wrapped = nn.parallel.DistributedDataParallel(objective) if comm.world > 1 else objective
    start = sum(sizes[: comm.rank])
    rows = slice(start, start + sizes[comm.rank])
    keys = torch.arange(sum(sizes))[rows] if keyed_by == "sample" else torch.arange(sizes[comm.rank])
    loss = wrapped(pictures(sum(sizes), 32, layout)[rows], keys)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in detector.named_parameters()}


def train_each(comm, sizes, norm, keyed_by):
    return {layout: train(comm, sizes, norm, keyed_by, layout) for layout in LAYOUTS}


@pytest.mark.parametrize(
    ("norm", "keyed_by", "equal"),
    [("synced", "sample", True), ("frozen", "sample", True), ("local", "sample", False), ("frozen", "row", False)],
)
def test_a_step_on_two_ranks_is_a_step_on_one(norm, keyed_by, equal):
    """With norms per rank, or dropout by the place of a row on its rank, it is not."""
    sizes = (2, 3)
    whole = train_each(Communicator(), (sum(sizes),), "frozen" if norm == "frozen" else "local", "sample")

    def close(actual, expected):
        return torch.allclose(actual, expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item() + 1e-12)

    for rank in run_ranks(2, train_each, sizes, norm, keyed_by):
        for layout, (found, actual) in rank.items():
            loss, gradients = whole[layout]
            same = [close(actual[name], expected) for name, expected in gradients.items()]
            assert all([close(found, loss), *same]) == equal, layout
