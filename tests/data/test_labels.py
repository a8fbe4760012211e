"""Class tables."""

import numpy as np
import pytest

from deeplab_jax.data import labels
from deeplab_jax.utils.errors import UserError


def test_voc_colours_are_the_published_ones():
    colors = dict(zip(labels.VOC.names, labels.VOC.colors, strict=True))
    assert labels.VOC.num_classes == 21
    assert colors["background"] == (0, 0, 0)
    assert colors["aeroplane"] == (128, 0, 0)
    assert colors["person"] == (192, 128, 128)
    assert colors["tvmonitor"] == (0, 64, 128)
    assert labels.voc_palette(256)[255] == (224, 224, 192)


@pytest.mark.parametrize(("table", "count"), [("CAMVID", 11), ("CITYSCAPES", 19), ("VOC", 21)])
def test_tables_have_their_number_of_distinct_classes(table, count):
    known = getattr(labels, table)
    assert known.num_classes == count
    assert len(set(known.names)) == len(set(known.colors)) == count


def test_voc_palette_is_that_of_real_masks(shared_data):
    from PIL import Image

    folder = shared_data / "voc_mini" / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    palette = Image.open(next(folder.glob("*.png"))).getpalette()
    np.testing.assert_array_equal(
        np.array(palette).reshape(-1, 3)[:21], np.array(labels.VOC.colors)
    )


def test_palette_gives_a_colour_to_every_id():
    palette = labels.named("a", "b").palette()
    assert palette.shape == (256, 3)
    np.testing.assert_array_equal(palette[1], [128, 0, 0])
    np.testing.assert_array_equal(palette[labels.IGNORE], [255, 255, 255])


def test_a_table_must_be_consistent():
    with pytest.raises(ValueError, match="2 class names but 1 colours"):
        labels.LabelSet(("a", "b"), ((0, 0, 0),))
    with pytest.raises(ValueError, match="1 to 255 classes"):
        labels.LabelSet((), ())


@pytest.mark.parametrize(
    ("text", "index"), [("dog", 12), ("DOG", 12), ("12", 12), ("0", 0), (" person ", 15)]
)
def test_classes_by_name_and_id(text, index):
    assert labels.class_id(text, labels.VOC) == index


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dgo", r"no class 'dgo' \(did you mean 'dog'"),
        ("Persn", "did you mean 'person'"),
        ("21", r"no class '21'.*an id \(0 to 20\)"),
        ("-1", "no class '-1'"),
        ("", "no class ''"),
    ],
)
def test_an_unknown_class_names_the_nearest(text, message):
    with pytest.raises(UserError, match=message):
        labels.class_id(text, labels.VOC)


@pytest.mark.parametrize(
    "name",
    [
        "background",
        "Background",
        "BACKGROUND ",
        "_background_",
        "__background__",
        "bg",
        "back ground",
    ],
)
def test_background_in_others_spellings(name):
    assert labels.is_background(name)
    assert not any(
        map(labels.is_background, ("backgrounds", "bgr", "foreground", "", "no background"))
    )


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (("background", "crack"), 1),
        (("crack", "_background_"), 0),
        (("cat", "dog"), 1),
        (("background", "bg"), 1),
        (("background",), None),
        (("background", "cat", "dog"), None),
    ],
)
def test_the_positive_class_of_two_is_not_background(names, index):
    assert labels.default_positive(labels.named(*names)) == index
