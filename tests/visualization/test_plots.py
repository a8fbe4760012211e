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


POINTS = {
    "threshold": np.array([0.9, 0.6, 0.2, 0.1]),
    "recall": np.array([0.25, 0.5, 1, 1]),
    "false_positive_rate": np.array([0, 0.25, 0.5, 1]),
    "precision": np.array([1, 2 / 3, 2 / 3, 0.5]),
}
NUMBERS = {
    "positive": "crack",
    "threshold": None,
    "positive_pixels": 4,
    "negative_pixels": 4,
    "precision": 2 / 3,
    "recall": 0.5,
    "f1": 4 / 7,
    "auroc": 0.75,
    "average_precision": 0.75,
    "best_f1": 0.8,
    "best_threshold": 0.2,
}


def test_binary_curves_are_the_points_and_mark_the_prediction_and_the_best():
    figure = plots.binary_curves(POINTS, NUMBERS)
    roc, precision_recall = figure.axes
    _, curve, best, predicted = (line.get_xydata().tolist() for line in roc.lines)
    assert curve == [[0, 0], [0, 0.25], [0.25, 0.5], [0.5, 1], [1, 1]]
    assert (best, predicted) == ([[0.5, 1]], [[pytest.approx(0.25), 0.5]])
    chance, curve, best, predicted = precision_recall.lines
    assert set(chance.get_ydata()) == {0.5}
    # Between two points, the precision is that of the larger recall: the area is the average's.
    assert curve.get_drawstyle() == "steps-pre"
    recall, precision = curve.get_data()
    assert np.sum(np.diff(recall) * precision[1:]) == pytest.approx(0.75)
    assert best.get_xydata().tolist() == [[1, 2 / 3]]
    assert predicted.get_xydata().tolist() == [[0.5, 2 / 3]]
    written = texts(figure)
    assert "ROC, area 0.7500" in written
    assert "best F1 0.800, threshold 0.2" in written
    assert "F1 0.571, most probable class" in written
    chosen = plots.binary_curves(POINTS, NUMBERS | {"threshold": 0.5})
    assert "F1 0.571, threshold 0.5" in texts(chosen)


def test_undefined_binary_curves_stay_empty():
    points = POINTS | dict.fromkeys(("recall", "precision"), np.full(4, np.nan))
    undefined = ("auroc", "average_precision", "recall", "f1", "best_f1", "best_threshold")
    figure = plots.binary_curves(points, NUMBERS | dict.fromkeys(undefined))
    assert {"ROC, area: undefined"} < set(texts(figure))
