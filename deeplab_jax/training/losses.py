"""Losses over the valid (not ignored) pixels, as (sum, count) pairs.

The mean is taken once, over the whole batch and all devices: `mean(loss_sum, loss_count)`. The
count depends on the labels only, so it is known before the first microbatch is computed.

There are two kinds of losses. A pixel loss gives a value for each pixel, weighted by class and
optionally limited to the hardest pixels (OHEM); its count is the sum of the weights. An image loss
gives a value for each image; its count is the number of images with a valid pixel. The registries
`config.PIXEL_LOSSES` and `config.IMAGE_LOSSES` map names to them.
"""

from __future__ import annotations

import functools
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
    broadcast_to_batch,
    precise_einsum,
    resize_bilinear,
    source_coordinates,
)

Logits = Float[Array, "n h w classes"]
Labels = UInt8[Array, "n h w"]
PixelMap = Float[Array, "n h w"]
Scalar = Float[Array, ""]

_NUM_BLOCKS = 8  # blocks of rows in which the cross-entropy is computed


def loss_sum(
    logits: Float[Array, "n ho wo classes"],
    labels: Labels,
    config: LossConfig,
    *,
    align_corners: bool = False,
    kernel: bool = False,
) -> Scalar:
    """Returns the sum of the config's loss over pixels (pixel losses) or images (image losses).

    Args:
      logits: float32 or wider, at any resolution; resized bilinearly to that of the labels.
      labels: class ids; `labels.IGNORE` marks pixels that do not count.
      config: the loss. `class_weights` and `hard_pixel_fraction` apply to pixel losses, and
        `label_smoothing` to the cross-entropy, as in torch (arXiv 1512.00567, section 7).
      align_corners: how the model resizes its logits, see `models.ops.resize`.
      kernel: whether to use `cross_entropy_kernel`, see `step.has_cross_entropy_kernel`.
    """
    if config.name in IMAGE_LOSSES:
        upsampled = resize_bilinear(logits, *labels.shape[1:], align_corners=align_corners)
        return jnp.sum(IMAGE_LOSSES[config.name](upsampled, labels))
    smoothing, class_weights = config.label_smoothing, config.class_weights
    if smoothing:
        # Class c gets the target t_c = smoothing * weight_c / classes at every pixel. Logits whose
        # weighted mean is 0 give `sum_c -t_c log p_c` = `sum_c t_c` times the normalizer.
        table = jnp.asarray(class_weights or (1.0,) * logits.shape[-1], logits.dtype)
        logits -= jnp.sum(logits * table, axis=-1, keepdims=True) / jnp.sum(table)
    losses, *normalizers = cross_entropy(
        logits, labels, align_corners, with_normalizers=smoothing > 0, kernel=kernel
    )
    losses = PIXEL_LOSSES[config.name](losses, config) * pixel_weights(labels, class_weights)
    if smoothing:
        spread = jnp.mean(table) * normalizers[0] * pixel_weights(labels)
        losses = (1 - smoothing) * losses + smoothing * spread
    if config.hard_pixel_fraction < 1:
        valid = labels != IGNORE
        k = config.hard_pixel_fraction * jnp.sum(valid)
        losses *= lax.stop_gradient(top_k_weights(losses, valid, k))
    return jnp.sum(losses)


def loss_count(labels: Labels, config: LossConfig) -> Scalar:
    """Returns the number by which `loss_sum` must be divided."""
    if config.name in IMAGE_LOSSES:
        return jnp.sum(jnp.any(labels != IGNORE, axis=(1, 2)), dtype=jnp.float32)
    return config.hard_pixel_fraction * jnp.sum(pixel_weights(labels, config.class_weights))


def downsample_labels(
    labels: Labels, stride: int, align_corners: bool = False
) -> UInt8[Array, "n ho wo"]:
    """Downsamples labels to the logits' resolution, sampling where resizing places each logit.

    These are the centres of features, unless corners are aligned. The pixels 0, `stride`, ... lie
    half a stride away from the centres: a model trained on those would predict everything shifted
    by half a stride.

    Source: arXiv 1706.05587, section 4.1, "Upsampling logits": earlier DeepLabs trained this way.
    """
    rows, columns = (
        np.rint(source_coordinates(-(-size // stride), size, align_corners)).astype(np.int32)
        for size in labels.shape[1:]
    )
    return labels[:, rows][:, :, columns]


def mean(total: Scalar, count: Scalar) -> Scalar:
    """Returns `total / count`, or 0 if the count is 0."""
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def pixel_weights(labels: Labels, class_weights: object = None) -> PixelMap:
    """Returns the weight of each pixel: that of its class, or 1; 0 where it is ignored."""
    valid = labels != IGNORE
    if class_weights is None:
        return valid.astype(jnp.float32)
    # The ignore label is out of range: clip keeps the lookup in bounds, `where` drops the result.
    table = jnp.asarray(class_weights, jnp.float32)
    return jnp.where(valid, jnp.take(table, labels, mode="clip"), 0.0)


def cross_entropy(
    logits: Float[Array, "n ho wo classes"],
    labels: Labels,
    align_corners: bool = False,
    with_normalizers: bool = False,
    kernel: bool = False,
) -> tuple[PixelMap, ...]:
    """Returns `-log p` of each pixel's class; for ignored pixels that of class 0, which is finite.

    `with_normalizers` also returns the logarithm of the sum of `exp(logits)`.

    Logits at another resolution than the labels are resized bilinearly, some rows at a time, in the
    forward and the backward pass: the full-resolution logits are never in memory as a whole. With
    `kernel` they are only in registers, see `cross_entropy_kernel`.
    """
    targets = jnp.where(labels == IGNORE, 0, labels)
    if logits.shape[1:3] == labels.shape[1:]:
        normalizers = jax.nn.logsumexp(logits, axis=-1)
        return normalizers - _target_logits(logits, targets), normalizers
    few_rows = logits.shape[1], labels.shape[2]  # so that this is small
    widened = resize_bilinear(logits, *few_rows, align_corners=align_corners)
    if kernel and widened.dtype == jnp.float32:
        from deeplab_jax.training import cross_entropy_kernel  # imports Pallas

        maps = cross_entropy_kernel.cross_entropy(widened, targets, align_corners)
        return maps[: 1 + with_normalizers]
    return _cross_entropy_by_rows(widened, targets, align_corners, with_normalizers)


def _target_logits(logits: Logits, targets: Labels) -> PixelMap:
    """The logit of each pixel's class; a masked sum, as the gradient of indexing is a scatter."""
    return jnp.sum(logits, axis=-1, where=_is_target(logits, targets))


def _is_target(logits: Logits, targets: Labels) -> Bool[Array, "n h w classes"]:
    """One-hot labels; all false for ignored pixels."""
    return targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)


class _RowBlock(NamedTuple):
    """A block of pixel rows of all images; not of some images, which are sharded over devices."""

    start: Array  # first row of the logits on which the block depends
    matrix: Array  # `[rows, window]`, bilinear weights of that row and the next ones
    targets: Array  # `[n, rows, w]`, classes


def _row_blocks(
    wide: Float[Array, "n ho w classes"], targets: Labels, align_corners: bool
) -> _RowBlock:
    """Stacks the blocks along a new first axis; the last block is padded with zero rows."""
    n, height, width = targets.shape
    rows = -(-height // _NUM_BLOCKS)
    matrix = np.zeros((_NUM_BLOCKS, rows, wide.shape[1]))
    weights = bilinear_matrix(height, wide.shape[1], align_corners)
    matrix.reshape(_NUM_BLOCKS * rows, -1)[:height] = weights
    reads: np.ndarray = np.any(matrix, axis=1)  # [block, row of the logits]
    first = reads.argmax(axis=1)
    window = int((wide.shape[1] - reads[:, ::-1].argmax(axis=1) - first).max())
    starts = np.minimum(first, wide.shape[1] - window)
    matrix = np.stack([one[:, s : s + window] for one, s in zip(matrix, starts, strict=True)])
    targets = jnp.pad(targets, ((0, 0), (0, _NUM_BLOCKS * rows - height), (0, 0)))
    targets = jnp.moveaxis(targets.reshape(n, _NUM_BLOCKS, rows, width), 1, 0)
    return _RowBlock(jnp.asarray(starts, jnp.int32), jnp.asarray(matrix, wide.dtype), targets)


def _upsampled(wide: Array, block: _RowBlock) -> Logits:
    window = lax.dynamic_slice_in_dim(wide, block.start, block.matrix.shape[1], axis=1)
    return precise_einsum("nHh,nhWc->nHWc", broadcast_to_batch(block.matrix, wide), window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy_by_rows(
    wide: Float[Array, "n ho w classes"],
    targets: Labels,
    align_corners: bool,
    with_normalizers: bool,
) -> tuple[PixelMap, ...]:
    return _cross_entropy_by_rows_forward(wide, targets, align_corners, with_normalizers)[0]


def _cross_entropy_by_rows_forward(
    wide: Array, targets: Labels, align_corners: bool, with_normalizers: bool
) -> tuple[tuple[PixelMap, ...], tuple[Array, ...]]:
    def block_loss(_: None, block: _RowBlock) -> tuple[None, tuple[Array, Array]]:
        logits = _upsampled(wide, block)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        return None, (normalizer - _target_logits(logits, block.targets), normalizer)

    blocks = _row_blocks(wide, targets, align_corners)
    _, (losses, normalizers) = lax.scan(block_loss, None, blocks)
    n, height, width = targets.shape
    blocks_of_maps = (losses, normalizers)[: 1 + with_normalizers]
    maps = (jnp.moveaxis(x, 0, 1).reshape(n, -1, width)[:, :height] for x in blocks_of_maps)
    return tuple(maps), (wide, targets, normalizers)


def _cross_entropy_by_rows_backward(
    align_corners: bool,
    with_normalizers: bool,
    residuals: tuple[Array, ...],
    cotangents: tuple[PixelMap, ...],
) -> tuple[Array, np.ndarray]:
    wide, targets, normalizers = residuals
    n, height, width = targets.shape
    rows = normalizers.shape[2]

    def by_block(cotangent: PixelMap) -> Array:
        padded = jnp.pad(cotangent, ((0, 0), (0, _NUM_BLOCKS * rows - height), (0, 0)))
        return jnp.moveaxis(padded.reshape(n, _NUM_BLOCKS, rows, width), 1, 0)

    def add_block(gradient: Array, inputs: Any) -> tuple[Array, None]:
        block, normalizer, (cotangent, *of_normalizer) = inputs
        logits = _upsampled(wide, block)
        probabilities = jnp.exp(logits - normalizer[..., None])
        error = (probabilities - _is_target(logits, block.targets)) * cotangent[..., None]
        for cotangent in of_normalizer:
            error += probabilities * cotangent[..., None]
        window_gradient = precise_einsum(
            "nHh,nHWc->nhWc", broadcast_to_batch(block.matrix, wide), error
        )
        window_gradient += lax.dynamic_slice_in_dim(
            gradient, block.start, block.matrix.shape[1], axis=1
        )
        return lax.dynamic_update_slice_in_dim(gradient, window_gradient, block.start, axis=1), None

    blocks = (_row_blocks(wide, targets, align_corners), normalizers, [*map(by_block, cotangents)])
    gradient, _ = lax.scan(add_block, jnp.zeros_like(wide), blocks)
    return gradient, np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy_by_rows.defvjp(_cross_entropy_by_rows_forward, _cross_entropy_by_rows_backward)


def identity(losses: PixelMap, config: LossConfig) -> PixelMap:
    """Returns the cross-entropies unchanged."""
    del config
    return losses


def focal(losses: PixelMap, config: LossConfig) -> PixelMap:
    """Turns cross-entropies `-log p` into the focal loss `-(1 - p)^gamma log p`.

    It gives easy pixels little weight. `gamma` is `config.focal_gamma`; 0 gives cross-entropy. The
    paper's alpha is the class weight.

    Source: Lin et al. 2017, arXiv 1708.02002, equation 4.
    """
    gamma = config.focal_gamma
    # A floor, because the derivative of x^gamma at 0 is infinite where gamma < 1.
    wrong = jnp.maximum(-jnp.expm1(-losses), 1e-12)
    return losses if gamma == 0 else wrong**gamma * losses


def dice(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """Returns `mean over c of 1 - 2 sum(p_c y_c) / (sum(p_c) + sum(y_c))` for each image.

    The sums run over the image's valid pixels; p are probabilities, y is 1 at the pixels of the
    class. The mean is over the classes in the image's labels: the score of any other class is 0,
    whatever is predicted. The loss of an image without a valid pixel is 0.

    Source: Milletari et al. 2016, arXiv 1606.04797, with plain sums in the denominator as in Sudre
    et al. 2017, arXiv 1707.03237.
    """
    true = _is_target(logits, labels).astype(logits.dtype)
    probabilities = jax.nn.softmax(logits) * (labels != IGNORE)[..., None]
    both = jnp.sum(probabilities * true, axis=(1, 2))
    true_sum = jnp.sum(true, axis=(1, 2))
    total = jnp.sum(probabilities, axis=(1, 2)) + true_sum
    present = true_sum > 0
    return _mean_present(1 - 2 * both / jnp.where(present, total, 1.0), present)


def lovasz(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """The Lovász-softmax loss of each image: a convex surrogate of 1 - IoU, mean over classes.

    With the errors `m_c = |y_c - p_c|` of the image's valid pixels in decreasing order, the loss of
    a class is `sum_i m_c(i) (J_i - J_{i-1})`, where `J_i = 1 - IoU` if exactly the first i pixels
    are wrong. The mean is over the classes in the image's labels. The loss of an image without a
    valid pixel is 0.

    Source: Berman et al. 2018, arXiv 1705.08790, the Lovász-Softmax loss and algorithm 1.
    """
    n, h, w, classes = logits.shape
    true = _is_target(logits, labels).astype(logits.dtype)
    errors = jnp.abs(true - jax.nn.softmax(logits)) * (labels != IGNORE)[..., None]
    # One class at a time, so that the memory for sorting is needed only once.
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
    """Returns `J_i - J_{i-1}` for each pixel, with i its rank by error; see `lovasz`.

    Let G be the number of pixels of the class, and F and B the numbers of pixels inside and outside
    the class among the first i. Then `J = 1 - (G - F) / (G + B)`. The difference is computed in
    closed form, because in float32 the two J of an image with many pixels are almost equal.
    """
    positions = lax.broadcasted_iota(jnp.int32, errors.shape, 1)
    kinds = true.astype(jnp.int32) + 2 * valid.astype(jnp.int32)  # 3: in the class, 2: outside
    _, kinds, positions = lax.sort((-errors, kinds, positions), num_keys=1)
    inside = kinds == 3
    missed = jnp.sum(inside, axis=1, keepdims=True) - jnp.cumsum(inside, axis=1)  # G - F
    union = jnp.sum(inside, axis=1, keepdims=True) + jnp.cumsum(kinds == 2, axis=1)  # G + B
    missed, union = missed.astype(errors.dtype), jnp.maximum(union, 1).astype(errors.dtype)
    differences = jnp.where(inside, 1 / union, missed / (union * jnp.maximum(union - 1, 1)))
    # Sorting by position restores the pixel order; a scatter would too, but slowly on TPUs.
    differences = lax.sort((positions, differences), num_keys=1)[1]
    return jnp.where(valid, differences, 0.0)


def _mean_present(
    losses: Float[Array, "n classes"], present: Bool[Array, "n classes"]
) -> Float[Array, " n"]:
    count = jnp.maximum(jnp.sum(present, axis=1), 1)
    return jnp.sum(jnp.where(present, losses, 0.0), axis=1) / count


def top_k_weights(values: PixelMap, valid: Bool[Array, "n h w"], k: Float[Array, ""]) -> PixelMap:
    """Returns weights in 0..1 that sum to `k` and select the largest valid values.

    The threshold is found by bisection over the bits of a float, because non-negative floats are
    ordered as their bits. It takes 31 counts and no sort, and so stays cheap for sharded pixels.
    Values equal to the threshold get equal fractional weights.

    Args:
      values: non-negative values.
      valid: pixels to select from.
      k: how many to select; need not be an integer.
    """
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    bits = jnp.where(valid, bits, -1)

    def next_bit(index: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.int32(1) << (30 - index))
        return jnp.where(jnp.sum(bits >= candidate) >= k, candidate, threshold)

    threshold = lax.fori_loop(0, 31, next_bit, jnp.int32(0))
    above, equal = bits > threshold, bits == threshold
    rest = (k - jnp.sum(above)) / jnp.maximum(jnp.sum(equal), 1)
    return jnp.where(above, 1.0, jnp.where(equal, rest, 0.0)).astype(values.dtype)
