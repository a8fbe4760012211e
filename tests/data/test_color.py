"""Colour operations against colorsys, SciPy and torchvision, and the moments of their draws."""

import colorsys

import numpy as np
import pytest
from scipy import ndimage

from deeplab_jax.config import AugmentConfig
from deeplab_jax.data import color

OFF = 0.75  # a draw at which a step of `photometric` is left out
ORDERS = {"brightness": (0, 1, 2, 3), "hue": (3, 2, 1, 0), "contrast": (1, 3, 0, 2)}


def picture(seed=0, shape=(12, 15)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def changed(operation, image, *arguments):
    result = image.copy()
    operation(result, *arguments)
    return result


def levels(values):
    return np.clip(np.rint(values), 0, 255)


def in_hsv(image, degrees=0.0, factor=1.0):
    """Changes hue and saturation by colorsys, in float64."""

    def change(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel / 255)
        return colorsys.hsv_to_rgb((hue + degrees / 360) % 1, min(saturation * factor, 1), value)

    return 255 * np.apply_along_axis(change, 2, image)


def luma(image):
    return image @ np.array([0.299, 0.587, 0.114])


def assert_close(ours, theirs, largest, mean):
    error = np.abs(ours.astype(float) - theirs)
    assert ours.dtype == np.uint8
    assert error.max() <= largest
    assert error.mean() <= mean


# --- Photometric distortion --------------------------------------------------------------------


def photometric_draws(brightness=None, contrast=None, saturation=None, hue=None, order=0.0):
    values = (brightness, contrast, saturation, hue)
    on = [OFF if value is None else 0.0 for value in values]
    return np.array([*on, *(0.0 if value is None else value for value in values), order])


@pytest.mark.parametrize(("draw", "shift"), [(0.0, -32), (0.25, -16), (1 - 2**-53, 32)])
def test_brightness(draw, shift):
    ours = changed(color.photometric, picture(), photometric_draws(brightness=draw))
    np.testing.assert_array_equal(ours, levels(picture().astype(int) + shift))


@pytest.mark.parametrize("order", [0.0, 0.9])
@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.5), (0.3, 0.8), (1 - 2**-53, 1.5)])
def test_contrast_follows_brightness(draw, factor, order):
    draws = photometric_draws(brightness=0.9, contrast=draw, order=order)
    ours = changed(color.photometric, picture(), draws)
    brighter = levels(picture() + 25.6)
    np.testing.assert_array_equal(ours, levels(brighter * factor))


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.5), (1 - 2**-53, 1.5)])
def test_saturation_is_that_of_hsv(draw, factor):
    ours = changed(color.photometric, picture(), photometric_draws(saturation=draw))
    assert_close(ours, in_hsv(picture(), factor=factor), 8, 1)


@pytest.mark.parametrize(("draw", "degrees"), [(0.0, -36), (0.75, 18), (1 - 2**-53, 36)])
def test_hue_is_that_of_hsv(draw, degrees):
    ours = changed(color.photometric, picture(), photometric_draws(hue=draw))
    assert_close(ours, in_hsv(picture(), degrees), 6, 1)


def test_contrast_comes_before_or_after_saturation_and_hue():
    early, late = (
        changed(color.photometric, picture(), photometric_draws(None, 1.0, 0.0, 0.25, order))
        for order in (0.4, 0.6)
    )
    assert_close(early, in_hsv(levels(1.5 * picture()), -18, 0.5), 6, 1)
    assert_close(late, levels(1.5 * levels(in_hsv(picture(), -18, 0.5))), 9, 1.5)
    assert np.abs(early.astype(int) - late).max() > 20


def test_without_steps_nothing_changes():
    ours = changed(color.photometric, picture(), photometric_draws())
    np.testing.assert_array_equal(ours, picture())


def test_moments_of_photometric_draws():
    """On grey 128 the result is (128 + b) c, without clipping; b is in -32..32, c in 0.5..1.5.

    Each differs from 0 and 1 with probability 1/2: E[b^2] = 32^2 / 6, E[c^2] = 1 + 0.5^2 / 6.
    """
    rng, grey = np.random.default_rng(0), np.full((1, 1, 3), 128, np.uint8)
    results = [float(changed(color.photometric, grey, rng.random(9)).mean()) for _ in range(4000)]
    deviation = np.sqrt((1 + 0.5**2 / 6) * (128**2 + 32**2 / 6) - 128**2)
    assert np.mean(results) == pytest.approx(128, abs=4 * deviation / np.sqrt(4000))
    assert np.std(results) == pytest.approx(deviation, rel=0.05)
    assert np.mean(np.array(results) == 128) == pytest.approx(1 / 4, abs=0.05)


# --- Colour jitter -----------------------------------------------------------------------------


def jitter_reference(image, strength, draws):
    """The four steps in float64, in the order of the last four draws."""
    image = image.astype(float)
    for step in sorted(range(4), key=lambda index: draws[4 + index]):
        change = strength * (2 * draws[step] - 1)
        if step == 3:
            image = in_hsv(image, 90 * change)
        else:
            grey = luma(image)
            other = (0, grey.mean(), grey[:, :, None])[step]
            image = (1 + change) * image - change * other
        image = np.clip(image, 0, 255)
    return image


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_color_jitter_is_the_float64_reference(order, strength):
    rng = np.random.default_rng(1)
    for _ in range(5):
        draws = np.concatenate([rng.random(4), np.argsort(order) / 4])
        ours = changed(color.color_jitter, picture(), strength, draws)
        assert_close(ours, jitter_reference(picture(), strength, draws), 14, 1.6)


@pytest.mark.parametrize(
    ("step", "name", "largest"),
    [(0, "brightness", 1), (1, "contrast", 1), (2, "saturation", 2), (3, "hue", 6)],
)
@pytest.mark.parametrize("draw", [0.0, 0.2, 0.9])
def test_each_step_of_color_jitter_is_torchvisions(step, name, largest, draw):
    reference = pytest.importorskip("torch_reference")
    functional = getattr(reference.torchvision.transforms.functional, f"adjust_{name}")
    change = 0.8 * (2 * draw - 1)
    pixels = reference.torch.from_numpy(picture().transpose(2, 0, 1).copy())
    theirs = functional(pixels, change / 4 if name == "hue" else 1 + change)
    draws = np.full(8, 0.5)
    draws[step] = draw
    ours = changed(color.color_jitter, picture(), 0.8, draws)
    # torchvision rounds down; OpenCV's hue has 180 steps.
    assert_close(ours, theirs.numpy().transpose(1, 2, 0), largest, 0.9)


def test_moments_of_color_jitter():
    """Contrast, saturation and hue leave a grey image: what remains is the factor of brightness."""
    rng, grey = np.random.default_rng(0), np.full((1, 1, 3), 100, np.uint8)
    results = [
        float(changed(color.color_jitter, grey, 0.6, rng.random(8)).mean()) for _ in range(2000)
    ]
    assert np.mean(results) == pytest.approx(100, abs=4 * 60 / np.sqrt(3 * 2000))
    assert np.std(results) == pytest.approx(60 / np.sqrt(3), rel=0.05)
    assert min(results) >= 40
    assert max(results) <= 160


# --- Grey, blur, channels ----------------------------------------------------------------------


def test_gray():
    ours = changed(color.gray, picture())
    assert_close(ours, np.repeat(luma(picture())[:, :, None], 3, axis=2), 0.51, 0.3)


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 9])
@pytest.mark.parametrize(("draw", "sigma"), [(0.0, 0.1), (0.5, 1.05), (1 - 2**-53, 2.0)])
def test_blur_is_scipys(channels, draw, sigma):
    image = np.random.default_rng(0).integers(0, 256, (31, 40, channels), np.uint8)
    expected = ndimage.gaussian_filter(
        image.astype(float), (sigma, sigma, 0), mode="mirror", truncate=3
    )
    assert_close(changed(color.blur, image, draw), expected, 2, 0.4)


@pytest.mark.parametrize("seed", range(5))
def test_a_grey_image_changes_as_one_of_equal_channels(seed):
    image = picture(seed)[:, :, :1]
    config = AugmentConfig(photometric=1.0, color_jitter=0.5, gray=1.0, blur=1.0)
    grey, repeated = image.copy(), np.repeat(image, 3, axis=2)
    for each in (grey, repeated):
        color.distort(each, config, np.random.default_rng(seed))
    np.testing.assert_array_equal(np.repeat(grey, 3, axis=2), repeated)
    assert (grey != image).any()


@pytest.mark.parametrize("field", ["photometric", "gray", "blur"])
def test_probabilities(field):
    rng, count = np.random.default_rng(0), 0
    for _ in range(500):
        image = picture()
        color.distort(image, AugmentConfig(**{field: 0.3}), rng)
        count += (image != picture()).any()
    # Of photometric distortions one in 16 does nothing.
    expected = 150 * (15 / 16 if field == "photometric" else 1)
    assert count == pytest.approx(expected, abs=4 * np.sqrt(500 * 0.3 * 0.7))


def test_operations_write_into_their_image_only():
    rows = np.stack([picture(seed, (16, 16)) for seed in range(3)])
    before = rows.copy()
    config = AugmentConfig(photometric=1.0, color_jitter=0.5, gray=1.0, blur=1.0)
    color.distort(rows[1], config, np.random.default_rng(0))
    np.testing.assert_array_equal(rows[::2], before[::2])
    assert (rows[1] != before[1]).any()
