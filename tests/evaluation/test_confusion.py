"""Confusion matrix and scores against scikit-learn and a literal reading of the definition."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as reference

from deeplab_jax.evaluation.confusion import confusion_matrix, scores
from deeplab_jax.labels import IGNORE


def random_pair(seed, shape, classes, ignored):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < ignored] = IGNORE
    return labels, rng.integers(0, classes, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "classes", "ignored"),
    [((2, 9, 7), 5, 0.2), ((1, 1, 1), 2, 0.0), ((3, 4, 4), 21, 1.0), ((2, 30, 31), 3, 0.0)],
)
def test_counts_are_scikit_learns(shape, classes, ignored):
    labels, ids = random_pair(0, shape, classes, ignored)
    matrix = np.asarray(confusion_matrix(jnp.asarray(labels), jnp.asarray(ids), classes))
    valid = labels != IGNORE
    if valid.any():
        expected = reference(labels[valid], ids[valid], labels=range(classes))
        np.testing.assert_array_equal(matrix, expected)
    assert matrix.sum() == valid.sum()


def test_counts_beyond_what_float32_holds_are_exact():
    labels = jnp.zeros((5, 2048, 2048), jnp.uint8)
    matrix = confusion_matrix(labels, labels.at[0, 0, 0].set(1), 2)
    np.testing.assert_array_equal(matrix, [[5 * 2048 * 2048 - 1, 1], [0, 0]])


def test_scores_follow_the_definition():
    labels, ids = random_pair(1, (4, 20, 20), 4, 0.1)
    ids[labels == 2] = 2
    valid = labels != IGNORE
    matrix = np.asarray(confusion_matrix(jnp.asarray(labels), jnp.asarray(ids), 4))
    result = scores(matrix)
    iou = []
    for k in range(4):
        both = np.sum(valid & (labels == k) & (ids == k))
        either = np.sum(valid & ((labels == k) | (ids == k)))
        iou.append(both / either)
    np.testing.assert_array_equal(result.per_class_iou, iou)
    assert result.miou == np.mean(iou)
    assert result.pixel_accuracy == np.mean(labels[valid] == ids[valid])
    recall = [np.mean(ids[valid & (labels == k)] == k) for k in range(4)]
    np.testing.assert_allclose(result.mean_accuracy, np.mean(recall), rtol=1e-15)


def test_absent_classes_are_undefined_and_left_out_of_the_mean():
    result = scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(result.per_class_iou, [3 / 4, 4 / 5, np.nan])
    assert result.miou == np.mean([3 / 4, 4 / 5])
    # Predicted where it does not occur: its IoU is 0 and counts.
    assert scores(np.array([[3, 1], [0, 0]])).miou == np.mean([3 / 4, 0])
    assert np.isnan(scores(np.zeros((2, 2))).miou)
