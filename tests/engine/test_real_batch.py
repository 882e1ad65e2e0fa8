"""Every recipe, forward and backward, on what the loader really gives: bytes from shards, seen with the colours first.

A made-up batch is float, contiguous and NCHW; a real one is none of it until it is normalised, and then lies in memory
as (B, S, S, 3). What depends on that (kernels for one format, a view of the wrong strides) no made-up batch shows.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_fair import recipes
from dist_fair.collectives import Communicator
from dist_fair.data.loading import Scoring, training_loader
from dist_fair.data.prefetching import prefetched
from dist_fair.data.reading import Reader
from dist_fair.data.window import Window
from dist_fair.engine.assembly import assemble
from dist_fair.recipe import cards
from dist_fair.recipe.composition import load
from tests.command_line.runs import draw

END = math.nextafter(1.0, 0.0)  # delays and ramps are over: all parts of a recipe act
QUICK = ["train.batch_size=16", "train.steps=20", "data.window=8", "data.augment.jpeg=0.5"]
SMALL = ["detector=small", "detector.arguments.channels=[8, 16, 32, 64]", "data.image_size=64"]
DISENTANGLED = ["detector=pg_fdd", "detector.arguments.channels=[8, 8, 16, 16]", "detector.arguments.width=16",
                "data.image_size=32"]  # fmt: skip
DECOUPLING = ["interventions.channel_decoupling.batch_size=30", "interventions.channel_decoupling.batches=1"]
RECIPES = {
    **dict.fromkeys(("erm", "ipw", "dag_fdd", "daw_fdd", "gda"), SMALL),
    "daid": [*SMALL, "interventions.low_rank_projection.rank=16"],
    "daid_release": [*SMALL, "interventions.low_rank_projection.rank=64"],
    **{name: [*SMALL, *DECOUPLING] for name in ("sfd", "sfd_gda")},
    "pg_fdd": DISENTANGLED,
    "pg_fdd_release": [*DISENTANGLED, "detector.arguments={pooling: average, heads: {dropout_on: logits}}"],
}
BACKBONES = ("_xception", "_resnet50", "_efficientnet_b3", "_efficientnet_b4")


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """60 images in shards, and their card."""
    root = tmp_path_factory.mktemp("shards")
    draw(root / "train", 60, seed=1)
    path = root / "card.yaml"
    path.write_text(
        f"name: drawn\nroot: {root}\ntrain: [train]\neval: [train]\nimage_size: 64\n"
        "attributes:\n  gender: [female, male]\n  race: [Asian, Black, White]\n"
    )
    return path


class Run:
    """A recipe's module and first batch, as training has them before its first step."""

    def __init__(self, card, name, precision, workers=0):
        torch.set_num_threads(1)
        chosen = [f"recipe={name}", f"data={card}", *RECIPES[name], *QUICK, f"train.precision={precision}"]
        self.recipe = load(chosen, recipes.interventions()).recipe
        self.comm, device, data = Communicator(), torch.device("cpu"), self.recipe.data
        parts = assemble(self.recipe, self.comm)
        self.module = parts.module.to(device)
        self.module.train()
        for parameter in self.module.parameters():
            if not parameter.any():  # so timm begins the last norm of a block, and what is before it has no gradient
                nn.init.uniform_(parameter, 0.2, 0.4)
        reader = Reader(parts.index, data.image_size, data.bad_samples, data.max_pixels, self.recipe.seed)
        self.scoring = Scoring(reader, 0, 1, device, data.mean, data.std, parts.plan.samples)
        loader = training_loader(parts.plan, reader, 0, 1, 0, 2, workers, data.augment, device)
        self.batch, _ = prefetched(loader.packed(), device, data.mean, data.std)

    def restructured(self):
        """Once, with the batches that channels are scored on."""
        for part in self.module.interventions.values():
            for step in [step for step in range(self.recipe.train.steps) if part.restructures(step)][:1]:
                part.restructure(step, self.module.detector, self.scoring, self.comm)

    def gradients(self, images, layout=None):
        """The loss and the gradient of every parameter that is trained, with these images for those of the batch."""
        module = copy.deepcopy(self.module)
        if layout is not None:  # as weights and images lie on a GPU
            module = module.to(memory_format=layout)
            module.layout = layout
        losses = module(Window([replace(self.batch, images=images)]), END)
        losses.loss.backward()
        found = {"loss": losses.loss.detach()}
        return found | {name: one.grad for name, one in module.named_parameters() if one.requires_grad}


def check_images(run):
    images, side = run.batch.images, run.recipe.data.image_size
    assert images.shape == (16, 3, side, side)
    assert images.stride() == (3 * side * side, 1, 3 * side, 3)
    assert not images.is_contiguous()
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_every_recipe_is_here():
    """Those that are not differ from one that is by their backbone and their data alone."""
    others = {*cards.names("recipe")} - {*RECIPES}
    assert [name for name in others if not name.endswith(BACKBONES)] == []


@pytest.mark.parametrize("name", RECIPES)
def test_forward_and_backward_on_the_loaders_batch(card, name):
    run = Run(card, name, "fp64")
    check_images(run)
    assert all(part.begun(END) for part in run.module.interventions.values())
    assert all(part.weight(END) > 0 for part in run.module.interventions.values() if part.terms)
    run.restructured()
    masked = (run.module.detector.channel_mask == 0).any().item()
    assert masked == ("channel_decoupling" in run.recipe.interventions)
    real = run.gradients(run.batch.images)
    assert all(value is not None and value.isfinite().all() for value in real.values()), [*real]
    assert sum(value.abs().max() > 0 for value in real.values()) > 0.9 * len(real)
    # The same values in another order in memory, or through weights in the images' order, are the same step.
    contiguous = run.gradients(run.batch.images.contiguous())
    everywhere = run.gradients(run.batch.images, torch.channels_last)
    for other in (contiguous, everywhere):
        for key, value in real.items():
            scale = max(value.abs().max().item(), 1.0)
            torch.testing.assert_close(other[key], value, rtol=1e-10, atol=1e-10 * scale, msg=f"{name}: {key}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sfd_gda", "pg_fdd"])
def test_workers_and_the_precisions_that_are_trained_in(card, name, precision):
    run = Run(card, name, precision, workers=2)
    check_images(run)
    assert torch.equal(run.batch.images, Run(card, name, precision).batch.images)
    found = run.gradients(run.batch.images)
    assert all(value is not None and value.isfinite().all() for value in found.values()), [*found]
