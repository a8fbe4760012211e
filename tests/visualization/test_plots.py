"""Charts: files by suffix, diagrams, the confusion matrix."""

import re

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.data import labels
from deeplab_jax.utils.errors import UserError
from deeplab_jax.visualization import plots
from drawings import texts

THREE = labels.named("background", "some", "thing")
MATRIX = np.array([[90, 10, 0], [0, 0, 0], [30, 30, 60]])


@pytest.mark.parametrize("suffix", plots.SUFFIXES)
def test_the_same_figure_gives_the_same_bytes(suffix, tmp_path):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix.upper()}"
    for path in (first, second):
        plots.save(path, plots.confusion_plot(MATRIX, THREE))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_formats(tmp_path):
    figure, axes = plots.diagram(300, 200)
    plots.text(axes, 10, 50, "words")
    for suffix in plots.SUFFIXES:
        plots.save(tmp_path / f"a{suffix}", figure)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (600, 400)
    svg = (tmp_path / "a.svg").read_text()
    assert "words" in svg  # as a comment, above its glyphs
    assert not re.search(r"<dc:date>", svg)
    assert b"CreationDate" not in (tmp_path / "a.pdf").read_bytes()


def test_another_suffix_is_an_error(tmp_path):
    figure = plots.new_figure(100, 100)
    with pytest.raises(UserError, match=r"must be a file that ends in .png or .svg or .pdf, got"):
        plots.save(tmp_path / "a.jpg", figure)
    assert not list(tmp_path.iterdir())


def test_diagrams_count_from_the_upper_left_corner():
    figure, axes = plots.diagram(100, 50)
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 255
    plots.picture(axes, red, 10, 20, scale=5)
    pixels = plots.rasterize(figure)
    assert pixels.shape == (100, 200, 3)
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(-1))
    # Two pixels a unit; the frame hides the outermost.
    assert (rows.min(), rows.max()) == pytest.approx((40, 59), abs=2)
    assert (columns.min(), columns.max()) == pytest.approx((20, 49), abs=2)


@pytest.mark.parametrize("va", ["top", "center", "bottom"])
def test_text_is_aligned_and_shrunk(va):
    figure, axes = plots.diagram(200, 200)
    plots.text(axes, 100, 100, "HHH\nHHH", ha="right", va=va, max_width=20)
    dark = (plots.rasterize(figure) < 128).all(-1)
    rows, columns = np.nonzero(dark)
    assert columns.max() == pytest.approx(199, abs=2)
    assert columns.min() == pytest.approx(160, abs=3)
    sides = {"top": rows.min(), "center": (rows.min() + rows.max()) / 2, "bottom": rows.max()}
    assert sides[va] == pytest.approx(200, abs=3)


def test_confusion_plot_shades_each_row_in_percent():
    figure = plots.confusion_plot(MATRIX, THREE)
    percent = figure.axes[0].collections[0].get_array()
    expected = [[90, 10, 0], [np.nan] * 3, [25, 25, 50]]
    np.testing.assert_allclose(percent.filled(np.nan), expected)
    assert percent.mask[1].all()  # the class has no pixels
    written = texts(figure)
    assert {"90.0", "10.0", "25.0", "50.0", *THREE.names} <= set(written)
    assert not {"0.0", "nan"} & set(written)


@pytest.mark.parametrize("num_classes", [1, 2, 21, 80])
def test_confusion_plot_of_any_number_of_classes_is_legible(num_classes):
    table = (
        labels.VOC
        if num_classes == 21
        else labels.named(*(f"class {i}" for i in range(num_classes)))
    )
    figure = plots.confusion_plot(np.eye(num_classes, dtype=np.int64), table)
    assert set(table.names) <= set(texts(figure))
    numbers = {text.get_text() for text in figure.axes[0].texts}
    assert numbers == ({"100.0" if num_classes < 21 else "100"} if num_classes <= 21 else set())


def test_confusion_plot_cuts_long_names():
    table = labels.named("x" * 60, "y")
    written = texts(plots.confusion_plot(np.eye(2, dtype=np.int64), table))
    assert "x" * 23 + "…" in written
