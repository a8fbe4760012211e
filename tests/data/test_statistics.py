"""Summaries of a sample of a split."""

import numpy as np
import pytest

import tiny
from deeplab_jax import data as data_lib
from deeplab_jax.data import labels, statistics
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.utils.errors import UserError


class Masks:
    """Images of one colour with given masks."""

    def __init__(self, masks, pixel=0):
        self.masks = [np.array(mask, np.uint8) for mask in masks]
        self.pixel = pixel

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        mask = self.masks[index]
        image = np.full((*mask.shape, 3), self.pixel, np.uint8)
        return Example(image=image, label=mask, name=str(index))


def summarize(masks, crop=(2, 2), pixel=0):
    dataset = Dataset(Masks(masks, pixel), labels.named("a", "b"))
    return dataset, statistics.summarize_sample(dataset, crop)


def shapes(**fields):
    config = tiny.get_config()
    for name, value in fields.items():
        setattr(config.data.shapes, name, value)
    return statistics.summarize_sample(data_lib.load(config.data, "train"), (33, 33))


def test_digests_tell_data_sets_apart():
    first, again = shapes(), shapes()
    assert (again.label_digest, again.image_digest) == (first.label_digest, first.image_digest)
    assert shapes(seed=1).label_digest != first.label_digest
    assert shapes(num_train=23).num_examples != first.num_examples


def test_other_pixels_change_only_the_digest_of_images():
    (_, first), (_, second) = summarize([[[0, 1]]]), summarize([[[0, 1]]], pixel=1)
    assert first.label_digest == second.label_digest
    assert first.image_digest != second.image_digest


def test_a_large_split_is_sampled_from_its_first_to_its_last_example():
    masks = np.zeros((1000, 1, 1), np.uint8)
    masks[-1] = 1
    _, summary = summarize(masks)
    assert summary.pixels.tolist() == [15, 1]
    assert summary.num_examples == 1000


@pytest.mark.parametrize("crop", [(1, 1), (2, 3), (5, 4), (9, 9)])
def test_empty_crops_are_counted_at_every_position(crop):
    rng = np.random.default_rng(0)
    mask = np.where(rng.random((7, 6)) < 0.1, 0, 255).astype(np.uint8)
    height, width = min(crop[0], 7), min(crop[1], 6)
    empty = [
        (mask[y : y + height, x : x + width] == 255).all()
        for y in range(8 - height)
        for x in range(7 - width)
    ]
    _, summary = summarize([mask], crop)
    np.testing.assert_allclose(summary.empty_ratio, np.mean(empty))


def test_a_split_of_ignored_pixels_is_an_error():
    dataset, summary = summarize([[[255, 255]]] * 3)
    with pytest.raises(UserError, match="every pixel of the 3 images in 'train' has the ignore"):
        statistics.check_valid_pixels(dataset, summary, "train")


def test_one_valid_pixel_between_the_sampled_images_is_enough():
    masks = np.full((1000, 1, 1), 255, np.uint8)
    masks[1] = 0
    dataset, summary = summarize(masks)
    assert not summary.pixels.any()
    (warning,) = statistics.check_valid_pixels(dataset, summary, "train")
    assert "about 100% of the crops" in warning


def test_absent_classes_are_named_if_all_images_were_read():
    dataset, summary = summarize([[[0, 0]]])
    assert statistics.check_valid_pixels(dataset, summary, "val") == [
        "no image in 'val' has a pixel of b"
    ]
    dataset, summary = summarize([[[0, 0]]] * 100)
    assert statistics.check_valid_pixels(dataset, summary, "val") == []
