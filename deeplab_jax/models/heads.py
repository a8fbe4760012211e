"""Heads, which compute logits from a backbone's features.

See `models.contracts.Head` for their protocol. To add one, write a file like this one and register
it in `HEADS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from jax.nn import relu
from jaxtyping import Array, DTypeLike, Float

from deeplab_jax.models.architecture import HEAD_NEUTRAL, HEADS, Architecture
from deeplab_jax.models.contracts import Backbone, channels_of
from deeplab_jax.models.decoders import LOW_LEVEL_FEATURES, PlusDecoder
from deeplab_jax.models.layers import (
    BatchNorm,
    ConvBN,
    batch_norm,
    logits_conv,
    param_dtype,
    scaled_channels,
)
from deeplab_jax.models.ops.pooling import mean_over_image

HEAD_FEATURES = 256  # arXiv 1706.05587, section 3.3
AUX_DROPOUT = 0.1  # as in torchvision

Features = dict[str, Array]


class ImagePooling(nnx.Module):
    """Image-level features: the mean over the image and a 1x1 convolution, broadcast to the map."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        """Makes the convolution; `options` are other arguments of `ConvBN`."""
        self.project = ConvBN(in_features, out_features, activation=relu, **options)

    def __call__(self, x: Float[Array, "n h w cin"]) -> Float[Array, "n h w cout"]:
        pooled = self.project(mean_over_image(x, param_dtype(x.dtype)))
        return jnp.broadcast_to(pooled, (*x.shape[:3], pooled.shape[3]))


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling (arXiv 1706.05587, section 3.3).

    The features go through parallel `branches`: a 1x1 convolution, a 3x3 convolution for each rate,
    and image pooling. `project` convolves the concatenated results. Batch norm and relu follow each
    convolution, and dropout the last one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = HEAD_FEATURES,
        *,
        atrous_rates: Sequence[int] = (6, 12, 18),
        image_pooling: bool = True,
        projection_kernel: int = 1,
        separable: bool = False,
        dropout: float = 0.1,
        norm: Callable[..., BatchNorm] = BatchNorm,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layers; the arguments are those of `ASPPHead`."""
        options: dict[str, Any] = {"norm": norm, "dtype": dtype, "rngs": rngs}
        conv: Callable[..., ConvBN] = functools.partial(ConvBN, activation=relu, **options)
        # The order in which layers are made decides the parameters that a seed gives.
        atrous = [
            conv(in_features, out_features, 3, kernel_dilation=rate, separable=separable)
            for rate in atrous_rates
        ]
        pooling = [ImagePooling(in_features, out_features, **options)] if image_pooling else []
        self.branches = nnx.List([conv(in_features, out_features), *atrous, *pooling])
        self.project = conv(len(self.branches) * out_features, out_features, projection_kernel)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self, x: Float[Array, "n h w cin"], *, rngs: jax.Array | None = None
    ) -> Float[Array, "n h w cout"]:
        joined = jnp.concatenate([branch(x) for branch in self.branches], axis=3)
        return self.dropout(self.project(joined), rngs=rngs)


class ASPPHead(nnx.Module):
    """DeepLabv3's head: ASPP, in torchvision's models a 3x3 convolution, and logits.

    A cascade (arXiv 1706.05587, section 3.2) has no ASPP. With DeepLabv3+'s decoder the logits have
    the size of the low-level features.

    Attributes:
      aspp: ASPP, or None.
      dropout: dropout if there is no ASPP, which has its own.
      head_conv: 3x3 convolution, or None.
      decoder: DeepLabv3+'s decoder, or None.
      logits: the last convolution.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        atrous_rates: Sequence[int] = (6, 12, 18),
        image_pooling: bool = True,
        aspp: bool = True,
        head_conv: bool = False,
        head_channels: int = HEAD_FEATURES,
        projection_kernel: int = 1,
        separable_aspp: bool = False,
        separable_head: bool = False,
        plus: bool = False,
        decoder_convs: int = 2,
        align_corners: bool = False,
        dropout: float = 0.1,
        width: float = 1.0,
        norm: Callable[..., BatchNorm] = BatchNorm,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the head for a backbone.

        Args:
          backbone: the backbone whose features the head reads.
          aspp: whether the head has ASPP.
          plus: whether the head has DeepLabv3+'s decoder.
          norm: function that makes a batch norm from a number of channels.
          rngs: random keys; `rngs.params` initializes the kernels.

        The other arguments are fields of `Architecture`.

        Raises:
          ValueError: the backbone has no features of the kind that the head reads.
        """
        options: dict[str, Any] = {"norm": norm, "dtype": dtype, "rngs": rngs}
        self._out, self._low_level = backbone.out_feature, backbone.low_level_feature
        channels = channels_of(backbone, self._out, "the head reads the feature")
        in_features = {self._out: channels}
        head_features = scaled_channels(head_channels, width)
        pyramid = conv = decoder = None
        if aspp:
            pyramid = ASPP(
                channels,
                head_features,
                atrous_rates=atrous_rates,
                image_pooling=image_pooling,
                projection_kernel=projection_kernel,
                separable=separable_aspp,
                dropout=dropout,
                **options,
            )
            channels = head_features
        if head_conv:
            conv = ConvBN(
                channels, head_features, 3, activation=relu, separable=separable_head, **options
            )
            channels = head_features
        if plus:
            reads = "DeepLabv3+'s decoder reads the `low_level_feature`"
            low_level = channels_of(backbone, self._low_level, reads)
            in_features[self._low_level] = low_level
            decoder = PlusDecoder(
                channels,
                low_level,
                head_features,
                reduced_features=scaled_channels(LOW_LEVEL_FEATURES, width),
                num_convs=decoder_convs,
                separable=separable_head,
                align_corners=align_corners,
                **options,
            )
            channels = head_features
        self.aspp = pyramid
        self.dropout = nnx.Dropout(0.0 if aspp else dropout)
        self.head_conv = conv
        self.decoder = decoder
        self.in_features: Mapping[str, int] = FrozenDict(in_features)
        self.logits = logits_conv(channels, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: Features, *, rngs: jax.Array | None = None
    ) -> Float[Array, "n ho wo classes"]:
        """Returns logits of the features' size; `rngs` is the key of dropout."""
        x = features[self._out]
        if self.aspp is not None:
            x = self.aspp(x, rngs=rngs)
        x = self.dropout(x, rngs=rngs)
        if self.head_conv is not None:
            x = self.head_conv(x)
        if self.decoder is not None:
            x = self.decoder(x, features[self._low_level])
        return self.logits(x)


class FCNHead(nnx.Module):
    """torchvision's auxiliary head: a 3x3 convolution to a quarter of the channels, and logits."""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        dropout: float = AUX_DROPOUT,
        norm: Callable[..., BatchNorm] = BatchNorm,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the head for a backbone's `aux_feature`; for the arguments see `ASPPHead`."""
        self._aux = backbone.aux_feature
        reads = "an auxiliary head (aux_head) reads the `aux_feature`"
        channels = channels_of(backbone, self._aux, reads)
        self.in_features: Mapping[str, int] = FrozenDict({self._aux: channels})
        features = scaled_channels(channels, 1 / 4)  # the channels include the width already
        options: dict[str, Any] = {"norm": norm, "dtype": dtype, "rngs": rngs}
        self.head_conv = ConvBN(channels, features, 3, activation=relu, **options)
        self.dropout = nnx.Dropout(dropout)
        self.logits = logits_conv(features, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: Features, *, rngs: jax.Array | None = None
    ) -> Float[Array, "n h w classes"]:
        """Returns logits of the features' size; `rngs` is the key of dropout."""
        x = self.head_conv(features[self._aux])
        return self.logits(self.dropout(x, rngs=rngs))


def aspp_head(backbone: Backbone, architecture: Architecture, *, rngs: nnx.Rngs) -> ASPPHead:
    """Makes the `ASPPHead` of an architecture."""
    return ASPPHead(
        backbone,
        architecture.num_classes,
        aspp=architecture.cascade is None,
        plus=architecture.decoder == "plus",
        align_corners=architecture.align_corners,
        dropout=architecture.dropout,
        width=architecture.width,
        **{field: getattr(architecture, field) for field in HEAD_NEUTRAL},
        **_layer_options(architecture, rngs),
    )


def fcn_head(backbone: Backbone, architecture: Architecture, *, rngs: nnx.Rngs) -> FCNHead:
    """Makes the auxiliary head of an architecture."""
    dropout = min(AUX_DROPOUT, architecture.dropout)
    options = _layer_options(architecture, rngs)
    return FCNHead(backbone, architecture.num_classes, dropout=dropout, **options)


def _layer_options(architecture: Architecture, rngs: nnx.Rngs) -> dict[str, Any]:
    norm = batch_norm(architecture.dtype, architecture.bn_momentum, architecture.bn_epsilon)
    return {"norm": norm, "dtype": architecture.dtype, "rngs": rngs}


aspp_head.options = frozenset({*HEAD_NEUTRAL, "plus"})  # type: ignore[attr-defined]
HEADS["aspp"] = aspp_head
