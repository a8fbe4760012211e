"""Losses over the pixels that are not ignored, as (sum, count) pairs.

The mean is taken once, over the whole batch and all devices: `sum / count`. The count depends on
the labels alone, so that it is known before the batch is computed in parts.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, UInt8

from deeplab_jax.labels import IGNORE

Labels = UInt8[Array, "n h w"]
PixelMap = Float[Array, "n h w"]


def pixel_weights(labels: Labels, class_weights: tuple[float, ...] | None = None) -> PixelMap:
    """The weight of each pixel: its class's, or 1; 0 where it is ignored."""
    valid = labels != IGNORE
    if class_weights is None:
        return valid.astype(jnp.float32)
    # Ignored labels are beyond the table: clip keeps the lookup in bounds, `where` drops it.
    table = jnp.asarray(class_weights, jnp.float32)
    return jnp.where(valid, jnp.take(table, labels, mode="clip"), 0.0)


def cross_entropy_count(weights: PixelMap, hard_pixel_fraction: float = 1.0) -> Float[Array, ""]:
    """What `cross_entropy_sum` is to be divided by."""
    return hard_pixel_fraction * jnp.sum(weights)


def cross_entropy_sum(
    logits: Float[Array, "n h w classes"],
    labels: Labels,
    weights: PixelMap,
    hard_pixel_fraction: float = 1.0,
) -> Float[Array, ""]:
    """Sum of weighted cross-entropies over the hardest pixels.

    Args:
      logits: of the classes, in float32 or wider.
      labels: class ids; `labels.IGNORE` where the weight is 0.
      weights: from `pixel_weights`.
      hard_pixel_fraction: the share of valid pixels that counts, those of the highest weighted
        loss; a pixel at the boundary counts in part, so that the share is exact.
    """
    valid = labels != IGNORE
    # An ignored pixel takes class 0 and weight 0: finite, and without a gradient.
    targets = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights
    if hard_pixel_fraction < 1:
        kept = hard_pixel_fraction * jnp.sum(valid)
        losses *= lax.stop_gradient(largest_share(losses, valid, kept))
    return jnp.sum(losses)


def largest_share(values: PixelMap, valid: Array, count: Float[Array, ""]) -> PixelMap:
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


def mean(total: Float[Array, ""], count: Float[Array, ""]) -> Float[Array, ""]:
    """`total / count`, and 0 where nothing counts."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)
