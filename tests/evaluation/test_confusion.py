"""Confusion matrices and scores against scikit-learn, torchmetrics and VOC's own definition."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as reference

from deeplab_jax.data.labels import IGNORE
from deeplab_jax.evaluation.confusion import confusion_matrices, confusion_matrix, scores


def random_pair(seed, shape, classes, ignored):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < ignored] = IGNORE
    return labels, rng.integers(0, classes, shape).astype(np.uint8)


def on_device(labels, ids, classes):
    return np.asarray(confusion_matrices(jnp.asarray(labels), jnp.asarray(ids), classes))


def voc_accuracies(labels, ids, num_classes):
    """`VOCevalseg.m` line by line: pixels of all images, `gt` below 255; percent, by class."""
    confcounts = np.zeros((num_classes, num_classes))
    for gt, res in zip(labels, ids, strict=True):
        for true, predicted in zip(gt.ravel(), res.ravel(), strict=True):
            if true < 255:
                confcounts[true, predicted] += 1
    accuracies = np.zeros(num_classes)
    for j in range(num_classes):
        gtj = confcounts[j, :].sum()
        resj = confcounts[:, j].sum()
        gtjresj = confcounts[j, j]
        with np.errstate(invalid="ignore"):
            accuracies[j] = 100 * gtjresj / (gtj + resj - gtjresj)
    return accuracies


@pytest.mark.parametrize(
    ("shape", "classes", "ignored"),
    [((2, 9, 7), 5, 0.2), ((1, 1, 1), 2, 0.0), ((3, 4, 4), 21, 1.0), ((2, 30, 31), 3, 0.0)],
)
def test_counts_are_scikit_learns(shape, classes, ignored):
    labels, ids = random_pair(0, shape, classes, ignored)
    matrices = on_device(labels, ids, classes)
    for matrix, label, prediction in zip(matrices, labels, ids, strict=True):
        valid = label != IGNORE
        assert matrix.sum() == valid.sum()
        np.testing.assert_array_equal(confusion_matrix(label, prediction, classes), matrix)
        if valid.any():
            expected = reference(label[valid], prediction[valid], labels=range(classes))
            np.testing.assert_array_equal(matrix, expected)


def test_counts_beyond_float32_are_exact():
    labels = jnp.zeros((1, 4097, 4097), jnp.uint8)
    ids = labels.at[0, 0, 0].set(1)
    (matrix,) = confusion_matrices(labels, ids, 2)
    np.testing.assert_array_equal(matrix, [[4097 * 4097 - 1, 1], [0, 0]])
    np.testing.assert_array_equal(
        confusion_matrix(np.asarray(labels[0]), np.asarray(ids[0]), 2), matrix
    )


ids_of_3 = st.integers(0, 2)
shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=4)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=50)
def test_iou_is_vocs_for_any_labels_and_predictions(data):
    """Absent classes, classes that are only predicted, nothing but ignored pixels, one pixel."""
    shape = data.draw(shapes)
    labels = data.draw(hnp.arrays(np.uint8, shape, elements=ids_of_3 | st.just(IGNORE)))
    ids = data.draw(hnp.arrays(np.uint8, shape, elements=ids_of_3))
    matrix = sum(
        confusion_matrix(label, prediction, 3)
        for label, prediction in zip(labels, ids, strict=True)
    )
    result = scores(matrix)
    expected = voc_accuracies(labels, ids, 3)
    # 100 * x / 100 is not always x: the same quotients, in percent.
    np.testing.assert_allclose(100 * result.per_class_iou, expected, rtol=1e-15)
    known = expected[~np.isnan(expected)] / 100
    np.testing.assert_allclose(result.miou, known.mean() if known.size else np.nan, rtol=1e-14)


def test_iou_is_torchmetrics():
    from torch_reference import torch  # torchmetrics imports torchvision, which needs its help

    metrics = pytest.importorskip("torchmetrics.classification")
    batches = [random_pair(seed, (2, 17, 13), 6, 0.15) for seed in range(3)]
    for labels, ids in batches:  # class 4 is never labelled, class 5 occurs nowhere
        labels[(labels == 4) | (labels == 5)] = 0
        ids[ids == 5] = 1
    options = {"num_classes": 6, "ignore_index": IGNORE}
    index = metrics.MulticlassJaccardIndex(average="none", **options)
    macro = metrics.MulticlassJaccardIndex(average="macro", **options)
    weighted = metrics.MulticlassJaccardIndex(average="weighted", **options)
    theirs = metrics.MulticlassConfusionMatrix(**options)
    total = np.zeros((6, 6), np.int64)
    for labels, ids in batches:
        for metric in (index, macro, weighted, theirs):
            metric.update(torch.from_numpy(ids).long(), torch.from_numpy(labels).long())
        total += on_device(labels, ids, 6).sum(0)
    np.testing.assert_array_equal(total, theirs.compute().numpy())
    result = scores(total)
    # They divide in float32, and give a class that occurs nowhere 0.
    np.testing.assert_allclose(np.nan_to_num(result.per_class_iou), index.compute(), rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(result.per_class_iou), [False] * 5 + [True])
    assert result.per_class_iou[4] == 0
    np.testing.assert_allclose(result.miou, macro.compute(), rtol=1e-6)
    np.testing.assert_allclose(result.frequency_weighted_iou, weighted.compute(), rtol=1e-6)


def test_scores_follow_their_definitions():
    labels, ids = random_pair(1, (4, 20, 20), 4, 0.1)
    ids[labels == 2] = 2
    valid = labels != IGNORE
    result = scores(on_device(labels, ids, 4).sum(0), background=0)
    iou, recall, share = [], [], []
    for k in range(4):
        both = np.sum(valid & (labels == k) & (ids == k))
        either = np.sum(valid & ((labels == k) | (ids == k)))
        iou.append(both / either)
        recall.append(np.mean(ids[valid & (labels == k)] == k))
        share.append(np.mean(labels[valid] == k))
    np.testing.assert_array_equal(result.per_class_iou, iou)
    np.testing.assert_allclose(result.per_class_accuracy, recall, rtol=1e-15)
    np.testing.assert_allclose(result.per_class_true_share, share, rtol=1e-15)
    np.testing.assert_allclose(
        result.per_class_predicted_share, np.bincount(ids[valid]) / valid.sum()
    )
    assert result.miou == np.mean(iou)
    assert result.miou_without_background == np.mean(iou[1:])
    assert result.pixel_accuracy == np.mean(labels[valid] == ids[valid])
    np.testing.assert_allclose(result.mean_accuracy, np.mean(recall), rtol=1e-15)
    np.testing.assert_allclose(result.frequency_weighted_iou, np.dot(iou, share), rtol=1e-14)


def test_absent_classes_are_undefined_and_left_out_of_the_mean():
    result = scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), background=1)
    np.testing.assert_array_equal(result.per_class_iou, [3 / 4, 4 / 5, np.nan])
    np.testing.assert_array_equal(result.per_class_accuracy, [3 / 4, 1, np.nan])
    assert result.miou == np.mean([3 / 4, 4 / 5])
    assert result.miou_without_background == 3 / 4
    assert result.frequency_weighted_iou == 0.5 * 3 / 4 + 0.5 * 4 / 5
    # Predicted where it does not occur: its IoU is 0 and counts.
    assert scores(np.array([[3, 1], [0, 0]])).miou == np.mean([3 / 4, 0])


def test_without_a_pixel_or_a_background_there_is_no_score():
    nothing = scores(np.zeros((2, 2), np.int64), background=0)
    assert np.isnan(
        [
            nothing.miou,
            nothing.miou_without_background,
            nothing.pixel_accuracy,
            nothing.mean_accuracy,
            nothing.frequency_weighted_iou,
        ]
    ).all()
    assert np.isnan(scores(np.eye(2, dtype=np.int64)).miou_without_background)
