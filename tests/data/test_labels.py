"""Class tables."""

import numpy as np
import pytest

from deeplab_jax.data import labels


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
