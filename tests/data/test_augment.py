"""The warp against a float64 reference, image against label, and the statistics of the draws."""

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplab_jax.data.augment import augment, crop_matrix, warp
from deeplab_jax.data.labels import IGNORE


def reference_coordinates(scale, top, left, crop, mirror):
    """Where the pixel centres of a crop lie in the image, on axes that start at its corner."""
    rows = (top + np.arange(crop[0]) + 0.5) / scale
    columns = (left + np.arange(crop[1]) + 0.5) / scale
    return rows, columns[::-1] if mirror else columns


def reference_image(image, fill, rows, columns):
    """Bilinear, the image lying on an endless plane of `fill`; float64."""
    height, width, _ = image.shape
    plane = np.tile(np.float64(fill), (height + 2, width + 2, 1))
    plane[1:-1, 1:-1] = image
    result = np.zeros((len(rows), len(columns), image.shape[2]))
    for (i, y), (j, x) in itertools.product(enumerate(rows + 0.5), enumerate(columns + 0.5)):
        top, left = int(np.floor(y)), int(np.floor(x))
        for row, column in itertools.product((top, top + 1), (left, left + 1)):
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            inside = 0 <= row < height + 2 and 0 <= column < width + 2
            result[i, j] += weight * (plane[row, column] if inside else fill)
    return result


def reference_label(label, rows, columns):
    """The label of the pixel that a point lies in, and whether it is clear which one that is."""
    height, width = label.shape
    result = np.full((len(rows), len(columns)), IGNORE)
    for (i, y), (j, x) in itertools.product(enumerate(rows), enumerate(columns)):
        if 0 <= y < height and 0 <= x < width:
            result[i, j] = label[int(y), int(x)]
    from_edge = [np.abs(points - np.rint(points)) for points in (rows, columns)]
    return result, np.minimum(from_edge[0][:, None], from_edge[1]) > 0.01


def random_example(rng, shape, channels):
    image = rng.integers(0, 256, (*shape, channels), np.uint8)
    return image, rng.integers(0, 21, shape, np.uint8)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 9])
@pytest.mark.parametrize(
    ("shape", "crop", "scale", "top", "left"),
    [
        ((11, 17), (9, 7), 1.0, 1, 3),
        ((11, 17), (9, 7), 2.0, 8, 20),
        ((23, 17), (9, 7), 0.47, 1, 0),
        ((11, 17), (19, 21), 1.37, 0, 2),
        ((11, 17), (16, 40), 0.63, 0, 0),
        ((1, 1), (3, 4), 1.7, 0, 0),
    ],
)
def test_warp_is_the_float64_reference(shape, crop, scale, top, left, mirror, channels):
    rng = np.random.default_rng(channels)
    image, label = random_example(rng, shape, channels)
    fill = rng.integers(0, 256, channels, np.uint8)
    warped, warped_label = warp(
        image, label, crop_matrix(scale, top, left, crop[1], mirror), crop, fill
    )
    rows, columns = reference_coordinates(scale, top, left, crop, mirror)
    expected_label, clear = reference_label(label, rows, columns)
    # OpenCV rounds the weights to 1/32 pixel: 255/32 in each direction, at most.
    np.testing.assert_allclose(warped, reference_image(image, fill, rows, columns), atol=16.5)
    assert np.abs(warped - reference_image(image, fill, rows, columns)).mean() < 1.5
    assert warped.dtype == warped_label.dtype == np.uint8
    assert clear.any()
    np.testing.assert_array_equal(warped_label[clear], expected_label[clear])


@pytest.mark.parametrize("mirror", [False, True])
def test_a_crop_at_scale_1_is_a_copy(mirror):
    image, label = random_example(np.random.default_rng(0), (40, 50), 3)
    warped, warped_label = warp(
        image, label, crop_matrix(1.0, 5, 7, 30, mirror), (20, 30), np.zeros(3, np.uint8)
    )
    step = -1 if mirror else 1
    np.testing.assert_array_equal(warped, image[5:25, 7:37][:, ::step])
    np.testing.assert_array_equal(warped_label, label[5:25, 7:37][:, ::step])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(25, 60), st.integers(25, 60)),
    crop=st.tuples(st.integers(20, 100), st.integers(20, 100)),
    scale=st.floats(0.5, 2.0),
    axis=st.sampled_from([0, 1]),
    rotation=st.sampled_from([0.0, 15.0, 180.0]),
)
def test_label_stays_on_the_image(seed, shape, crop, scale, axis, rotation):
    """The image's colour ramps over its rows or columns, the label counts them.

    So the colour tells where a pixel came from, to a fraction of a pixel, and the label must be
    of that very place. A shift of half a pixel or a flip of one of the two shows.
    """
    step = 3  # of colour, a pixel of the image
    places = np.meshgrid(*map(np.arange, shape), indexing="ij")[axis]
    image = np.stack([40 + step * places, np.full(shape, 255)], axis=2).astype(np.uint8)
    warped, label = augment(
        image,
        places.astype(np.uint8),
        np.random.default_rng(seed),
        crop=crop,
        scale_range=(scale, scale),
        flip=True,
        fill=np.zeros(2, np.uint8),
        rotation=rotation,
    )
    whole = warped[:, :, 1] == 255  # nothing of the padding is mixed in
    error = (warped[:, :, 0].astype(float) - 40) / step - label
    assert whole.any()
    # Half a pixel to the nearest centre, half a colour, and OpenCV's weights in steps of 1/32.
    assert np.abs(error[whole]).max() <= 0.5 + 0.5 / step + 1 / 32


@pytest.mark.parametrize(("shape", "crop"), [((20, 30), (50, 70)), ((60, 80), (31, 17))])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_padding_is_at_the_bottom_and_right(shape, crop, scale):
    rng = np.random.default_rng(0)
    image, label = np.full((*shape, 3), 200, np.uint8), np.full(shape, 4, np.uint8)
    fill = np.array([10, 20, 30], np.uint8)
    for _ in range(20):
        warped, warped_label = augment(
            image, label, rng, crop=crop, scale_range=(scale, scale), flip=False, fill=fill
        )
        assert warped.shape == (*crop, 3)
        valid = [
            min(int(scale * side), crop_side) for side, crop_side in zip(shape, crop, strict=True)
        ]
        expected = np.full(crop, IGNORE)
        expected[: valid[0], : valid[1]] = 4
        np.testing.assert_array_equal(warped_label, expected)
        assert (warped[valid[0] + 1 :] == fill).all()
        assert (warped[:, valid[1] + 1 :] == fill).all()
        assert (warped[1 : valid[0] - 1, 1 : valid[1] - 1] == 200).all()


class Draws:
    """A generator whose draws are given, one after the other."""

    def __init__(self, *draws):
        self._draws = list(draws)

    def random(self, count=None):
        drawn = [self._draws.pop(0) for _ in range(count or 1)]
        return np.array(drawn) if count else drawn[0]


def crop_of_ramp(*draws, scale_range=(1.0, 1.0), flip=True):
    """First and last row and column of the ramp that the crop shows."""
    places = np.stack(np.meshgrid(np.arange(30), np.arange(40), indexing="ij"), axis=2)
    warped, _ = augment(
        (places * 6).astype(np.uint8),
        np.zeros((30, 40), np.uint8),
        Draws(*draws),
        crop=(20, 25),
        scale_range=scale_range,
        flip=flip,
        fill=np.zeros(2, np.uint8),
    )
    place = warped / 6
    return place[0, 0, 0], place[-1, 0, 0], place[0, 0, 1], place[0, -1, 1]


def test_crop_positions_are_uniform():
    draws = (np.arange(1100) + 0.5) / 1100  # 11 rows to start at, 16 columns
    rows = [crop_of_ramp(0, draw, 0, 1)[0] for draw in draws]
    np.testing.assert_array_equal(np.bincount(np.int64(rows), minlength=11), np.full(11, 100))
    columns = [crop_of_ramp(0, 0, draw, 1)[2] for draw in draws]
    assert set(np.bincount(np.int64(columns), minlength=16)) == {68, 69}


@pytest.mark.parametrize(("draw", "scale"), [(0, 1.0), (0.25, 1.25), (1 - 2**-53, 2.0)])
def test_scale_is_uniform_in_its_range(draw, scale):
    top, bottom, left, right = crop_of_ramp(draw, 0.5, 0.5, 1, scale_range=(1.0, 2.0))
    assert bottom - top == pytest.approx(19 / scale, abs=0.5)
    assert right - left == pytest.approx(24 / scale, abs=0.5)


def test_half_of_the_images_are_mirrored():
    for draw, mirrored in ((0, True), (0.499, True), (0.5, False), (0.99, False)):
        _, _, left, right = crop_of_ramp(0, 0, 0, draw)
        assert (left > right) == mirrored
        _, _, left, right = crop_of_ramp(0, 0, 0, draw, flip=False)
        assert left < right


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("shape", [(11, 17), (1, 1)])
def test_warp_fills_rows_of_a_batch(shape, channels):
    """The same bytes as OpenCV's own arrays, groups of channels joined, and nothing beside them."""
    rng = np.random.default_rng(channels)
    image, label = random_example(rng, shape, channels)
    fill, matrix = rng.integers(0, 256, channels, np.uint8), crop_matrix(1.3, 2, 1, 9, True)
    border = cv2.BORDER_CONSTANT
    groups = [
        cv2.warpAffine(
            np.ascontiguousarray(image[:, :, first : first + 4]),
            matrix,
            (9, 7),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=border,
            borderValue=fill[first : first + 4].tolist(),
        ).reshape(7, 9, -1)
        for first in range(0, channels, 4)
    ]
    nearest = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    expected_label = cv2.warpAffine(
        label, matrix, (9, 7), flags=nearest, borderMode=border, borderValue=IGNORE
    )
    images, labels = np.full((3, 7, 9, channels), 77, np.uint8), np.full((3, 7, 9), 77, np.uint8)
    warp(image, label, matrix, (7, 9), fill, (images[1], labels[1]))
    np.testing.assert_array_equal(images[1], np.concatenate(groups, axis=2))
    np.testing.assert_array_equal(labels[1], expected_label)
    assert (images[::2] == 77).all()
    assert (labels[::2] == 77).all()
    warped, warped_label = warp(image, label, matrix, (7, 9), fill)
    np.testing.assert_array_equal(warped, images[1], strict=True)
    np.testing.assert_array_equal(warped_label, labels[1], strict=True)


# --- Rotation ----------------------------------------------------------------------------------


def turned(image, draw, rotation, crop, mirror=False, scale=1.0):
    label = np.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2]) % 251
    warped, warped_label = augment(
        image,
        label.astype(np.uint8),
        Draws(0.0, 0.0, 0.0, 0.0, draw),
        crop=crop,
        scale_range=(scale, scale),
        flip=mirror,
        fill=np.zeros(3, np.uint8),
        rotation=rotation,
    )
    return warped, warped_label, label


@pytest.mark.parametrize(("draw", "turns"), [(0.0, 1), (1.0, -1)])
def test_a_quarter_turn(draw, turns):
    """By 90 degrees to each side; a draw of 1, which does not occur, is the other end."""
    image, _ = random_example(np.random.default_rng(0), (21, 21), 3)
    warped, warped_label, label = turned(image, draw, 90, (21, 21))
    np.testing.assert_array_equal(warped, np.rot90(image, turns))
    np.testing.assert_array_equal(warped_label, np.rot90(label, turns))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("crop", [(16, 12), (25, 40), (16, 40)])
def test_half_a_turn_is_about_the_centre_of_the_visible_part(crop, mirror):
    """An image that is smaller than the crop turns where it is, beside the padding."""
    image, _ = random_example(np.random.default_rng(0), (20, 30), 3)
    still, still_label, _ = turned(image, 0.5, 180, crop, mirror)
    warped, warped_label, _ = turned(image, 0.0, 180, crop, mirror)
    height, width = np.minimum(crop, (20, 30))
    columns = slice(crop[1] - width, None) if mirror else slice(width)
    for ours, before in ((warped, still), (warped_label, still_label)):
        expected = before.copy()
        expected[:height, columns] = before[:height, columns][::-1, ::-1]
        np.testing.assert_array_equal(ours, expected)


def test_centroids_of_image_and_label_are_where_the_draws_put_them():
    """Of a disc under scale, crop, flip and rotation.

    That of the image to 0.05 pixels; that of the label, which has whole pixels and so a standard
    deviation of 0.03, to 0.25; both to 0.02 on average.
    """
    y, x = np.mgrid[:121, :141]
    disc = np.clip(20.5 - np.hypot(y - 63, x - 72), 0, 1)  # radius 20, with a soft edge
    image, crop = np.rint(200 * disc)[:, :, None].astype(np.uint8), (160, 150)
    errors = []
    for seed in range(200):
        warped, label = augment(
            image,
            (disc > 0.5).astype(np.uint8),
            np.random.default_rng(seed),
            crop=crop,
            scale_range=(1.0, 2.0),
            flip=True,
            fill=np.zeros(1, np.uint8),
            rotation=180.0,
        )
        draws = np.random.default_rng(seed).random(5)
        scale = 1 + draws[0]
        sides = [int(scale * side) for side in image.shape[:2]]
        top, left = (
            int(draw * (max(side - length, 0) + 1))
            for draw, side, length in zip(draws[1:3], sides, crop, strict=True)
        )
        # As complex numbers x + iy in the crop, from its corner, before it is mirrored.
        point = scale * (72.5 + 63.5j) - complex(left, top)
        height, width = (min(scale * n, m) for n, m in zip((121, 141), crop, strict=True))
        centre = complex(width, height) / 2
        point = centre + (point - centre) * np.exp(1j * np.deg2rad(360 * draws[4] - 180))
        if draws[3] < 0.5:
            point = complex(crop[1] - point.real, point.imag)
        expected = np.array([point.imag - 0.5, point.real - 0.5])
        margin = 22 * scale
        if (expected > margin).all() and (expected < np.array(crop) - 1 - margin).all():
            weights = np.stack([warped[:, :, 0].astype(float), (label == 1).astype(float)])
            centroids = [(np.indices(crop) * each).sum((1, 2)) / each.sum() for each in weights]
            errors.append(np.array(centroids) - expected)
    assert len(errors) > 50
    assert np.abs(errors)[:, 0].max() < 0.05
    assert np.abs(errors)[:, 1].max() < 0.25
    assert np.abs(np.mean(errors, axis=0)).max() < 0.02


def test_angles_are_uniform_in_both_directions():
    """500 angles, read from the slope of a ramp."""
    ramp = np.repeat(np.arange(40, 140, dtype=np.uint8)[None], 100, axis=0)[:, :, None]
    rng, angles = np.random.default_rng(0), []
    for _ in range(500):
        warped, _ = augment(
            ramp,
            np.zeros((100, 100), np.uint8),
            rng,
            crop=(100, 100),
            scale_range=(1.0, 1.0),
            flip=False,
            fill=np.zeros(1, np.uint8),
            rotation=30.0,
        )
        rows, columns = np.gradient(warped[30:70, 30:70, 0].astype(float))
        angles.append(np.rad2deg(np.arctan2(rows.mean(), columns.mean())))
    quantiles = 30 * (2 * (np.arange(500) + 0.5) / 500 - 1)
    # Kolmogorov's bound at a probability of 1e-4.
    np.testing.assert_allclose(np.sort(angles), quantiles, atol=60 * 2.2 / np.sqrt(500))


# --- Crops bounded by the share of a class -----------------------------------------------------


def share(label):
    counts = np.bincount(label[label != IGNORE], minlength=1)
    return counts.max() / counts.sum() if counts.sum() else np.inf


def cropped_label(label, seed, max_class_share):
    """The label of a crop of 20 x 20 pixels at the image's own scale."""
    return augment(
        label[:, :, None],
        label,
        np.random.default_rng(seed),
        crop=(20, 20),
        scale_range=(1.0, 1.0),
        flip=False,
        fill=np.zeros(1, np.uint8),
        max_class_share=max_class_share,
    )[1]


@pytest.mark.parametrize("limit", [0.6, 0.75, 0.95])
def test_places_are_drawn_until_no_class_has_more_than_its_share(limit):
    """A plain loop over slices of the label, with the same draws."""
    label = np.zeros((60, 80), np.uint8)
    label[:, 52:] = 1
    label[:10] = IGNORE
    num_tries = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        place = rng.random(4)[1:3]
        num_tries.append(0)
        while num_tries[-1] < 10:
            num_tries[-1] += 1
            top, left = int(place[0] * 41), int(place[1] * 61)
            expected = label[top : top + 20, left : left + 20]
            if share(expected) <= limit:
                break
            place = rng.random(2)
        ours = cropped_label(label, seed, limit)
        np.testing.assert_array_equal(ours, expected)
    assert {1, 2, 10} <= set(num_tries)


def test_a_crop_with_a_valid_pixel_is_preferred():
    """Of a label that is valid on a third of its width, the first place mostly is not."""
    label = np.full((20, 300), IGNORE, np.uint8)
    label[:10, :100], label[10:, :100] = 0, 1
    valid = {1.0: 0, 0.75: 0}
    for limit, seed in itertools.product(valid, range(100)):
        ours = cropped_label(label, seed, limit)
        valid[limit] += (ours != IGNORE).any()
    assert valid[1.0] < 60
    assert valid[0.75] >= 95
