"""Losses over the pixels that are not ignored, as (sum, count) pairs.

The mean is taken once, over the whole batch and all devices: `mean(loss_sum, loss_count)`. The
count depends on the labels alone, so that it is known before the batch is computed in parts.

There are two kinds. A loss of a pixel is weighted by class and may count the hardest pixels alone;
its count is the sum of weights. A loss of an image is a score of the image's classes; its count is
the number of images that have a valid pixel. `config.PIXEL_LOSSES` and `config.IMAGE_LOSSES` hold
them by name; a new loss is a function and a line there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from deeplab_jax.config import IMAGE_LOSSES, PIXEL_LOSSES, LossConfig
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.models.ops.resize import (
    bilinear_matrix,
    centres,
    for_each_image,
    product,
    resize_bilinear,
)

Logits = Float[Array, "n h w classes"]
Labels = UInt8[Array, "n h w"]
PixelMap = Float[Array, "n h w"]
Scalar = Float[Array, ""]

_PARTS = 8  # that the rows of a loss of pixels are computed in


def loss_sum(logits: Float[Array, "n ho wo classes"], labels: Labels, config: LossConfig) -> Scalar:
    """Sum of the config's loss over pixels, or over images, whichever it is a loss of.

    Args:
      logits: of the classes, in float32 or wider, of any height and width: they are resized
        bilinearly to the labels'.
      labels: class ids; `labels.IGNORE` where a pixel does not count.
      config: its `class_weights` and `hard_pixel_fraction` hold for the losses of pixels.
    """
    if config.name in IMAGE_LOSSES:
        upsampled = resize_bilinear(logits, *labels.shape[1:])
        return jnp.sum(IMAGE_LOSSES[config.name](upsampled, labels))
    losses = PIXEL_LOSSES[config.name](cross_entropy(logits, labels), config)
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


def shrink_labels(labels: Labels, stride: int) -> UInt8[Array, "n ho wo"]:
    """The label of the pixel on which upsampling lays each pixel of features of a stride.

    Those of the stride's own grid, 0, `stride`, ..., lie half a stride away: a model trained on
    them would put all it sees that far aside when it is evaluated.

    Source: arXiv 1706.05587, section 4.1, "Upsampling logits": earlier DeepLabs trained so.
    """
    rows, columns = (
        np.rint(centres(-(-size // stride), size)).astype(np.int32) for size in labels.shape[1:]
    )
    return labels[:, rows][:, :, columns]


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


def cross_entropy(logits: Float[Array, "n ho wo classes"], labels: Labels) -> PixelMap:
    """`-log p` of each pixel's class; that of class 0 where it is ignored, which is finite.

    Logits of another size than the labels' are resized bilinearly, some rows at a time, both here
    and for the gradient: those of all pixels are never in memory together.
    """
    targets = jnp.where(labels == IGNORE, 0, labels)
    if logits.shape[1:3] == labels.shape[1:]:
        return jax.nn.logsumexp(logits, axis=-1) - _of_target(logits, targets)
    return _cross_entropy_by_rows(_widened(logits, labels), targets)


def _of_target(logits: Logits, targets: Labels) -> PixelMap:
    """The logit of each pixel's class; by comparison, as the gradient of indexing is a scatter."""
    return jnp.sum(logits, axis=-1, where=_is_target(logits, targets))


def _is_target(logits: Logits, targets: Labels) -> Bool[Array, "n h w classes"]:
    return targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)


def _widened(logits: Float[Array, "n ho wo classes"], labels: Labels) -> Array:
    """Logits resized to the labels' width; few rows, so a small map."""
    return resize_bilinear(logits, logits.shape[1], labels.shape[2])


class _Part(NamedTuple):
    """Some rows of the pixels of all images: rows, not images, which are divided over devices.

    Fields:
      start: first row of the logits that they depend on.
      matrix: `[rows, window]`, the weights of that row and those behind it.
      targets: `[n, rows, w]`, classes.
    """

    start: Array
    matrix: Array
    targets: Array


def _parts(wide: Float[Array, "n ho w classes"], targets: Labels) -> _Part:
    """The parts, stacked; rows past the last one fill the last part."""
    n, height, width = targets.shape
    rows = -(-height // _PARTS)
    matrix = np.zeros((_PARTS, rows, wide.shape[1]))
    matrix.reshape(_PARTS * rows, -1)[:height] = bilinear_matrix(height, wide.shape[1])
    reads: np.ndarray = np.any(matrix, axis=1)  # [part, row of the logits]
    first = reads.argmax(axis=1)
    window = int((wide.shape[1] - reads[:, ::-1].argmax(axis=1) - first).max())
    starts = np.minimum(first, wide.shape[1] - window)
    matrix = np.stack([one[:, s : s + window] for one, s in zip(matrix, starts, strict=True)])
    targets = jnp.pad(targets, ((0, 0), (0, _PARTS * rows - height), (0, 0)))
    targets = jnp.moveaxis(targets.reshape(n, _PARTS, rows, width), 1, 0)
    return _Part(jnp.asarray(starts, jnp.int32), jnp.asarray(matrix, wide.dtype), targets)


def _upsampled(wide: Array, part: _Part) -> Logits:
    window = lax.dynamic_slice_in_dim(wide, part.start, part.matrix.shape[1], axis=1)
    return product("nHh,nhWc->nHWc", for_each_image(part.matrix, wide), window)


@jax.custom_vjp
def _cross_entropy_by_rows(wide: Float[Array, "n ho w classes"], targets: Labels) -> PixelMap:
    return _cross_entropy_by_rows_forward(wide, targets)[0]


def _cross_entropy_by_rows_forward(
    wide: Array, targets: Labels
) -> tuple[PixelMap, tuple[Array, ...]]:
    def of_part(_: None, part: _Part) -> tuple[None, tuple[Array, Array]]:
        logits = _upsampled(wide, part)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        return None, (normalizer - _of_target(logits, part.targets), normalizer)

    _, (losses, normalizers) = lax.scan(of_part, None, _parts(wide, targets))
    n, height, width = targets.shape
    losses = jnp.moveaxis(losses, 0, 1).reshape(n, -1, width)[:, :height]
    return losses, (wide, targets, normalizers)


def _cross_entropy_by_rows_backward(
    kept: tuple[Array, ...], cotangent: PixelMap
) -> tuple[Array, np.ndarray]:
    wide, targets, normalizers = kept
    n, height, width = targets.shape
    rows = normalizers.shape[2]
    cotangent = jnp.pad(cotangent, ((0, 0), (0, _PARTS * rows - height), (0, 0)))
    cotangents = jnp.moveaxis(cotangent.reshape(n, _PARTS, rows, width), 1, 0)

    def add_part(gradient: Array, inputs: Any) -> tuple[Array, None]:
        part, normalizer, cotangent = inputs
        logits = _upsampled(wide, part)
        probabilities = jnp.exp(logits - normalizer[..., None])
        error = (probabilities - _is_target(logits, part.targets)) * cotangent[..., None]
        of_window = product("nHh,nHWc->nhWc", for_each_image(part.matrix, wide), error)
        of_window += lax.dynamic_slice_in_dim(gradient, part.start, part.matrix.shape[1], axis=1)
        return lax.dynamic_update_slice_in_dim(gradient, of_window, part.start, axis=1), None

    parts = (_parts(wide, targets), normalizers, cotangents)
    gradient, _ = lax.scan(add_part, jnp.zeros_like(wide), parts)
    return gradient, np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy_by_rows.defvjp(_cross_entropy_by_rows_forward, _cross_entropy_by_rows_backward)


def identity(losses: PixelMap, config: LossConfig) -> PixelMap:
    """Cross-entropies as they are."""
    del config
    return losses


def focal(losses: PixelMap, config: LossConfig) -> PixelMap:
    """Focal loss `-(1 - p)^gamma log p` of cross-entropies `-log p`: easy pixels count little.

    `gamma` is `config.focal_gamma`; 0 gives cross-entropy. The paper's alpha is the class weight.

    Source: Lin et al. 2017, arXiv 1708.02002, equation 4.
    """
    gamma = config.focal_gamma
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
