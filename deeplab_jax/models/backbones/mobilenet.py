"""The parts that MobileNetV2 and MobileNetV3 share: inverted residuals, and a network of them.

Where a stride is removed, that depthwise convolution and the following ones are dilated instead.
The dilation rule is that of `backbones.resnet`: with "paper" the convolution that lost its stride
has the larger dilation too; with the others it keeps the dilation before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from flax import nnx
from flax.core import FrozenDict
from jax.nn import hard_sigmoid, relu
from jaxtyping import Array, Float

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.contracts import Feature
from deeplab_jax.models.layers import Activation, BatchNorm, Conv, ConvBN, batch_norm, param_dtype
from deeplab_jax.models.ops.pooling import mean_over_image

STEM_STRIDE = 2  # pixels


class Row(NamedTuple):
    """A published inverted residual.

    Attributes:
      kernel_size: side of the depthwise convolution.
      expanded_features: number of channels of the depthwise convolution, or None.
      out_features: number of channels of the output.
      squeeze_excite: whether the block has `SqueezeExcite`.
      activation: function after the expansion and after the depthwise convolution.
      stride: stride of the depthwise convolution, pixels.
      expansion: channels of the depthwise convolution per channel of the input, where
        `expanded_features` is None.
    """

    kernel_size: int
    expanded_features: int | None
    out_features: int
    squeeze_excite: bool
    activation: Activation
    stride: int
    expansion: int = 1


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


def block_specs(
    rows: tuple[Row, ...], stem_features: int, architecture: Architecture
) -> list[BlockSpec]:
    """Returns the inverted residuals at the architecture's width and output stride.

    Args:
      rows: the published blocks.
      stem_features: number of channels of the published stem.
      architecture: has the width, output stride and dilation rule.
    """
    in_features = divisible_channels(stem_features * architecture.width)
    total_stride, dilation = STEM_STRIDE, 1
    specs = []
    for row in rows:
        strides, kernel_dilation = row.stride, dilation
        if total_stride * strides > architecture.output_stride:
            strides, dilation = 1, dilation * row.stride
        total_stride *= strides
        if architecture.dilation_rule == "paper":
            kernel_dilation = dilation
        expanded = in_features * row.expansion
        if row.expanded_features is not None:
            expanded = divisible_channels(row.expanded_features * architecture.width)
        out_features = divisible_channels(row.out_features * architecture.width)
        features = (in_features, expanded, out_features)
        specs.append(BlockSpec(row, *features, strides, kernel_dilation, total_stride))
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
            padding=conv_padding(architecture),
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


def conv_padding(architecture: Architecture) -> str | None:
    """Returns the argument `padding` of `Conv` for an architecture."""
    return "SAME" if architecture.padding == "same" else None


class MobileNet(nnx.Module):
    """Base class of MobileNets without their classifiers.

    Attributes:
      rows: the published blocks.
      stem_features: number of channels of the published stem.
      activation: function after the stem and after `last`.
      last_expansion: channels of `last` per channel of the last block; 0 leaves `last` out.
      stem: 3x3 convolution of stride 2.
      block1, block2, ...: inverted residuals.
      last: 1x1 convolution.
      features: channels and stride of each feature map that `__call__` returns.
      remat: whether to recompute each block in the backward pass, to save memory.
    """

    rows: ClassVar[tuple[Row, ...]]
    stem_features: ClassVar[int]
    activation: ClassVar[Activation]
    last_expansion: ClassVar[int] = 0
    out_feature: str
    aux_feature: str
    # The last features of stride 4 before the projection to few channels, as in DeepLabv3+'s own
    # code for MobileNets.
    low_level_feature = "block3.expanded"

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs) -> None:
        self.in_channels = architecture.in_channels
        norm = batch_norm(architecture.dtype, *architecture.backbone_bn)
        conv: Callable[..., ConvBN] = functools.partial(
            ConvBN, activation=type(self).activation, norm=norm, dtype=architecture.dtype, rngs=rngs
        )
        specs = block_specs(self.rows, self.stem_features, architecture)
        first, last_in = specs[0].in_features, specs[-1].out_features
        padding = conv_padding(architecture)
        self.stem = conv(self.in_channels, first, 3, strides=STEM_STRIDE, padding=padding)
        features: dict[str, Feature] = {"stem": Feature(first, STEM_STRIDE)}
        for number, spec in enumerate(specs, start=1):
            name = f"block{number}"
            setattr(self, name, InvertedResidual(spec, architecture, norm=norm, rngs=rngs))
            if f"{name}.expanded" == self.low_level_feature:
                expanded = Feature(spec.expanded_features, spec.output_stride)
                features[self.low_level_feature] = expanded
            features[name] = Feature(spec.out_features, spec.output_stride)
        if self.last_expansion:
            last_features = self.last_expansion * last_in
            self.last = conv(last_in, last_features)
            features["last"] = Feature(last_features, specs[-1].output_stride)
        self.features: Mapping[str, Feature] = FrozenDict(features)
        self.remat = False

    def __call__(self, images: Float[Array, "n h w c"]) -> dict[str, Array]:
        """Returns the features "stem", "block1", ..., and "last" if any, of normalized images.

        "block3.expanded" is the input of the projection in that block.
        """
        run = InvertedResidual.with_expansion
        if self.remat:
            run = nnx.remat(run)
        features: dict[str, Array] = {"stem": self.stem(images)}
        x = features["stem"]
        for number in range(1, len(self.rows) + 1):
            name = f"block{number}"
            expanded, x = run(getattr(self, name), x)
            features |= {f"{name}.expanded": expanded, name: x}
        if self.last_expansion:
            features["last"] = self.last(x)
        return {name: features[name] for name in self.features}
