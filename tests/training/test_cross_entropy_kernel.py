"""The Pallas kernel, interpreted on CPU, against float64 NumPy and the losses without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.config import LossConfig
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.models.ops.resize import bilinear_matrix
from deeplab_jax.training import cross_entropy_kernel as kernel
from deeplab_jax.training import losses


def in_float64(logits, targets, cotangents, align_corners):
    """Losses, normalizers and gradient, by full-size logits in memory."""
    matrix = bilinear_matrix(targets.shape[1], logits.shape[1], align_corners)
    large = np.einsum("Hh,nhwc->nHwc", matrix, logits.astype(np.float64))
    normalizers = np.log(np.exp(large).sum(3))
    one_hot = targets[..., None] == np.arange(logits.shape[3])
    to_losses, to_normalizers = (each[..., None] for each in cotangents)
    error = np.exp(large - normalizers[..., None]) * (to_losses + to_normalizers)
    gradient = np.einsum("Hh,nHwc->nhwc", matrix, error - one_hot * to_losses)
    return normalizers - (large * one_hot).sum(3), normalizers, gradient


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("n", "rows", "height", "width", "classes"),
    [
        (2, 5, 33, 40, 21),  # the last block of columns is not full
        (1, 4, 9, 70, 150),
        (1, 1, 7, 9, 2),  # one row of logits
        (1, 9, 4, 33, 3),  # fewer rows of labels than of logits
        (1, 33, 34, 5, 32),
    ],
)
def test_equals_numpy(n, rows, height, width, classes, align_corners):
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((n, rows, width, classes))).astype(np.float32)
    targets = rng.integers(0, classes, (n, height, width)).astype(np.uint8)
    cotangents = tuple(rng.random((2, n, height, width)).astype(np.float32))
    expected = in_float64(logits, targets, cotangents, align_corners)

    def loss(logits):
        return kernel.cross_entropy(logits, jnp.asarray(targets), align_corners, True)

    maps, gradient = jax.vjp(loss, jnp.asarray(logits))
    found = (*maps, *gradient(tuple(map(jnp.asarray, cotangents))))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    logits = jnp.tile(jnp.asarray([1000.0, -1000.0]), (1, 1, 4, 1))
    targets = jnp.ones((1, 2, 4), jnp.uint8)
    maps, gradient = jax.vjp(lambda x: kernel.cross_entropy(x, targets, False, True), logits)
    np.testing.assert_array_equal(maps[0], np.full((1, 2, 4), 2000.0))
    assert jnp.all(jnp.isfinite(gradient(maps)[0]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.1, "class_weights": (1.0, 2.0, 0.5, 1.0)},
        {"hard_pixel_fraction": 0.5},
        {"name": "focal"},
    ],
)
def test_losses_with_the_kernel_are_those_without(monkeypatch, settings):
    monkeypatch.setattr(kernel, "cross_entropy", lambda *a, f=kernel.cross_entropy: f(*a, True))
    rng = np.random.default_rng(1)
    logits = jnp.asarray(3 * rng.standard_normal((2, 5, 6, 4)), jnp.float32)
    labels = rng.integers(0, 4, (2, 33, 41)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = IGNORE
    labels, config = jnp.asarray(labels), LossConfig(**settings)

    def value_and_gradient(with_kernel):
        def loss(logits):
            return losses.loss_sum(logits, labels, config, kernel=with_kernel)

        return jax.value_and_grad(loss)(logits)

    ours, expected = value_and_gradient(True), value_and_gradient(False)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-4, atol=1e-4)
