"""Boundary IoU and the bootstrap against literal readings of their definitions."""

import numpy as np
import pytest
import scipy.ndimage

from deeplab_jax.data.labels import IGNORE
from deeplab_jax.evaluation.confusion import (
    bootstrap_miou,
    boundary_iou,
    confusion_matrix,
    count_boundary,
    mask_boundary,
    scores,
)


def reference_boundary(mask):
    """Erosions one after the other; beyond the border there is no mask."""
    height, width = mask.shape
    distance = max(1, round(0.02 * np.sqrt(height**2 + width**2)))
    eroded = mask
    for _ in range(distance):
        eroded = scipy.ndimage.binary_erosion(eroded, np.ones((3, 3)), border_value=0)
    return mask & ~eroded


def blobs(seed, shape, num_classes):
    """Ids in patches rather than noise, of which every pixel is a boundary."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(num_classes, *shape))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, shape[0] / 12, shape[1] / 12))
    return smooth.argmax(0).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (40, 40), (70, 55), (200, 300)])
def test_boundary_is_what_erosion_removes(shape):
    for mask in (blobs(0, shape, 2) == 1, np.ones(shape, bool), np.zeros(shape, bool)):
        np.testing.assert_array_equal(mask_boundary(mask), reference_boundary(mask))


def test_boundary_width_is_the_papers():
    mask = np.zeros((300, 400), bool)  # diagonal 500: 10 pixels
    mask[50:250, 50:350] = True
    inner = np.zeros_like(mask)
    inner[60:240, 60:340] = True
    np.testing.assert_array_equal(mask_boundary(mask), mask & ~inner)


def test_boundary_iou_sums_over_images_and_skips_ignored_pixels():
    total, expected = np.zeros((4, 2), np.int64), np.zeros((4, 2), np.int64)
    for seed in range(3):
        label, ids = blobs(seed, (90, 80), 3), blobs(seed, (90, 80), 3)
        ids = np.roll(ids, 2, axis=1)
        valid = np.random.default_rng(seed).random(label.shape) > 0.001
        label[~valid] = IGNORE
        counts = count_boundary(label, ids, 4)
        for k in range(4):
            true = reference_boundary(label == k)
            predicted = reference_boundary((ids == k) & valid)
            expected[k] += np.sum(true & predicted), np.sum(true | predicted)
        np.testing.assert_array_equal(
            count_boundary(label, np.where(valid, ids, 3), 4), counts, "ignored pixels counted"
        )
        total += counts
    np.testing.assert_array_equal(total, expected)
    iou = boundary_iou(total)
    np.testing.assert_array_equal(iou[:3], expected[:3, 0] / expected[:3, 1])
    assert np.isnan(iou[3])
    assert (iou[:3] < 0.95).all()


def test_perfect_predictions_score_1():
    label = blobs(1, (60, 50), 3)
    ids = label.copy()
    label[20:25] = IGNORE
    np.testing.assert_array_equal(boundary_iou(count_boundary(label, ids, 3)), np.ones(3))


def test_boundary_iou_sees_what_iou_hides():
    """A large square off by two pixels: its IoU stays high."""
    label, ids = np.zeros((400, 400), np.uint8), np.zeros((400, 400), np.uint8)
    label[50:350, 50:350] = 1
    ids[52:352, 50:350] = 1
    iou = scores(confusion_matrix(label, ids, 2)).per_class_iou[1]
    assert boundary_iou(count_boundary(label, ids, 2))[1] < iou - 0.1


def image_matrices(seed, num_images, num_classes):
    rng = np.random.default_rng(seed)
    matrices = rng.integers(0, 50, (num_images, num_classes, num_classes))
    matrices += 200 * np.eye(num_classes, dtype=int) * rng.integers(0, 2, (num_images, 1, 1))
    return matrices.astype(np.int32)


def test_bootstrap_is_a_loop_over_sums_of_drawn_matrices():
    """250 resamples by the same draws."""
    matrices = image_matrices(0, 7, 3)
    matrices[1:, 2], matrices[1:, :, 2] = 0, 0  # class 2 is absent from many resamples
    generator = np.random.default_rng(5)
    draws = []
    for times in generator.multinomial(7, np.full(7, 1 / 7), 250):
        chosen = [image for image in range(7) for _ in range(times[image])]
        draws.append(scores(matrices[chosen].sum(0)).miou)
    low, high = bootstrap_miou(matrices, num_resamples=250, seed=5)
    np.testing.assert_allclose([low, high], np.percentile(draws, [2.5, 97.5]), rtol=1e-12)
    assert bootstrap_miou(matrices, num_resamples=250, seed=5) == (low, high)
    assert bootstrap_miou(matrices, num_resamples=250, seed=6) != (low, high)
    inner = bootstrap_miou(matrices, num_resamples=250, seed=5, level=0.5)
    assert low < inner[0] < inner[1] < high


def test_bootstrap_is_as_wide_as_the_spread_over_data_sets():
    """Intervals of many small data sets, of which we know the mIoU of the whole they come from."""
    population = image_matrices(1, 4000, 2)
    truth = scores(population.sum(0)).miou
    covered = 0
    for part in population.reshape(100, 40, 2, 2):
        low, high = bootstrap_miou(part, num_resamples=200)
        covered += low <= truth <= high
    assert 88 <= covered <= 99


def test_bootstrap_of_equal_images_is_a_point_and_without_images_is_none():
    one = image_matrices(2, 1, 3)
    low, high = bootstrap_miou(np.repeat(one, 9, axis=0), num_resamples=50)
    assert low == high == pytest.approx(scores(one[0]).miou, rel=1e-14)
    assert np.isnan(bootstrap_miou(np.zeros((4, 2, 2), np.int32), num_resamples=10)).all()
