"""The gallery shows what it is given, in its place; the faces in it are pairs that exchange their forgery."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_fair.data.index import Column
from dist_fair.data.reading import Images
from dist_fair.engine.reconstructions import PAIRS, reconstructions
from dist_fair.reporting.gallery import COLUMNS, draw, gallery

SIZE = 8
HALF = [0.5] * 3


def faces(count):
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8) for _ in COLUMNS]


def test_every_image_is_in_its_row_and_column(tmp_path):
    columns, names = faces(4), [f"face {number}" for number in range(4)]
    drawing = gallery(columns, names)
    axes = np.array(drawing.axes).reshape(4, len(COLUMNS))
    for row, column in np.ndindex(axes.shape):
        np.testing.assert_array_equal(axes[row, column].images[0].get_array(), columns[column][row])
    assert [ax.get_title() for ax in axes[0]] == list(COLUMNS)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == names
    png, svg = draw(columns, names, "near", tmp_path)
    assert (png.name, svg.name) == ("near-reconstructions.png", "near-reconstructions.svg")
    assert np.asarray(Image.open(png)).std() > 10


class Half(torch.nn.Module):
    """Rebuilds an image half as far from grey as it was, plus, where the forgery is another's, a tenth of that one."""

    def __init__(self):
        super().__init__()
        self.decoder, self.weight = object(), torch.nn.Parameter(torch.zeros(1))

    def reconstruct(self, images, partners):
        assert not self.training
        return images / 2, images / 2 + images[partners] / 10


def reader(labels, bad=()):
    labels = np.array(labels)
    pixels = np.random.default_rng(1).integers(0, 256, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    manipulations = np.where(labels == 1, np.arange(len(labels)) % 2, -1)
    index = SimpleNamespace(
        labels=labels,
        manipulations=Column(("blend", "swap"), manipulations),
        attributes={"gender": Column(("female", "male"), np.arange(len(labels)) % 3 - 1)},
    )

    def read(samples, epochs, replace):
        shown = np.where(np.isin(samples, bad), -1, samples)
        return Images(np.where(shown[:, None, None, None] < 0, 0, pixels[samples]).astype(np.uint8), shown, [])

    return SimpleNamespace(index=index, read=read), pixels


@pytest.mark.parametrize("training", [True, False])
def test_reals_and_fakes_exchange_their_forgery(training):
    source, pixels = reader([0, 1] * 10)
    module = torch.nn.Module()
    module.detector = Half()
    module.train(training)
    columns, names = reconstructions(module, source, HALF, HALF)
    assert module.training == training
    assert len(names) == 2 * PAIRS
    assert [name.split("\n")[0] in ("blend", "swap") for name in names] == [False, True] * PAIRS
    rows = [int((pixels == image).all((1, 2, 3)).argmax()) for image in columns[0]]
    assert rows[0] < 7 < rows[-1]  # from all over the data
    partners = [row ^ 1 for row in range(2 * PAIRS)]
    np.testing.assert_array_equal(columns[3], columns[0][partners])
    plain = columns[0] / 127.5 - 1
    np.testing.assert_allclose(columns[1] / 127.5 - 1, plain / 2, atol=5e-3)
    np.testing.assert_allclose(columns[2] / 127.5 - 1, plain / 2 + plain[partners] / 10, atol=5e-3)


def test_unreadable_faces_go_with_their_partners_and_without_any_there_is_no_gallery():
    module = torch.nn.Module()
    module.detector = Half()
    source, _ = reader([0, 1] * 3, bad=[2])
    assert len(reconstructions(module, source, HALF, HALF)[1]) == 4
    assert reconstructions(module, reader([0, 0])[0], HALF, HALF) is None
    assert reconstructions(module, reader([0, 1], bad=[0])[0], HALF, HALF) is None
    module.detector.decoder = None
    assert reconstructions(module, source, HALF, HALF) is None
