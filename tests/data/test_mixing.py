"""Masks of mixing against SciPy and closed forms; valid pixels are never lost."""

import numpy as np
import pytest
from scipy import ndimage

from deeplab_jax.config import MIXES
from deeplab_jax.data import mixing
from deeplab_jax.data.labels import IGNORE, named

LABELS = named("background", "a", "b", "c", "d")


def blocks(seed=0, shape=(24, 30), side=6):
    """A label of square blocks of random classes, also ignored ones."""
    rng = np.random.default_rng(seed)
    small = rng.choice([0, 1, 2, 3, IGNORE], [length // side for length in shape])
    return small.astype(np.uint8).repeat(side, 0).repeat(side, 1)


def masks(name, count=500, **kwargs):
    rng = np.random.default_rng(0)
    label = blocks(**kwargs)
    return label, [mixing.MASKS[name](label, rng, LABELS) != 0 for _ in range(count)]


def test_the_config_names_all_masks():
    assert tuple(mixing.MASKS) == MIXES


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_only_valid_pixels_of_the_mask_are_pasted(name, channels):
    rng = np.random.default_rng(channels)
    crops = [(rng.integers(0, 256, (24, 30, channels), np.uint8), blocks(seed)) for seed in (1, 2)]
    mask = mixing.MASKS[name](crops[1][1], rng, LABELS)
    image, label = (array.copy() for array in crops[0])
    mixing.paste((image, label), crops[1], mask)
    pasted = (mask != 0) & (crops[1][1] != IGNORE)
    assert 0 < pasted.sum() < pasted.size
    assert (crops[0][1] == IGNORE).any()
    np.testing.assert_array_equal(label, np.where(pasted, crops[1][1], crops[0][1]))
    expected = np.where(pasted[:, :, None], crops[1][0], crops[0][0])
    np.testing.assert_array_equal(image, expected)
    assert (label[crops[0][1] != IGNORE] != IGNORE).all()


def test_cutmix_chooses_rectangles_of_half_the_crop():
    _, chosen = masks("cutmix")
    for mask in chosen:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert len(rows) == np.ptp(rows) + 1
        assert len(columns) == np.ptp(columns) + 1
        assert mask.sum() == len(rows) * len(columns)
        assert mask.mean() == pytest.approx(1 / 2, abs=1 / 30)


def test_coverage_of_cutmix():
    """A rectangle of relative height h covers row y with probability min(y, 1 - y) / (1 - h)."""
    _, chosen = masks("cutmix", 2000, shape=(60, 60))
    y = (np.arange(60) + 0.5) / 60
    heights = 0.5 ** ((np.arange(1000) + 0.5) / 1000)

    def covers(height):
        return np.minimum(np.minimum(y, 1 - y) / (1 - height), 1)

    products = [np.outer(covers(height), covers(0.5 / height)) for height in heights]
    bound = 4 * 0.5 / np.sqrt(2000) + 1 / 30  # four standard deviations, and whole pixels
    assert np.abs(np.mean(chosen, axis=0) - np.mean(products, axis=0)).max() < bound
    lengths = np.array([mask.any(axis=1).sum() / 60 for mask in chosen])
    assert np.mean(np.log(lengths)) == pytest.approx(np.log(0.5) / 2, abs=0.02)
    assert lengths.min() < 0.53
    assert lengths.max() > 0.97


def test_classmix_chooses_half_of_the_classes():
    label, chosen = masks("classmix")
    present = [index for index in np.unique(label) if index != IGNORE]
    assert len(present) == 4
    counts = dict.fromkeys(present, 0)
    for mask in chosen:
        inside = set(np.unique(label[mask]))
        assert len(inside) == 2
        assert not inside & set(np.unique(label[~mask]))
        for index in inside:
            counts[index] += 1
    for count in counts.values():
        assert count == pytest.approx(250, abs=4 * np.sqrt(500) / 2)


def test_copy_paste_chooses_half_of_the_objects():
    label, chosen = masks("copy_paste")
    total = np.zeros(label.shape)
    for mask in chosen:
        total += mask
    num_objects = 0
    for index in (1, 2, 3):
        regions, count = ndimage.label(label == index, np.ones((3, 3)))
        for region in range(1, count + 1):
            inside = total[regions == region]
            assert len(set(inside)) == 1  # the object was chosen as a whole
            assert inside[0] == pytest.approx(250, abs=4 * np.sqrt(500) / 2)
            num_objects += 1
    assert num_objects > 4
    assert len({mask.tobytes() for mask in chosen}) > 2**num_objects / 4  # each by itself
    assert (total[(label == 0) | (label == IGNORE)] == 0).all()


@pytest.mark.parametrize(
    ("index", "name"), [(IGNORE, "cutmix"), (0, "classmix"), (0, "copy_paste")]
)
def test_a_crop_with_nothing_to_paste_changes_nothing(index, name):
    crop = np.full((8, 8, 3), 7, np.uint8), np.full((8, 8), 1, np.uint8)
    other = np.full((8, 8, 3), 9, np.uint8), np.full((8, 8), index, np.uint8)
    mask = mixing.MASKS[name](other[1], np.random.default_rng(0), LABELS)
    mixing.paste(crop, other, mask)
    assert (crop[0] == 7).all()
    assert (crop[1] == 1).all()
