"""Augmentation: what each change does, and that its numbers are nobody else's."""

from types import SimpleNamespace

import numpy as np
import pytest

from dist_fair.data.augment import DRAWS, FLIP, SHIFT_X, SHIFT_Y, augment, draws
from tests.data.making import picture

NOTHING = {"flip": 0.0, "shift": 0.0, "brightness": 0.0, "contrast": 0.0, "noise": 0.0, "blur": 0.0, "jpeg": 0.0}
STRONG = {"flip": 1.0, "shift": 0.3, "brightness": 0.5, "contrast": 0.5, "noise": 0.2, "blur": 1.0, "jpeg": 1.0}
IMAGE = picture(3, 48)


def settings(jpeg_quality=(50, 95), **changes):
    return SimpleNamespace(**{**NOTHING, **changes}, jpeg_quality=list(jpeg_quality))


def drawn(sample=0, seed=0, epoch=0):
    return draws(seed, np.array([epoch]), np.array([sample]))[0]


def test_nothing_is_nothing():
    np.testing.assert_array_equal(augment(IMAGE, settings(), drawn()), IMAGE)


@pytest.mark.parametrize("name", list(STRONG))
def test_each_change_changes_and_repeats(name):
    one = augment(IMAGE, settings(**{name: STRONG[name]}), drawn(5))
    assert one.shape == IMAGE.shape
    assert one.dtype == np.uint8
    assert not np.array_equal(one, IMAGE)
    np.testing.assert_array_equal(augment(IMAGE.copy(), settings(**{name: STRONG[name]}), drawn(5)), one)


@pytest.mark.parametrize("name", [name for name in STRONG if name != "flip"])
def test_the_draws_differ_between_samples_epochs_and_seeds(name):
    chosen = settings(**{name: STRONG[name]}, jpeg_quality=(1, 100))
    results = {augment(IMAGE, chosen, drawn(*key)).tobytes() for key in ((1,), (2,), (1, 1), (1, 0, 1))}
    assert len(results) == 4


def test_switching_one_change_on_leaves_the_draws_of_the_others():
    """A stream of random numbers shared by all changes would shift: noise on, and another half of faces is flipped."""
    for sample in range(20):
        alone = augment(IMAGE, settings(flip=0.5), drawn(sample))
        flipped = np.array_equal(alone, IMAGE[:, ::-1])
        assert flipped == (drawn(sample)[FLIP] < 0.5)
        also = augment(IMAGE, settings(flip=0.5, brightness=1e-9, noise=1e-9), drawn(sample))
        np.testing.assert_array_equal(also, alone)


def test_flip_is_as_frequent_as_asked():
    table = draws(0, np.zeros(4000, dtype=int), np.arange(4000))
    assert table.shape == (4000, DRAWS)
    assert abs((table[:, FLIP] < 0.3).mean() - 0.3) < 0.03


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (0.999, 0.5), (0.5, 0.0), (0.5, 0.999), (0.1, 0.9)])
def test_shift_moves_whole_pixels_and_reflects_at_the_border(x, y):
    numbers = drawn()
    numbers[[SHIFT_X, SHIFT_Y]] = x, y
    across, down = round((2 * x - 1) * 12), round((2 * y - 1) * 12)
    padded = np.pad(IMAGE, ((12, 12), (12, 12), (0, 0)), mode="reflect")
    expected = padded[12 - down : 60 - down, 12 - across : 60 - across]
    np.testing.assert_array_equal(augment(IMAGE, settings(shift=0.25), numbers), expected)


def test_brightness_and_contrast_stay_within_their_bounds():
    grey = np.full((8, 8, 3), 100, dtype=np.uint8)
    means = [augment(grey, settings(brightness=0.2), drawn(sample)).mean() for sample in range(300)]
    assert 80 <= min(means) < 84
    assert 116 < max(means) <= 120
    halves = np.concatenate([grey[:4] - 40, grey[:4] + 40])
    spans = [np.ptp(augment(halves, settings(contrast=0.5), drawn(sample)).astype(int)) for sample in range(300)]
    assert 40 <= min(spans) < 44
    assert 116 < max(spans) <= 120


def test_noise_has_the_deviation_asked_for_at_most():
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    deviations = [augment(grey, settings(noise=0.1), drawn(sample)).std() / 255 for sample in range(100)]
    assert max(deviations) < 0.105
    assert max(deviations) > 0.09
    assert min(deviations) < 0.01


def test_jpeg_quality_reaches_both_ends():
    """One quality asked for is the one used: equal to OpenCV's own round trip, with red staying red."""
    import cv2

    _, code = cv2.imencode(".jpg", IMAGE[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 30])
    expected = cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(augment(IMAGE, settings(jpeg=1.0, jpeg_quality=(30, 30)), drawn()), expected)


def test_the_input_is_left_alone():
    before = IMAGE.copy()
    augment(IMAGE, settings(**STRONG), drawn(1))
    np.testing.assert_array_equal(IMAGE, before)


def test_the_recipe_s_settings_fit():
    from dist_fair.recipe.schema import Augmentation

    assert augment(IMAGE, Augmentation(**STRONG), drawn()).shape == IMAGE.shape
