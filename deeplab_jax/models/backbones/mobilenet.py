"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) and MobileNetV3-Large (Howard et al. 2019,
arXiv 1905.02244), with atrous convolution.

Output stride 32 is the published network. Where a stride is removed, that depthwise convolution and
the following ones are dilated instead. The dilation rule is that of `backbones.resnet`: with
"paper" the convolution that lost its stride has the larger dilation too; with the others it keeps
the dilation before it.

With symmetric padding both equal torchvision's, block by block: MobileNetV2 at output stride 32,
MobileNetV3 also at 16. MobileNetV2 with padding "same" and the dilation rule "torchvision" equals
TensorFlow's and Hugging Face's at each output stride. Its last 1x1 convolution, to 1280 channels,
is left out, as in DeepLab's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from flax import nnx
from flax.core import FrozenDict
from jax.nn import hard_sigmoid, hard_swish, relu, relu6
from jaxtyping import Array, Float

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.contracts import Feature
from deeplab_jax.models.layers import Activation, BatchNorm, Conv, ConvBN, batch_norm, param_dtype
from deeplab_jax.models.ops.pooling import mean_over_image

STEM_STRIDE = 2  # pixels


class Row(NamedTuple):
    """A published inverted residual."""

    kernel_size: int  # of the depthwise convolution
    expanded_features: int | None  # channels of the depthwise convolution
    out_features: int
    squeeze_excite: bool
    activation: Activation  # after the expansion and after the depthwise convolution
    stride: int  # of the depthwise convolution
    expansion: int = 1  # channels per channel of the input, where `expanded_features` is None


# Expansion, channels, number of blocks and stride of the first one: arXiv 1801.04381, table 2.
_V2_SEQUENCES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# arXiv 1905.02244, table 1.
_V3_ROWS = (
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


class BlockSpec(NamedTuple):
    """The settings of an inverted residual at an architecture's width and output stride."""

    row: Row
    in_features: int
    expanded_features: int
    out_features: int
    strides: int  # of the depthwise convolution, as the dilation
    kernel_dilation: int
    output_stride: int  # image size divided by the size of the output


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
        """Makes the layers; `options` are other arguments of `Conv`."""
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
        self.expand = (
            conv(spec.in_features, features, activation=row.activation)
            if features != spec.in_features
            else None
        )
        self.depthwise = conv(
            features,
            features,
            row.kernel_size,
            strides=spec.strides,
            padding=architecture.padding,
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

    def __call__(
        self, x: Float[Array, "n h w cin"]
    ) -> tuple[Float[Array, "n ho wo c"], Float[Array, "n ho wo cout"]]:
        """Returns the input of the projection, and the output of the block."""
        expanded = x if self.expand is None else self.expand(x)
        expanded = self.depthwise(expanded)
        if self.squeeze_excite is not None:
            expanded = self.squeeze_excite(expanded)
        y = self.project(expanded)
        return expanded, x + y if self.shortcut else y


class MobileNet(nnx.Module):
    """Base class of MobileNets without their classifiers.

    Attributes:
      stem: 3x3 convolution of stride 2.
      block1, block2, ...: inverted residuals.
      last: 1x1 convolution.
      features: channels and stride of each feature map that `__call__` returns.
      remat: whether to recompute each block in the backward pass, to save memory.
    """

    rows: ClassVar[tuple[Row, ...]]  # the published blocks
    stem_features: ClassVar[int]  # channels of the published stem
    activation: ClassVar[Activation]  # after the stem and after `last`
    last_expansion: ClassVar[int] = 0  # channels of `last` per channel of the last block; 0: none
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
        specs = self.block_specs(architecture)
        first, last = specs[0], specs[-1]
        self.stem = conv(
            self.in_channels,
            first.in_features,
            3,
            strides=STEM_STRIDE,
            padding=architecture.padding,
        )
        features = {"stem": Feature(first.in_features, STEM_STRIDE)}
        for number, spec in enumerate(specs, start=1):
            name = f"block{number}"
            setattr(self, name, InvertedResidual(spec, architecture, norm=norm, rngs=rngs))
            if f"{name}.expanded" == self.low_level_feature:
                expanded = Feature(spec.expanded_features, spec.output_stride)
                features[self.low_level_feature] = expanded
            features[name] = Feature(spec.out_features, spec.output_stride)
        if self.last_expansion:
            last_features = self.last_expansion * last.out_features
            self.last = conv(last.out_features, last_features)
            features["last"] = Feature(last_features, last.output_stride)
        self.features: Mapping[str, Feature] = FrozenDict(features)
        self.remat = False

    @classmethod
    def block_specs(cls, architecture: Architecture) -> list[BlockSpec]:
        """Returns the inverted residuals at the architecture's width and output stride."""
        in_features = divisible_channels(cls.stem_features * architecture.width)
        total_stride, dilation = STEM_STRIDE, 1
        specs = []
        for row in cls.rows:
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

    def __call__(self, images: Float[Array, "n h w c"]) -> dict[str, Array]:
        """Returns the features "stem", "block1", ..., and "last" if any, of normalized images.

        "block3.expanded" is the input of the projection in that block.
        """
        run = InvertedResidual.__call__
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


class MobileNetV2(MobileNet):
    """MobileNetV2 without its classifier: "stem", "block1", ..., "block17"."""

    options = frozenset({"width", "padding", "dilation_rule"})
    rows = tuple(
        Row(3, None, features, False, relu6, stride if index == 0 else 1, expansion)
        for expansion, features, num_blocks, stride in _V2_SEQUENCES
        for index in range(num_blocks)
    )
    stem_features = 32
    activation = relu6
    out_feature = "block17"
    aux_feature = "block6"  # the last features of output stride 8


class MobileNetV3(MobileNet):
    """MobileNetV3-Large without its classifier: "stem", "block1", ..., "block15" and "last"."""

    options = frozenset({"width"})
    rows = _V3_ROWS
    stem_features = 16
    activation = hard_swish
    last_expansion = 6
    out_feature = "last"
    aux_feature = "block4"  # the first features of output stride 8
