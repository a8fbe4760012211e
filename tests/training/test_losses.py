"""Losses against torch and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deeplab_jax.labels import IGNORE
from deeplab_jax.training import losses


def batch(seed, shape=(2, 7, 5), classes=4, ignored=0.3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*shape, classes)).astype(np.float32) * 3
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < ignored] = IGNORE
    return logits, labels


def mean_loss(logits, labels, class_weights=None, fraction=1.0):
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    weights = losses.pixel_weights(labels, class_weights)
    total = losses.cross_entropy_sum(logits, labels, weights, fraction)
    return losses.mean(total, losses.cross_entropy_count(weights, fraction))


@pytest.mark.parametrize("class_weights", [None, (0.2, 1.0, 3.0, 0.5)])
def test_value_and_gradient_are_torchs(class_weights):
    logits, labels = batch(0)
    value, gradient = jax.value_and_grad(mean_loss)(
        jnp.asarray(logits), jnp.asarray(labels), class_weights
    )
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    reference = torch.nn.functional.cross_entropy(
        theirs.permute(0, 3, 1, 2),
        torch.tensor(labels.astype(np.int64)),
        weight=None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64),
        ignore_index=IGNORE,
    )
    reference.backward()
    np.testing.assert_allclose(value, reference.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-4, atol=1e-8)


def test_ignored_pixels_have_no_gradient_and_no_influence():
    logits, labels = batch(1)
    gradient = jax.grad(mean_loss)(jnp.asarray(logits), jnp.asarray(labels))
    assert np.all(np.asarray(gradient)[labels == IGNORE] == 0)
    assert np.all(np.any(np.asarray(gradient)[labels != IGNORE] != 0, axis=-1))
    changed = np.where((labels == IGNORE)[..., None], 100.0, logits).astype(np.float32)
    assert mean_loss(changed, jnp.asarray(labels)) == mean_loss(logits, jnp.asarray(labels))


def test_mean_is_per_valid_pixel_of_the_whole_batch():
    logits, labels = batch(2)
    labels[0] = IGNORE  # a mean of the images' means would halve the loss
    labels[0, 0, 0] = 1
    logged = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    valid = [(i, int(labels[i])) for i in np.ndindex(labels.shape) if labels[i] != IGNORE]
    expected = np.mean([logged[(*i, label)] for i, label in valid])
    np.testing.assert_allclose(mean_loss(logits, jnp.asarray(labels)), expected, rtol=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_only_ignored_pixels_give_zero(fraction):
    logits, labels = batch(3)
    value, gradient = jax.value_and_grad(mean_loss)(
        jnp.asarray(logits), jnp.full_like(jnp.asarray(labels), IGNORE), None, fraction
    )
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.999])
def test_hard_pixels_are_the_largest_share(fraction):
    logits, labels = batch(4, shape=(2, 20, 13))
    each = -torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    valid = labels != IGNORE
    picked = np.take_along_axis(each, np.where(valid, labels, 0)[..., None].astype(int), -1)[..., 0]
    ordered = np.sort(picked[valid])[::-1]
    kept = fraction * valid.sum()
    whole = int(kept)
    expected = (
        ordered[:whole].sum() + (kept - whole) * ordered[min(whole, len(ordered) - 1)]
    ) / kept
    value = mean_loss(logits, jnp.asarray(labels), None, fraction)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    gradient = np.asarray(
        jax.grad(mean_loss)(jnp.asarray(logits), jnp.asarray(labels), None, fraction)
    )
    touched = np.any(gradient != 0, axis=-1).sum()
    assert touched in (int(np.floor(kept)), int(np.ceil(kept)))


def test_equal_losses_share_what_is_left():
    values = jnp.asarray([[[1.0, 1.0, 1.0, 2.0]]])
    weights = losses.largest_share(values, jnp.ones_like(values, bool), jnp.asarray(2.0))
    np.testing.assert_allclose(np.asarray(weights).ravel(), [1 / 3, 1 / 3, 1 / 3, 1])
