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
)
def test_label_stays_on_the_image(seed, shape, crop, scale, axis):
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
    """A generator whose next draws are given."""

    def __init__(self, *draws):
        self._draws = draws

    def random(self, count):
        assert count == len(self._draws)
        return np.array(self._draws)


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


def test_a_crop_depends_only_on_the_generator():
    image, label = random_example(np.random.default_rng(1), (60, 70), 3)
    kwargs = {"crop": (33, 33), "scale_range": (0.5, 2.0), "flip": True}
    kwargs["fill"] = np.zeros(3, np.uint8)
    one, two, other = (
        augment(image, label, np.random.default_rng(seed), **kwargs) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert (one[0] != other[0]).any()


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
