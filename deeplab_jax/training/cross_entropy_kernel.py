"""Cross-entropy of logits that are upsampled on the way: a Pallas kernel for NVIDIA GPUs.

The rows of full-resolution logits between two rows of the small logits depend on these two only. A
program of the kernel keeps a block of both in registers, goes over the rows between them, and
interpolates, normalizes and compares each. Full-resolution logits are never in memory: for 16
images of 513x513 with 21 classes, XLA would read and write 5 GB of them, and the kernel 0.2 GB.

Each sum has a fixed order, so results are the same in each run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, UInt8

from deeplab_jax.models.ops.resize import bilinear_matrix

# A thread holds all classes of a pixel, up to this number, so that sums over classes need no other
# thread. Blocks of 64 pixels whose threads shared pixels took 5 times as long.
_CLASSES_OF_A_THREAD = 32
_PIXELS = 32  # of a block: the threads of a warp

Logits = Float[Array, "n h w classes"]
Wide = Float[Array, "n h classes w"]  # so that the threads of a warp read neighbouring numbers
Targets = UInt8[Array, "n height w"]
PixelMap = Float[Array, "n height w"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits: Logits, targets: Targets, align_corners: bool, interpret: bool = False
) -> tuple[PixelMap, PixelMap]:
    """Returns `-log p` of each pixel's class and the normalizer `log sum exp` of its logits.

    Args:
      logits: float32, as wide as the labels, at any height.
      targets: class ids below the number of classes.
      align_corners: how rows are interpolated, see `models.ops.resize`.
      interpret: run the kernel's program by JAX, on any device, to test it.
    """
    return _forward(logits, targets, align_corners, interpret)[0]


def _forward(
    logits: Logits, targets: Targets, align_corners: bool, interpret: bool
) -> tuple[tuple[PixelMap, PixelMap], tuple[Array, ...]]:
    wide = jnp.moveaxis(logits, 3, 2)
    shape = jax.ShapeDtypeStruct(targets.shape, wide.dtype)
    call = _call(_forward_kernel, wide, targets.shape[1], align_corners, interpret, (shape, shape))
    losses, normalizers = call(wide, targets)
    return (losses, normalizers), (wide, targets, normalizers)


def _backward(
    align_corners: bool,
    interpret: bool,
    residuals: tuple[Array, ...],
    cotangents: tuple[PixelMap, PixelMap],
) -> tuple[Logits, np.ndarray]:
    wide, targets, normalizers = residuals
    shape = jax.ShapeDtypeStruct(wide.shape, wide.dtype)
    call = _call(_backward_kernel, wide, targets.shape[1], align_corners, interpret, (shape, shape))
    # Both results contain the normalizer, whose gradient is the probabilities.
    above, below = call(wide, targets, normalizers, cotangents[0], cotangents[0] + cotangents[1])
    gradient = above + jnp.pad(below[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    return jnp.moveaxis(gradient, 2, 3), np.zeros(targets.shape, jax.dtypes.float0)


cross_entropy.defvjp(_forward, _backward)


def _call(
    kernel: Any, wide: Wide, height: int, align_corners: bool, interpret: bool, out_shape: Any
) -> Any:
    n, rows, num_classes, width = wide.shape
    padded_classes = pl.next_power_of_2(num_classes)
    num_warps = max(1, min(16, padded_classes // _CLASSES_OF_A_THREAD))
    starts, fractions = _row_intervals(height, rows, align_corners)
    call = pl.pallas_call(
        functools.partial(kernel, padded_classes=padded_classes),
        grid=(pl.cdiv(width, _PIXELS), rows, n),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=num_warps),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )
    return functools.partial(call, jnp.asarray(starts), jnp.asarray(fractions, wide.dtype))


def _row_intervals(height: int, rows: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the interval below each small row begins, and each row's weight of the next.

    Returns:
      int32 `[rows + 1]`: row i of the small map and row i + 1 give the rows from element i to
      element i + 1 of this array; and float64 `[height]`: the weight of row i + 1 in each.
    """
    matrix = bilinear_matrix(height, rows, align_corners)
    above = (matrix > 0).argmax(axis=1)
    starts = np.searchsorted(above, np.arange(rows + 1)).astype(np.int32)
    return starts, 1 - matrix[np.arange(height), above]


class _Block(NamedTuple):
    """What a program of the kernels works on: the rows between two rows of the small logits."""

    image: Array
    row: Array  # the upper one
    above: Float[Array, "classes pixels"]  # logits of the upper row
    below: Float[Array, "classes pixels"]
    classes: Array  # with those that pad the block, as `columns`
    columns: Array
    is_class: Array  # which classes exist, `[classes, 1]`
    inside: Array  # which columns exist

    def interpolated(self, fraction: Array) -> Float[Array, "classes pixels"]:
        """Returns the logits of the row at this fraction; the lowest number as padding."""
        logits = self.above * (1 - fraction) + self.below * fraction
        return jnp.where(self.is_class, logits, float(jnp.finfo(logits.dtype).min))


def _block(wide_ref: Any, padded_classes: int) -> _Block:
    """Loads this program's block."""
    _, rows, num_classes, width = wide_ref.shape
    column, row, image = (pl.program_id(axis) for axis in range(3))
    columns = column * _PIXELS + jnp.arange(_PIXELS)
    classes = jnp.arange(padded_classes)
    is_class, inside = (classes < num_classes)[:, None], columns < width
    mask = is_class & inside[None, :]
    above, below = (
        triton.load(
            wide_ref.at[image, each, classes[:, None], columns[None, :]], mask=mask, other=0.0
        )
        for each in (row, jnp.minimum(row + 1, rows - 1))
    )
    return _Block(image, row, above, below, classes, columns, is_class, inside)


def _forward_kernel(
    starts_ref: Any,
    fractions_ref: Any,
    wide_ref: Any,
    targets_ref: Any,
    losses_ref: Any,
    normalizers_ref: Any,
    *,
    padded_classes: int,
) -> None:
    block = _block(wide_ref, padded_classes)
    image, row, columns, inside = block.image, block.row, block.columns, block.inside

    def add_row(y: Array, carry: None) -> None:
        logits = block.interpolated(fractions_ref[y])
        highest = jnp.max(logits, axis=0)
        total = jnp.sum(jnp.exp(logits - highest[None, :]), axis=0)
        normalizer = highest + jnp.log(total)
        target = triton.load(targets_ref.at[image, y, columns], mask=inside, other=0)
        is_target = target.astype(jnp.int32)[None, :] == block.classes[:, None]
        own = jnp.sum(jnp.where(is_target, logits, 0.0), axis=0)
        triton.store(losses_ref.at[image, y, columns], normalizer - own, mask=inside)
        triton.store(normalizers_ref.at[image, y, columns], normalizer, mask=inside)
        return carry

    lax.fori_loop(starts_ref[row], starts_ref[row + 1], add_row, None)


def _backward_kernel(
    starts_ref: Any,
    fractions_ref: Any,
    wide_ref: Any,
    targets_ref: Any,
    normalizers_ref: Any,
    target_factor_ref: Any,
    factor_ref: Any,
    above_ref: Any,
    below_ref: Any,
    *,
    padded_classes: int,
) -> None:
    block = _block(wide_ref, padded_classes)
    image, row, columns, inside = block.image, block.row, block.columns, block.inside

    def add_row(y: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        fraction = fractions_ref[y]
        logits = block.interpolated(fraction)
        target, normalizer, target_factor, factor = (
            triton.load(ref.at[image, y, columns], mask=inside, other=0)
            for ref in (targets_ref, normalizers_ref, target_factor_ref, factor_ref)
        )
        is_target = target.astype(jnp.int32)[None, :] == block.classes[:, None]
        probabilities = jnp.exp(logits - normalizer[None, :])
        error = probabilities * factor[None, :] - jnp.where(is_target, target_factor[None, :], 0.0)
        return sums[0] + (1 - fraction) * error, sums[1] + fraction * error

    zeros = jnp.zeros_like(block.above)
    sums = lax.fori_loop(starts_ref[row], starts_ref[row + 1], add_row, (zeros, zeros))
    mask = block.is_class & inside[None, :]
    for ref, total in zip((above_ref, below_ref), sums, strict=True):
        triton.store(ref.at[image, row, block.classes[:, None], columns[None, :]], total, mask=mask)
