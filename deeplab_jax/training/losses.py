"""Losses over the pixels that are not ignored, as (sum, count) pairs.

The mean is taken once, over the whole batch and all devices: `mean(loss_sum, loss_count)`. The
count depends on the labels alone, so that it is known before the batch is computed in parts.

There are two kinds. A loss of a pixel is weighted by class and may count the hardest pixels alone;
its count is the sum of weights. A loss of an image is a score of the image's classes; its count is
the number of images that have a valid pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from deeplab_jax.config import LossConfig
from deeplab_jax.labels import IGNORE

Logits = Float[Array, "n h w classes"]
Labels = UInt8[Array, "n h w"]
PixelMap = Float[Array, "n h w"]
Scalar = Float[Array, ""]


def loss_sum(logits: Logits, labels: Labels, config: LossConfig) -> Scalar:
    """Sum of the config's loss over pixels, or over images, whichever it is a loss of.

    Args:
      logits: of the classes, in float32 or wider.
      labels: class ids; `labels.IGNORE` where a pixel does not count.
      config: its `class_weights` and `hard_pixel_fraction` hold for the losses of pixels.
    """
    if config.name in IMAGE_LOSSES:
        return jnp.sum(IMAGE_LOSSES[config.name](logits, labels))
    losses = PIXEL_LOSSES[config.name](logits, labels, config)
    losses *= pixel_weights(labels, config.class_weights)
    if config.hard_pixel_fraction < 1:
        valid = labels != IGNORE
        kept = config.hard_pixel_fraction * jnp.sum(valid)
        losses *= lax.stop_gradient(largest_share(losses, valid, kept))
    return jnp.sum(losses)


def loss_count(labels: Labels, config: LossConfig) -> Scalar:
    """What `loss_sum` is to be divided by."""
    if config.name in IMAGE_LOSSES:
        return jnp.sum(jnp.any(labels != IGNORE, axis=(1, 2)), dtype=jnp.float32)
    return config.hard_pixel_fraction * jnp.sum(pixel_weights(labels, config.class_weights))


def mean(total: Scalar, count: Scalar) -> Scalar:
    """`total / count`, and 0 where nothing counts."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def pixel_weights(labels: Labels, class_weights: object = None) -> PixelMap:
    """The weight of each pixel: its class's (one number a class), or 1; 0 where it is ignored."""
    valid = labels != IGNORE
    if class_weights is None:
        return valid.astype(jnp.float32)
    # Ignored labels are beyond the table: clip keeps the lookup in bounds, `where` drops it.
    table = jnp.asarray(class_weights, jnp.float32)
    return jnp.where(valid, jnp.take(table, labels, mode="clip"), 0.0)


def cross_entropy(logits: Logits, labels: Labels) -> PixelMap:
    """`-log p` of each pixel's class; that of class 0 where it is ignored, which is finite."""
    targets = jnp.where(labels == IGNORE, 0, labels).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def focal(logits: Logits, labels: Labels, gamma: float) -> PixelMap:
    """`-(1 - p)^gamma log p` of each pixel's class: what is right already counts little.

    Its alpha is the class's weight. With `gamma = 0` it is cross-entropy.

    Source: Lin et al. 2017, arXiv 1708.02002, equation 4.
    """
    losses = cross_entropy(logits, labels)
    # A floor, because the derivative of x^gamma at 0 is infinite where gamma < 1.
    wrong = jnp.maximum(-jnp.expm1(-losses), 1e-12)
    return losses if gamma == 0 else wrong**gamma * losses


def dice(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """`mean over c of 1 - 2 sum(p_c y_c) / (sum(p_c) + sum(y_c))` of each image.

    The sums run over the image's valid pixels; p are probabilities, y is 1 at the pixels of the
    class. The mean is over the classes that the image's labels hold: one that they do not hold has
    a score of 0 whatever is predicted. An image without a valid pixel has the loss 0.

    Source: Milletari et al. 2016, arXiv 1606.04797, with plain sums in the denominator as in Sudre
    et al. 2017, arXiv 1707.03237.
    """
    true = _one_hot(labels, logits)
    probabilities = jax.nn.softmax(logits) * (labels != IGNORE)[..., None]
    both = jnp.sum(probabilities * true, axis=(1, 2))
    true_sum = jnp.sum(true, axis=(1, 2))
    total = jnp.sum(probabilities, axis=(1, 2)) + true_sum
    present = true_sum > 0
    return _mean_present(1 - 2 * both / jnp.where(present, total, 1.0), present)


def lovasz(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """The Lovász-softmax loss of each image: a convex surrogate of 1 - IoU, mean over classes.

    With the errors `m_c = |y_c - p_c|` of the image's valid pixels in decreasing order, the loss of
    a class is `sum_i m_c(i) (J_i - J_{i-1})`, where `J_i = 1 - IoU` if the first i pixels alone are
    wrong. The mean is over the classes that the image's labels hold. An image without a valid pixel
    has the loss 0.

    Source: Berman et al. 2018, arXiv 1705.08790, the Lovász-Softmax loss and algorithm 1.
    """
    n, h, w, classes = logits.shape
    true = _one_hot(labels, logits)
    errors = jnp.abs(true - jax.nn.softmax(logits)) * (labels != IGNORE)[..., None]
    # Class by class, so that what sorting needs is never there for all of them at once.
    by_class = jnp.moveaxis(lax.stop_gradient(errors), -1, 0).reshape(classes, n, h * w)
    valid = (labels != IGNORE).reshape(n, h * w)
    weights = lax.map(
        lambda one: _lovasz_weights(one[0], labels.reshape(n, h * w) == one[1], valid),
        (by_class, jnp.arange(classes, dtype=jnp.uint8)),
    )
    weights = jnp.moveaxis(weights.reshape(classes, n, h, w), 0, -1)
    losses = jnp.sum(errors * weights, axis=(1, 2))
    return _mean_present(losses, jnp.sum(true, axis=(1, 2)) > 0)


def _lovasz_weights(
    errors: Float[Array, "n pixels"], true: Bool[Array, "n pixels"], valid: Bool[Array, "n pixels"]
) -> Float[Array, "n pixels"]:
    """`J_i - J_{i-1}` of each pixel, i its rank by error; see `lovasz`.

    With G pixels of the class, F and B of it and not of it among the first i, J is
    `1 - (G - F) / (G + B)`. The difference is written out: in float32 the two J of an image with
    many pixels are almost equal.
    """
    places = lax.broadcasted_iota(jnp.int32, errors.shape, 1)
    kinds = true.astype(jnp.int32) + 2 * valid.astype(jnp.int32)  # 3: the class's, 2: another's
    _, kinds, places = lax.sort((-errors, kinds, places), num_keys=1)
    inside = kinds == 3
    missed = jnp.sum(inside, axis=1, keepdims=True) - jnp.cumsum(inside, axis=1)  # G - F
    union = jnp.sum(inside, axis=1, keepdims=True) + jnp.cumsum(kinds == 2, axis=1)  # G + B
    missed, union = missed.astype(errors.dtype), jnp.maximum(union, 1).astype(errors.dtype)
    differences = jnp.where(inside, 1 / union, missed / (union * jnp.maximum(union - 1, 1)))
    # Sorted by place, each is where its pixel is; a scatter would do the same, slowly on TPUs.
    differences = lax.sort((places, differences), num_keys=1)[1]
    return jnp.where(valid, differences, 0.0)


def _one_hot(labels: Labels, logits: Logits) -> Logits:
    """1 at the pixels of a class; ignored pixels have none."""
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    return (labels[..., None] == classes).astype(logits.dtype)


def _mean_present(
    losses: Float[Array, "n classes"], present: Bool[Array, "n classes"]
) -> Float[Array, " n"]:
    count = jnp.maximum(jnp.sum(present, axis=1), 1)
    return jnp.sum(jnp.where(present, losses, 0.0), axis=1) / count


def largest_share(
    values: PixelMap, valid: Bool[Array, "n h w"], count: Float[Array, ""]
) -> PixelMap:
    """Weights in 0..1, adding up to `count`, that pick the largest of the valid values.

    The threshold is found by bisection over the bits of a float, whose order is the order of
    non-negative floats: 31 counts and no sort, so that it stays cheap where the pixels are divided
    over devices. Values equal to the threshold share what is left of the count.

    Args:
      values: of 0 or more.
      valid: where values are taken from.
      count: how many to pick, not necessarily whole.
    """
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    bits = jnp.where(valid, bits, -1)

    def next_bit(index: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.int32(1) << (30 - index))
        return jnp.where(jnp.sum(bits >= candidate) >= count, candidate, threshold)

    threshold = lax.fori_loop(0, 31, next_bit, jnp.int32(0))
    above, equal = bits > threshold, bits == threshold
    rest = (count - jnp.sum(above)) / jnp.maximum(jnp.sum(equal), 1)
    return jnp.where(above, 1.0, jnp.where(equal, rest, 0.0)).astype(values.dtype)


# By `LossConfig.name`; `config.LOSSES` holds the same names.
PIXEL_LOSSES: dict[str, Callable[[Array, Array, LossConfig], Array]] = {
    "cross_entropy": lambda logits, labels, config: cross_entropy(logits, labels),
    "focal": lambda logits, labels, config: focal(logits, labels, config.focal_gamma),
}
IMAGE_LOSSES: dict[str, Callable[[Array, Array], Array]] = {"dice": dice, "lovasz": lovasz}
