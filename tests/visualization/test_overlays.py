"""Pictures of predictions: which colours are where, and that they are legible at any size."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from deeplab_jax.data import labels
from deeplab_jax.visualization import overlays

CLASSES = labels.LabelSet(("background", "fox", "bird"), ((0, 0, 0), (200, 0, 0), (0, 0, 200)))


def blank(height, width, channels=3, value=100):
    return np.full((height, width, channels), value, np.uint8)


def colours(picture):
    packed = np.unique(picture.astype(int) @ [1 << 16, 1 << 8, 1]).tolist()
    return {(value >> 16, value >> 8 & 255, value & 255) for value in packed}


def halves(height, width):
    """Ids: background on the left, foxes on the right."""
    ids = np.zeros((height, width), np.uint8)
    ids[:, width // 2 :] = 1
    return ids


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.5, 1.0])
def test_overlays_use_their_opacity(opacity):
    picture = overlays.overlay(blank(400, 600), halves(400, 600), CLASSES, opacity=opacity)
    assert np.all(picture[:400, :300] == 100)
    expected = (1 - opacity) * np.array([100, 100, 100]) + opacity * np.array([200, 0, 0])
    assert np.all(np.abs(picture[:400, 300:] - expected) <= 1)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_side_by_side_shows_the_image_and_the_overlay(channels):
    image, ids = blank(400, 600, channels), halves(400, 600)
    picture = overlays.side_by_side(image, ids, CLASSES)
    assert np.all(picture[:400, :600] == 100)
    alone = overlays.overlay(image, ids, CLASSES)
    np.testing.assert_array_equal(picture[:400, -600:], alone[:400])


@pytest.mark.parametrize("name", ["background", "_background_", "BG"])
def test_blend_mixes_class_colours_and_leaves_the_background_clear(name):
    table = labels.named(name, "a")
    image = np.full((2, 3, 3), 100, np.uint8)
    ids = np.array([[0, 1, 255], [1, 0, 0]], np.uint8)
    mixed = overlays.blend(image, ids, table)
    np.testing.assert_array_equal(mixed[0, 1], [(100 + 128) // 2, 50, 50])
    np.testing.assert_array_equal(mixed[ids != 1], np.full((4, 3), 100))


@pytest.mark.parametrize("weight", [0, 1, 77, 128, 200, 255, 256])
def test_blend_rounds_down(weight):
    """For all values of pixels and many colours, compared with integers."""
    colors = ((0, 0, 0), *((3 * i, 255 - 2 * i, 85 + i) for i in range(84)))
    table = labels.LabelSet(tuple(f"class {i}" for i in range(85)), colors)
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(85, 0).repeat(3, 2)
    ids = np.arange(85, dtype=np.uint8)[:, None].repeat(256, 1)
    expected = (image.astype(int) * (256 - weight) + np.array(colors)[ids] * weight) >> 8
    np.testing.assert_array_equal(overlays.blend(image, ids, table, weight / 256), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_counts_of_classes(dtype):
    ids = np.array([[0, 2, 2], [2, 255, 0]], np.uint8).astype(dtype)
    counts = labels.class_counts(ids, 4)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, [2, 0, 3, 0])


def test_blend_colours_class_0_if_it_is_not_the_background():
    ids = np.zeros((1, 1), np.uint8)
    mixed = overlays.blend(np.zeros((1, 1, 3), np.uint8), ids, labels.CAMVID)
    np.testing.assert_array_equal(mixed[0, 0], [64, 64, 64])


def test_the_legend_lists_exactly_the_classes_that_occur():
    def shown(*ids):
        picture = overlays.overlay(blank(1, len(ids)), np.array([ids], np.uint8), CLASSES)
        return colours(picture[320:])

    assert {(200, 0, 0), (0, 0, 200)} <= shown(1, 2)
    assert (0, 0, 200) not in shown(1, 1)


def test_the_legend_leaves_the_background_clear_as_the_overlay_does():
    road = labels.LabelSet(("road",), ((0, 0, 0),))
    clear, filled = (
        overlays.legend(overlays.class_entries([0], table), 600, 20) for table in (CLASSES, road)
    )
    inside = (slice(13, 27), slice(13, 27))  # of the first swatch
    assert np.all(clear[inside] == 255)
    assert np.all(filled[inside] == 0)


def test_the_legend_shows_each_colour_and_breaks_lines():
    entries = overlays.class_entries(range(21), labels.VOC)
    narrow, wide = overlays.legend(entries, 200), overlays.legend(entries, 4000)
    assert narrow.shape[0] > wide.shape[0]
    assert set(labels.VOC.colors[1:]) <= colours(narrow)
    assert narrow.shape[1] == 200


@pytest.mark.parametrize("font_size", [8, 14, 15, 33])
def test_the_legend_draws_what_pillow_draws(font_size):
    notes = ("", "45.7 %", "< 0.1 %", "100.0 %")
    names = ("j", "AVTo fy", "traffic light (red)", "Wäy gQ", "f")
    entries = [((9 * i, 0, 99), name, notes[i % 4]) for i, name in enumerate(names)]
    letters, gap = overlays.font(font_size), font_size // 2
    drawn = overlays.legend(entries, 3000, font_size)
    canvas = Image.fromarray(blank(*drawn.shape[:2], value=255))
    pillow, x = ImageDraw.Draw(canvas), gap
    for color, name, note in entries:
        words = f"{name} {note}" if note else name
        square = (x, gap, x + font_size - 1, gap + font_size - 1)
        pillow.rectangle(square, color, overlays.INK, width=max(1, font_size // 16))
        at = x + font_size + gap, gap + font_size / 2
        pillow.text(at, words, overlays.INK, letters, anchor="lm")
        x += font_size + 3 * gap + round(letters.getlength(words))
    np.testing.assert_array_equal(drawn, np.asarray(canvas))
    np.testing.assert_array_equal(drawn, overlays.legend(entries, 3000, font_size))  # from cache


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(1, 1, 320), (64, 64, 5), (40, 300, 4), (375, 500, 1), (1, 2000, 1), (2000, 1, 1)],
)
def test_any_size_is_legible(height, width, factor):
    image, ids = blank(height, width), halves(height, width)
    probability = np.zeros((height, width), np.float32)
    for picture in (
        overlays.overlay(image, ids, CLASSES),
        overlays.side_by_side(image, ids, CLASSES),
        overlays.heatmap(image, probability, "fox"),
    ):
        assert picture.shape[1] >= max(factor * width, 320)
        caption = picture[factor * height :]
        written = np.any(np.all(caption < 90, axis=2), axis=1)
        assert written.sum() >= 10


def test_letters_grow_with_large_images():
    image, ids = blank(1500, 4000, 1), halves(1500, 4000)
    caption = overlays.overlay(image, ids, CLASSES)[1500:]
    assert caption.shape[0] >= 4000 / 45


def test_small_images_are_enlarged_by_whole_pixels():
    ids = np.array([[0, 1], [2, 1]], np.uint8)
    picture = overlays.overlay(blank(2, 2), ids, CLASSES, opacity=1.0)
    expected = CLASSES.palette()[ids]
    expected[0, 0] = 100
    np.testing.assert_array_equal(picture[:320, :320], np.kron(expected, np.ones((160, 160, 1))))


def test_long_names_and_many_classes_fit():
    many = labels.named(*(f"class {index} {'x' * (3 * index % 90)}" for index in range(150)))
    entries = [(*entry[:2], "12.3 %") for entry in overlays.class_entries(range(150), many)]
    for width in (320, 1000):
        legend = overlays.legend(entries, width)
        assert legend.shape[1] == width
        assert np.all(legend[:, -3:] == 255)  # nothing runs over the edge
        assert set(many.colors) <= colours(legend)


def test_heat_grows_lighter_with_the_probability():
    probability = np.linspace(0, 1, 500, dtype=np.float32)[None].repeat(400, axis=0)
    picture = overlays.heatmap(blank(400, 500), probability, "fox")[:400]
    lightness = picture[0].astype(float) @ [0.299, 0.587, 0.114]
    assert np.all(np.diff(lightness) > -1.5)
    assert lightness[-1] > lightness[0] + 80
    steps = np.abs(np.diff(lightness.reshape(10, 50).mean(1)))
    assert steps.max() < 3 * steps.min()  # even, unlike a rainbow's


def test_the_scale_has_the_colours_of_the_heat_map():
    probability = np.linspace(0, 1, 600, dtype=np.float32)[None].repeat(400, axis=0)
    picture = overlays.heatmap(blank(400, 600, value=128), probability, "fox")
    used = colours(picture[:400])
    assert len(used & colours(picture[400:])) > 0.8 * len(used)


@pytest.mark.parametrize(
    ("pixels", "expected"), [(0, "0.0 %"), (1, "< 0.1 %"), (10, "0.1 %"), (10_000, "100.0 %")]
)
def test_a_fraction_above_0_never_reads_as_0(pixels, expected):
    assert overlays.percentage(pixels, 10_000) == expected


def test_text_of_large_pictures_is_not_kept():
    overlays._draw_text.cache_clear()
    for font_size, kept in ((40, 0), (14, 2)):
        overlays.legend([((1, 2, 3), "fox", "9 %")], 900, font_size)
        assert overlays._draw_text.cache_info().currsize == kept


def test_unsure_pixels_are_hatched_and_no_others():
    image, ids = blank(400, 500), np.ones((400, 500), np.uint8)
    mask = np.zeros((400, 500), bool)
    mask[100:200, 50:300] = True
    plain = overlays.overlay(image, ids, CLASSES)
    hatched = overlays.overlay(image, ids, CLASSES, unsure=mask)
    changed = (plain[:400, :500] != hatched[:400, :500]).any(axis=2)
    assert not changed[~mask].any()
    lines = hatched[:400][mask]
    for color in ((255, 255, 255), overlays.INK):
        assert 0.1 < (lines == color).all(axis=1).mean() < 0.2
    assert (changed[mask].mean()) < 0.4  # the colours of the classes show between the lines
    # The legend has one entry more.
    assert (plain[400:] != hatched[400:]).any()
