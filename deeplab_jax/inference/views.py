"""Predictions of a batch, averaged over scaled and mirrored views; traced by `jax.jit`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, UInt8

from deeplab_jax.inference.positive import PositiveClass, choose_ids
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.models.ops.masking import mask_outside
from deeplab_jax.models.ops.resize import resize_bilinear


def scaled_side(side: int, scale: float) -> int:
    """Scales a side and rounds it to the nearest pixel, at least 1."""
    return max(1, math.floor(side * scale + 0.5))


def predict_probabilities(
    model: FunctionalModel,
    variables: Variables,
    images: Float[Array, "n h w c"],
    sizes: Int[Array, "n 2"] | None,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Float[Array, "n h w classes"]:
    """Computes the probability of each class at each pixel, averaged over views.

    Each view is the image resized to its `scaled_side` (bilinear, half-pixel centres, no
    antialiasing; unchanged at scale 1). The softmax of the model's logits, at the view's size, is
    resized back and averaged, as in arXiv 1706.05587, section 4.1, and its authors' code.

    Must be called under `jax.jit`: one program then contains the network once per scale.

    Args:
      model, variables: functions of an architecture, and its arrays.
      images: normalized pixels; those outside an image's size have no effect.
      sizes: height and width of each image, pixels; None: there is no padding.
      scales: of the views, relative to the image.
      flip: whether to average over mirror images too; each is mirrored within its own width.

    Returns:
      Probabilities; undefined outside an image's size.
    """
    height, width = images.shape[1:3]
    largest = jnp.asarray([height, width])
    sizes = jnp.tile(largest, (len(images), 1)) if sizes is None else jnp.clip(sizes, 1, largest)
    views = []
    for scale in scales:
        view, view_sizes = images, sizes
        if scale != 1:
            # From a table, which is rounded as on the host and not in float32.
            longest = range(max(height, width) + 1)
            view_sizes = jnp.asarray([scaled_side(side, scale) for side in longest])[sizes]
            padded = scaled_side(height, scale), scaled_side(width, scale)
            view = resize_bilinear(images, *padded, in_sizes=sizes, out_sizes=view_sizes)
        directions = [view, _mirror(view, view_sizes)] if flip else [view]
        logits = _logits(
            model,
            variables,
            jnp.concatenate(directions),
            jnp.concatenate([view_sizes] * len(directions)),
        )
        result = jax.nn.softmax(logits, axis=-1)
        if flip:
            straight, mirrored = jnp.split(result, 2)
            result = (straight + _mirror(mirrored, view_sizes)) / 2
        if scale != 1:
            result = resize_bilinear(result, height, width, in_sizes=view_sizes, out_sizes=sizes)
        views.append(result)
    return functools.reduce(jnp.add, views) / len(scales)


def predict_ids(
    model: FunctionalModel,
    variables: Variables,
    images: Float[Array, "n h w c"],
    sizes: Int[Array, "n 2"] | None,
    positive: PositiveClass | None = None,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tuple[UInt8[Array, "n h w"], Float32[Array, "n h w"] | None]:
    """Computes the class of each pixel, and the probability of the positive class if there is one.

    Without a threshold it is the most probable class; without augmentation, that of the highest
    logit: softmax may round two logits to one probability. The values of `positive` may be traced;
    the other arguments are as of `predict_probabilities`.
    """
    scores = None
    if is_plain := tuple(scales) == (1.0,) and not flip:
        ranked = _logits(model, variables, images, sizes)
    else:
        ranked = predict_probabilities(model, variables, images, sizes, scales=scales, flip=flip)
    if positive is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1) if is_plain else ranked
        scores = jnp.take(probabilities, positive.class_id, axis=-1).astype(jnp.float32)
    return choose_ids(ranked, scores, positive).astype(jnp.uint8), scores


def _logits(
    model: FunctionalModel,
    variables: Variables,
    images: Float[Array, "n h w c"],
    sizes: Int[Array, "n 2"] | None,
) -> Float[Array, "n h w classes"]:
    """Applies a model; one with padding "same" to sides of a multiple of its output stride plus 1.

    Such models were trained at these sides, at which padding is symmetric and aligned corners meet
    the centres of features. At others features are shifted against the image. So each image is
    enlarged to the next of them with the mean colour, as in TensorFlow's `research/deeplab`.
    """

    def aligned(side: Any) -> Any:
        return -(-(side - 1) // stride) * stride + 1

    stride = model.architecture.output_stride
    if model.architecture.padding != "same" or sizes is None:
        return model.apply(variables, images, sizes=sizes)[0]["out"]
    height, width = images.shape[1:3]
    rows, columns = (aligned(side) - side for side in (height, width))
    images = mask_outside(images, sizes)
    images = jnp.pad(images, ((0, 0), (0, rows), (0, columns), (0, 0)))
    logits = model.apply(variables, images, sizes=aligned(sizes))[0]["out"]
    return logits[:, :height, :width]


def _mirror(x: Float[Array, "n h w c"], sizes: Int[Array, "n 2"]) -> Float[Array, "n h w c"]:
    """Mirrors each image left to right within its own width."""
    columns = jnp.maximum(sizes[:, 1:] - 1 - jnp.arange(x.shape[2]), 0)
    return jnp.take_along_axis(x, columns[:, None, :, None], axis=2)
