"""Atrous spatial pyramid pooling with image-level features (arXiv 1706.05587, section 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import relu
from jaxtyping import Array, Float

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.layers import (
    BatchNorm,
    Conv,
    LayerMaker,
    dropout,
    full_precision,
    normalized,
    scaled_channels,
)
from deeplab_jax.models.padding import mean_over_image

ASPP_CHANNELS = 256


class ImagePooling(nnx.List):
    """Mean over the image, 1x1 convolution `[1]`, batch norm `[2]`, relu, spread over the map."""

    def __init__(self, in_channels: int, out_channels: int, make: LayerMaker) -> None:
        super().__init__([None, make.conv(in_channels, out_channels), make.norm(out_channels)])

    def conv_norms(self) -> list[tuple[Conv, BatchNorm]]:
        return [(self[1], self[2])]

    def __call__(self, x: Float[Array, "n h w cin"], *, update_bn: bool = False) -> Array:
        mean = mean_over_image(x, full_precision(x.dtype))
        pooled = relu(normalized(self[1], self[2], mean, update_bn=update_bn))
        return jnp.broadcast_to(pooled, (*x.shape[:3], pooled.shape[3]))


class ASPP(nnx.Module):
    """Parallel views of the features at several rates, joined by a 1x1 convolution.

    Attributes:
      convs: a 1x1 convolution, a 3x3 one a rate, image pooling where the architecture has it; each
        to 256 channels (times width), with batch norm.
      project: 1x1 convolution of all of them, with batch norm.
      out_channels: number of channels of the result.
    """

    def __init__(self, in_channels: int, architecture: Architecture, make: LayerMaker) -> None:
        channels = scaled_channels(ASPP_CHANNELS, architecture.width)
        atrous = [
            make.conv_norm(in_channels, channels, 3, rate=rate)
            for rate in architecture.atrous_rates
        ]
        pooling = [ImagePooling(in_channels, channels, make)] if architecture.image_pooling else []
        self.convs = nnx.List([make.conv_norm(in_channels, channels), *atrous, *pooling])
        self.project = make.conv_norm(len(self.convs) * channels, channels)
        self.dropout = architecture.dropout
        self.out_channels = channels

    def branches(
        self, x: Float[Array, "n h w cin"], *, update_bn: bool = False
    ) -> list[Float[Array, "n h w cout"]]:
        """What each branch gives, in the order of `convs`."""
        return [
            branch(x, update_bn=update_bn)
            if isinstance(branch, ImagePooling)
            else relu(branch(x, update_bn=update_bn))
            for branch in self.convs
        ]

    def __call__(
        self,
        x: Float[Array, "n h w cin"],
        *,
        update_bn: bool = False,
        key: jax.Array | None = None,
    ) -> Float[Array, "n h w cout"]:
        """Joined branches, with dropout where a key is given."""
        joined = jnp.concatenate(self.branches(x, update_bn=update_bn), axis=3)
        return dropout(relu(self.project(joined, update_bn=update_bn)), self.dropout, key)
