"""Pictures."""

import numpy as np
import pytest

from deeplab_jax.data import labels
from deeplab_jax.visualization import image_grid as visualize


def test_overlay_mixes_class_colours_and_leaves_the_ground_clear():
    table = labels.named("background", "a")
    image = np.full((2, 3, 3), 100, np.uint8)
    ids = np.array([[0, 1, 255], [1, 0, 0]], np.uint8)
    mixed = visualize.overlay(image, ids, table)
    np.testing.assert_array_equal(mixed[0, 1], [(100 + 128) // 2, 50, 50])
    np.testing.assert_array_equal(mixed[ids != 1], np.full((4, 3), 100))


def test_overlay_lays_colour_on_class_0_where_it_is_no_ground():
    ids = np.zeros((1, 1), np.uint8)
    mixed = visualize.overlay(np.zeros((1, 1, 3), np.uint8), ids, labels.CAMVID)
    np.testing.assert_array_equal(mixed[0, 0], [64, 64, 64])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_sheet_holds_any_sizes_and_channels(channels):
    rng = np.random.default_rng(0)
    rows = []
    for height, width in [(5, 9), (1, 1), (600, 400)]:
        image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        ids = rng.integers(0, 21, (height, width), dtype=np.uint8)
        rows.append(("naïve name", image, ids, ids))
    sheet = visualize.prediction_grid(rows, labels.VOC)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1:] == (3 * 240 + 4 * 8, 3)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100


def test_legend_shows_each_colour_and_breaks_lines():
    names = labels.VOC.names
    narrow = visualize.legend(list(range(21)), labels.VOC, 200)
    wide = visualize.legend(list(range(21)), labels.VOC, 4000)
    assert narrow.shape[0] > wide.shape[0]
    for index in range(len(names)):
        assert np.any(np.all(narrow == labels.VOC.colors[index], axis=-1)), names[index]


def cells(plot, num_classes, cell):
    """Colour of each cell of a confusion plot, from a corner of it, where no number is."""
    side = num_classes * cell
    block = plot[-8 - side : -8, :].astype(int)
    grid = np.flatnonzero((block == 215).all(axis=(0, 2)))  # the lines between columns
    left = grid[0]
    return block[4::cell][:num_classes, left + 4 :: cell][:, :num_classes]


def test_confusion_plot_shades_each_rows_shares():
    matrix = np.array([[90, 10, 0], [0, 0, 0], [30, 30, 60]])
    plot = visualize.confusion_plot(matrix, labels.named("background", "some", "thing"))
    assert plot.dtype == np.uint8
    red = cells(plot, 3, 72)[..., 0]
    shade = np.array([[0.9, 0.1, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
    expected = np.rint(255 - shade * (255 - 8))
    expected[1] = 225  # the class has no pixels
    np.testing.assert_array_equal(red, expected)


@pytest.mark.parametrize(
    ("table", "cell"),
    [(labels.named("x"), 72), (labels.VOC, 44), (labels.named(*map(str, range(80))), 14)],
)
def test_confusion_plot_holds_any_number_of_classes(table, cell):
    count = table.num_classes
    plot = visualize.confusion_plot(np.eye(count, dtype=np.int64), table)
    red = cells(plot, count, cell)[..., 0]
    np.testing.assert_array_equal(red, np.where(np.eye(count, dtype=bool), 8, 255))
    last = plot[-8 - cell + 2 : -10, -8 - cell + 2 : -10, 0]  # dark blue
    written = (last > 200).any()
    assert written == (count <= 21)
