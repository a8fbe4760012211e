"""MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244), with atrous convolution.

It equals torchvision's, block by block. Output stride 32 is the published network, 16 that of
torchvision's DeepLabv3, with the same parameters. Where a stride is removed, that depthwise
convolution and the following ones are dilated instead, which is the dilation rule "paper" of
`backbones.resnet`. (torchvision's ResNets follow the other rule.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from flax.core import FrozenDict
from jax.nn import hard_sigmoid, hard_swish, relu
from jaxtyping import Array, Float

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.contracts import Feature
from deeplab_jax.models.layers import Activation, BatchNorm, Conv, ConvBN, batch_norm, param_dtype
from deeplab_jax.models.ops.pooling import mean_over_image


class Row(NamedTuple):
    """A published inverted residual, which is a row of arXiv 1905.02244, table 1."""

    kernel_size: int
    expanded_features: int
    out_features: int
    squeeze_excite: bool
    activation: Activation
    stride: int


TABLE: tuple[Row, ...] = (
    Row(3, 16, 16, False, relu, 1),
    Row(3, 64, 24, False, relu, 2),
    Row(3, 72, 24, False, relu, 1),
    Row(5, 72, 40, True, relu, 2),
    Row(5, 120, 40, True, relu, 1),
    Row(5, 120, 40, True, relu, 1),
    Row(3, 240, 80, False, hard_swish, 2),
    Row(3, 200, 80, False, hard_swish, 1),
    Row(3, 184, 80, False, hard_swish, 1),
    Row(3, 184, 80, False, hard_swish, 1),
    Row(3, 480, 112, True, hard_swish, 1),
    Row(3, 672, 112, True, hard_swish, 1),
    Row(5, 672, 160, True, hard_swish, 2),
    Row(5, 960, 160, True, hard_swish, 1),
    Row(5, 960, 160, True, hard_swish, 1),
)

STEM_FEATURES = 16
STEM_STRIDE = 2  # pixels
LAST_EXPANSION = 6  # channels of the last convolution per channel of the last block


class BlockSpec(NamedTuple):
    """The settings of an inverted residual.

    Attributes:
      row: the published settings.
      in_features, expanded_features, out_features: numbers of channels at the architecture's width.
      strides: stride of the depthwise convolution, pixels.
      kernel_dilation: dilation of the depthwise convolution, pixels.
      output_stride: image size divided by the size of the output.
    """

    row: Row
    in_features: int
    expanded_features: int
    out_features: int
    strides: int
    kernel_dilation: int
    output_stride: int


def block_specs(architecture: Architecture) -> list[BlockSpec]:
    """Returns the inverted residuals at the architecture's width and output stride."""
    in_features = divisible_channels(STEM_FEATURES * architecture.width)
    total_stride, dilation = STEM_STRIDE, 1
    specs = []
    for row in TABLE:
        strides = row.stride
        if total_stride * strides > architecture.output_stride:
            strides, dilation = 1, dilation * row.stride
        total_stride *= strides
        expanded = divisible_channels(row.expanded_features * architecture.width)
        out_features = divisible_channels(row.out_features * architecture.width)
        specs.append(
            BlockSpec(row, in_features, expanded, out_features, strides, dilation, total_stride)
        )
        in_features = out_features
    return specs


def divisible_channels(channels: float) -> int:
    """Returns the nearest multiple of 8 that is at least 8 and at least 90 % of `channels`.

    This is how MobileNets round under a width multiplier (`_make_divisible` in torchvision).
    """
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class SqueezeExcite(nnx.Module):
    """Scales each channel by a number in [0, 1] computed from the channels' means over the image.

    Source: arXiv 1709.01507, section 3, with a hard sigmoid (arXiv 1905.02244, section 5.3).
    """

    def __init__(self, features: int, squeeze_features: int, **options: Any) -> None:
        """Creates the layers; `options` are further arguments of `Conv`."""
        self.fc1 = Conv(features, squeeze_features, use_bias=True, **options)
        self.fc2 = Conv(squeeze_features, features, use_bias=True, **options)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        mean = mean_over_image(x, param_dtype(x.dtype))
        return x * hard_sigmoid(self.fc2(relu(self.fc1(mean))))


class InvertedResidual(nnx.Module):
    """Expansion, depthwise convolution, squeeze-excite, projection, and a shortcut.

    Attributes:
      expand: 1x1 convolution, or None if the number of channels stays the same.
      depthwise: depthwise convolution.
      squeeze_excite: `SqueezeExcite`, or None.
      project: 1x1 convolution without activation.
      shortcut: whether the input is added to the result. It depends on the published stride, so
        that it is the same at each output stride.
    """

    def __init__(
        self,
        spec: BlockSpec,
        architecture: Architecture,
        *,
        norm: Callable[..., BatchNorm],
        rngs: nnx.Rngs,
    ) -> None:
        row, features = spec.row, spec.expanded_features
        options: dict[str, Any] = {"dtype": architecture.dtype, "rngs": rngs}
        conv: Callable[..., ConvBN] = functools.partial(ConvBN, norm=norm, **options)
        expand = None
        if features != spec.in_features:
            expand = conv(spec.in_features, features, activation=row.activation)
        self.expand = expand
        self.depthwise = conv(
            features,
            features,
            row.kernel_size,
            strides=spec.strides,
            kernel_dilation=spec.kernel_dilation,
            feature_group_count=features,
            activation=row.activation,
        )
        squeezed = divisible_channels(features // 4)
        self.squeeze_excite = (
            SqueezeExcite(features, squeezed, **options) if row.squeeze_excite else None
        )
        self.project = conv(features, spec.out_features)
        self.shortcut = row.stride == 1 and spec.in_features == spec.out_features

    def __call__(self, x: Float[Array, "n h w cin"]) -> Float[Array, "n ho wo cout"]:
        return self.with_expansion(x)[1]

    def with_expansion(
        self, x: Float[Array, "n h w cin"]
    ) -> tuple[Float[Array, "n ho wo c"], Float[Array, "n ho wo cout"]]:
        """Returns the input of the projection, and the output of the block."""
        expanded = x if self.expand is None else self.expand(x)
        expanded = self.depthwise(expanded)
        if self.squeeze_excite is not None:
            expanded = self.squeeze_excite(expanded)
        y = self.project(expanded)
        return expanded, x + y if self.shortcut else y


class MobileNetV3(nnx.Module):
    """MobileNetV3-Large without its classifier.

    Attributes:
      stem: 3x3 convolution of stride 2.
      block1, ..., block15: inverted residuals.
      last: 1x1 convolution.
      features: channels and stride of each feature map that `__call__` returns.
      remat: whether to recompute each block in the backward pass, to save memory.
    """

    options = frozenset({"width"})
    out_feature = "last"
    aux_feature = "block4"  # the first features of output stride 8
    # The last features of stride 4 before the projection to few channels, as in DeepLabv3+'s own
    # code for MobileNets.
    low_level_feature = "block3.expanded"

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs) -> None:
        self.in_channels = architecture.in_channels
        norm = batch_norm(architecture.dtype, *architecture.backbone_bn)
        conv: Callable[..., ConvBN] = functools.partial(
            ConvBN, activation=hard_swish, norm=norm, dtype=architecture.dtype, rngs=rngs
        )
        specs = block_specs(architecture)
        first, last_in = specs[0].in_features, specs[-1].out_features
        self.stem = conv(architecture.in_channels, first, 3, strides=STEM_STRIDE)
        features: dict[str, Feature] = {"stem": Feature(first, STEM_STRIDE)}
        for number, spec in enumerate(specs, start=1):
            name = f"block{number}"
            setattr(self, name, InvertedResidual(spec, architecture, norm=norm, rngs=rngs))
            if f"{name}.expanded" == self.low_level_feature:
                expanded = Feature(spec.expanded_features, spec.output_stride)
                features[self.low_level_feature] = expanded
            features[name] = Feature(spec.out_features, spec.output_stride)
        self.last = conv(last_in, LAST_EXPANSION * last_in)
        features["last"] = Feature(LAST_EXPANSION * last_in, specs[-1].output_stride)
        self.features: Mapping[str, Feature] = FrozenDict(features)
        self.remat = False

    def __call__(self, images: Float[Array, "n h w c"]) -> dict[str, Array]:
        """Returns the features "stem", "block1", ..., "block15" and "last" of normalized images.

        "block3.expanded" is the input of the projection in that block.
        """
        run = InvertedResidual.with_expansion
        if self.remat:
            run = nnx.remat(run)
        features: dict[str, Array] = {"stem": self.stem(images)}
        x = features["stem"]
        for number in range(1, len(TABLE) + 1):
            name = f"block{number}"
            expanded, x = run(getattr(self, name), x)
            features |= {f"{name}.expanded": expanded, name: x}
        features["last"] = self.last(x)
        return {name: features[name] for name in self.features}
