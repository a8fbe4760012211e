"""DeepLabv3+'s decoder, and a learned upsampling of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.nn import relu
from jaxtyping import Array, DTypeLike, Float, Int

from deeplab_jax.models.layers import BatchNorm, ConvBN, param_dtype
from deeplab_jax.models.ops.masking import valid_sizes
from deeplab_jax.models.ops.resize import resize_like

LOW_LEVEL_FEATURES = 48  # arXiv 1802.02611, table 1


class PlusDecoder(nnx.Module):
    """DeepLabv3+'s decoder, which refines deep features by low-level features with sharp edges.

    A 1x1 convolution first reduces the channels of the low-level features, so that they do not
    outweigh the deep ones. 3x3 convolutions join both. Batch norm and relu follow each convolution.

    Source: Chen et al. 2018, arXiv 1802.02611, sections 3.1 and 4.1.

    Attributes:
      low_level: 1x1 convolution.
      conv1, conv2, ...: 3x3 convolutions.
      num_convs: their number.
    """

    def __init__(
        self,
        in_features: int,
        low_level_features: int,
        out_features: int = 256,  # table 2
        *,
        reduced_features: int = LOW_LEVEL_FEATURES,
        num_convs: int = 2,
        separable: bool = False,
        align_corners: bool = False,
        norm: Callable[..., BatchNorm] = BatchNorm,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layers.

        Args:
          in_features: number of channels of the deep features.
          low_level_features: number of channels of the low-level features.
          out_features: number of channels of the result.
          reduced_features: number of channels that the low-level features are reduced to.
          num_convs: number of 3x3 convolutions.
          separable: whether they are separable.
          align_corners: how deep features are resized, see `models.ops.resize`.
          norm, dtype, rngs: as in `ASPPHead`.
        """
        self.num_convs = num_convs
        self.align_corners = align_corners
        shared: dict[str, Any] = {"norm": norm, "activation": relu, "dtype": dtype, "rngs": rngs}
        self.low_level = ConvBN(low_level_features, reduced_features, **shared)
        before = in_features + reduced_features
        for number in range(1, num_convs + 1):
            conv = ConvBN(before, out_features, 3, separable=separable, **shared)
            setattr(self, f"conv{number}", conv)
            before = out_features

    def __call__(
        self, features: Float[Array, "n h w c"], low_level: Float[Array, "n hl wl cl"]
    ) -> Float[Array, "n hl wl cout"]:
        """Returns refined features of the size of `low_level`, the backbone's at stride 4."""
        upsampled = resize_like(features, low_level, align_corners=self.align_corners)
        x = jnp.concatenate([upsampled, self.low_level(low_level)], axis=3)
        for number in range(1, self.num_convs + 1):
            x = getattr(self, f"conv{number}")(x)
        return x


class TransposedDecoder(nnx.Module):
    """Upsamples each class by its own transposed convolution, initialized as bilinear.

    The kernel for stride s has a side of 2s. The parameter is the kernel for the largest output
    stride; for smaller ones its cells are averaged. The average of a triangle over equal cells is
    the coarser triangle, so that the initial kernel is bilinear at each output stride, and the
    parameter has one shape for all of them.

    Attributes:
      kernel: `[64, 64, num_classes]`.
      stride: output stride of the logits, a divisor of 32.
      replicate: function that replicates a map on all devices; the identity by default. It is set
        where the image height is sharded, since XLA's partitioner (jaxlib 0.10) computes wrong
        gradients of slices where a device has no row.
    """

    LARGEST = 32  # output stride, pixels

    def __init__(self, num_classes: int, stride: int, *, dtype: DTypeLike = jnp.float32) -> None:
        triangle = 1 - np.abs((np.arange(2 * self.LARGEST) + 0.5) / self.LARGEST - 1)
        kernel = np.outer(triangle, triangle)[:, :, None].repeat(num_classes, axis=2)
        self.kernel = nnx.Param(jnp.asarray(kernel, param_dtype(dtype)))
        self.stride = stride
        self.replicate: Callable[[Array], Array] = _identity

    def __call__(
        self, logits: Float[Array, "n h w classes"], images: Float[Array, "n height width c"]
    ) -> Float[Array, "n height width classes"]:
        """Upsamples by `stride` and crops the centre, of the images' size.

        With a padding mask, crops the centre of each image without its padding.
        """
        height, width = images.shape[1:3]
        in_sizes, out_sizes = valid_sizes(logits), valid_sizes(images)
        logits = self.replicate(logits)
        n, h, w, num_classes = logits.shape
        if in_sizes is not None:
            logits = _repeat_edges(logits, in_sizes)
        stride, cell = self.stride, self.LARGEST // self.stride
        kernel = self.kernel[...].reshape(2 * stride, cell, 2 * stride, cell, num_classes)
        kernel = kernel.mean((1, 3)).reshape(2, stride, 2, stride, num_classes)
        # Each block of stride x stride outputs is a weighted sum of four neighbouring logits.
        padded = jnp.pad(logits, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        blocks = sum(
            padded[:, 1 - a : h + 2 - a, None, 1 - b : w + 2 - b, None] * kernel[a, :, b][:, None]
            for a in (0, 1)
            for b in (0, 1)
        )
        upsampled = cast(Array, blocks).reshape(n, (h + 1) * stride, (w + 1) * stride, num_classes)
        if in_sizes is not None and out_sizes is not None:
            starts = stride // 2 + (in_sizes * stride - out_sizes) // 2
            return jax.vmap(
                lambda x, start: lax.dynamic_slice(x, (*start, 0), (height, width, num_classes))
            )(upsampled, starts)
        top = stride // 2 + (h * stride - height) // 2
        left = stride // 2 + (w * stride - width) // 2
        return upsampled[:, top : top + height, left : left + width]


def _identity(x: Array) -> Array:
    return x


def _repeat_edges(x: Float[Array, "n h w c"], sizes: Int[Array, "n 2"]) -> Array:
    """Repeats each image's last row and column over its padding."""
    rows = jnp.minimum(jnp.arange(x.shape[1]), sizes[:, :1] - 1)
    columns = jnp.minimum(jnp.arange(x.shape[2]), sizes[:, 1:] - 1)
    return jax.vmap(lambda x, row, column: x[row][:, column])(x, rows, columns)
