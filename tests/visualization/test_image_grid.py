"""Pictures in rows and columns."""

import numpy as np
import pytest

from deeplab_jax.data import labels
from deeplab_jax.visualization.overlays import GAP, image_grid, prediction_grid


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_predictions_of_any_sizes_and_channels(channels):
    rng = np.random.default_rng(0)
    rows = []
    for height, width in [(5, 9), (1, 1), (600, 400)]:
        image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        ids = rng.integers(0, 21, (height, width), dtype=np.uint8)
        rows.append(("naïve name", image, ids, ids))
    sheet = prediction_grid(rows, labels.VOC)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1:] == (3 * 240 + 4 * 8, 3)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100


def test_pictures_are_in_their_rows_and_columns_below_their_titles():
    first, second, third = (np.full((h, 30, 3), h, np.uint8) for h in (10, 20, 40))
    titled = image_grid([("a title that is too long", first), ("", second), ("", third)], 2, 30)
    plain = image_grid([("", first), ("", second), ("", third)], 2, 30)
    title = titled.shape[0] - plain.shape[0]
    assert plain.shape == (20 + GAP + 40 + GAP, 2 * 30 + 3 * GAP, 3)
    assert np.all(plain[:10, GAP : GAP + 30] == 10)
    assert np.all(plain[:20, 2 * GAP + 30 : -GAP] == 20)
    assert np.all(plain[20 + GAP : -GAP, GAP : GAP + 30] == 40)
    assert np.array_equal(titled[title:], plain)
    assert (titled[:title, : GAP + 30] < 100).any()
    assert (titled[:title, GAP + 30 :] == 255).all()  # the title is cut to its column


def test_no_pictures_are_an_empty_grid():
    assert image_grid([], 2, 30).shape == (0, 2 * 30 + 3 * GAP, 3)
