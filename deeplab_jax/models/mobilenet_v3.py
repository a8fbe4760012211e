"""MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244), whose later strides may be removed.

It is torchvision's, module by module. Output stride 32 is the network as published, 16 the one
under torchvision's DeepLabv3, with the same parameters. Where a stride is removed, the depthwise
convolutions from there on get its rate, the formerly strided one included. (That is the dilation
rule "paper" of `models.resnet`: torchvision treats its ResNets otherwise.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jax.nn import hard_sigmoid, hard_swish, relu
from jaxtyping import Array, Float

from deeplab_jax.errors import UserError
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.depthwise import DepthwiseConv
from deeplab_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvNorm,
    LayerMaker,
    full_precision,
    recompute,
)
from deeplab_jax.models.padding import mean_over_image

Activation = Callable[[Array], Array]


class Spec(NamedTuple):
    """An inverted residual as published: a row of arXiv 1905.02244, table 1."""

    kernel_size: int
    expanded_channels: int
    out_channels: int
    squeeze_excite: bool
    activation: Activation
    stride: int


SPECS: tuple[Spec, ...] = (
    Spec(3, 16, 16, False, relu, 1),
    Spec(3, 64, 24, False, relu, 2),
    Spec(3, 72, 24, False, relu, 1),
    Spec(5, 72, 40, True, relu, 2),
    Spec(5, 120, 40, True, relu, 1),
    Spec(5, 120, 40, True, relu, 1),
    Spec(3, 240, 80, False, hard_swish, 2),
    Spec(3, 200, 80, False, hard_swish, 1),
    Spec(3, 184, 80, False, hard_swish, 1),
    Spec(3, 184, 80, False, hard_swish, 1),
    Spec(3, 480, 112, True, hard_swish, 1),
    Spec(3, 672, 112, True, hard_swish, 1),
    Spec(5, 672, 160, True, hard_swish, 2),
    Spec(5, 960, 160, True, hard_swish, 1),
    Spec(5, 960, 160, True, hard_swish, 1),
)

LOW_LEVEL_BLOCK = 3  # place in the backbone of the last inverted residual of stride 4
STEM_CHANNELS = 16
STEM_STRIDE = 2  # pixels
LAST_EXPANSION = 6  # of the last convolution, over the last inverted residual

# Choices of an architecture that this backbone does not have, and the values they stay at.
FIXED: dict[str, Any] = {
    "multi_grid": (1, 1, 1),
    "dilation_rule": "paper",
    "residual": "post",
    "stem": "conv7x7",
    "stride_place": "conv2",
    "cascade": None,
}


class BlockPlan(NamedTuple):
    """Place of an inverted residual in the network.

    Attributes:
      spec: as published.
      in_channels, expanded_channels, out_channels: at the architecture's width.
      stride: pixels, of the depthwise convolution.
      rate: of the depthwise convolution.
    """

    spec: Spec
    in_channels: int
    expanded_channels: int
    out_channels: int
    stride: int
    rate: int


def plan_blocks(architecture: Architecture) -> list[BlockPlan]:
    """The inverted residuals, with their strides and rates at the architecture's output stride."""
    in_channels = divisible_channels(STEM_CHANNELS * architecture.width)
    total_stride, rate = STEM_STRIDE, 1
    plans = []
    for spec in SPECS:
        stride = spec.stride
        if total_stride * stride > architecture.output_stride:
            stride, rate = 1, rate * spec.stride
        total_stride *= stride
        expanded = divisible_channels(spec.expanded_channels * architecture.width)
        out_channels = divisible_channels(spec.out_channels * architecture.width)
        plans.append(BlockPlan(spec, in_channels, expanded, out_channels, stride, rate))
        in_channels = out_channels
    return plans


def divisible_channels(channels: float) -> int:
    """The nearest multiple of 8, at least 8, that is not below 90 % of `channels`.

    MobileNets count so under a width multiplier (`_make_divisible` in torchvision).
    """
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class ConvNormActivation(ConvNorm):
    """A convolution `[0]`, its batch norm `[1]` and an activation."""

    def __init__(self, conv: Conv, norm: BatchNorm, activation: Activation) -> None:
        super().__init__(conv, norm)
        self.activation = activation

    def __call__(self, x: Float[Array, "n h w cin"], *, update_bn: bool = False) -> Array:
        return self.activation(super().__call__(x, update_bn=update_bn))


class SqueezeExcite(nnx.Module):
    """Weighs each channel by a number in [0, 1] that the channels' means over the image decide.

    As in arXiv 1709.01507, section 3, with a hard sigmoid (arXiv 1905.02244, section 5.3).
    """

    def __init__(self, channels: int, squeeze_channels: int, make: LayerMaker) -> None:
        self.fc1 = make.conv(channels, squeeze_channels, use_bias=True)
        self.fc2 = make.conv(squeeze_channels, channels, use_bias=True)

    def __call__(
        self, x: Float[Array, "n h w c"], *, update_bn: bool = False
    ) -> Float[Array, "n h w c"]:
        """`update_bn` is there because all layers of a block are called alike."""
        mean = mean_over_image(x, full_precision(x.dtype))
        return x * hard_sigmoid(self.fc2(relu(self.fc1(mean))))


class InvertedResidual(nnx.Module):
    """Expansion, depthwise convolution, squeeze-excite, projection, and a shortcut.

    Attributes:
      block: the layers; without an expansion or squeeze-excite where there is none, so that their
        places are torchvision's.
      shortcut: whether the input is added. By the published stride, so that the function between
        the layers is the same at each output stride.
    """

    def __init__(self, plan: BlockPlan, make: LayerMaker) -> None:
        spec, c_in, c = plan.spec, plan.in_channels, plan.expanded_channels
        options: dict[str, Any] = {"stride": plan.stride, "rate": plan.rate, "groups": c}
        depthwise = DepthwiseConv(
            c, c, spec.kernel_size, **options, dtype=make.dtype, rngs=make.rngs
        )
        layers: list[nnx.Module] = [ConvNormActivation(depthwise, make.norm(c), spec.activation)]
        if c != c_in:
            layers.insert(0, ConvNormActivation(make.conv(c_in, c), make.norm(c), spec.activation))
        if spec.squeeze_excite:
            layers.append(SqueezeExcite(c, divisible_channels(c // 4), make))
        layers.append(make.conv_norm(c, plan.out_channels))
        self.block = nnx.List(layers)
        self.shortcut = spec.stride == 1 and c_in == plan.out_channels

    def __call__(self, x: Float[Array, "n h w cin"], *, update_bn: bool = False) -> Array:
        return self.with_expansion(x, update_bn=update_bn)[1]

    def with_expansion(
        self, x: Float[Array, "n h w cin"], *, update_bn: bool = False
    ) -> tuple[Float[Array, "n ho wo c"], Float[Array, "n ho wo cout"]]:
        """What the projection reads, and what the block gives."""
        *layers, project = self.block
        expanded = x
        for layer in layers:
            expanded = layer(expanded, update_bn=update_bn)
        y = project(expanded, update_bn=update_bn)
        return expanded, x + y if self.shortcut else y


class MobileNetV3(nnx.List):
    """Backbone of DeepLabv3: the first convolution `[0]`, inverted residuals, the last one `[16]`.

    Attributes:
      channels: number of channels of each of them.
      low_level_channels: of the features "3.expanded".

    Raises:
      UserError: the architecture makes a choice of a ResNet that there is none of here.
    """

    out_feature = "16"
    aux_feature = "4"  # the first features of output stride 8
    # The last depthwise convolution's of stride 4, before they are projected to few channels, as
    # the authors of DeepLabv3+ take them for MobileNets.
    low_level_feature = f"{LOW_LEVEL_BLOCK}.expanded"

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs | None) -> None:
        _require_fixed(architecture)
        make = LayerMaker(architecture.dtype, *architecture.backbone_bn, rngs)
        plans = plan_blocks(architecture)
        first, last_in = plans[0].in_channels, plans[-1].out_channels
        last = LAST_EXPANSION * last_in
        stem = make.conv(architecture.in_channels, first, 3, stride=STEM_STRIDE)
        super().__init__(
            [
                ConvNormActivation(stem, make.norm(first), hard_swish),
                *(InvertedResidual(plan, make) for plan in plans),
                ConvNormActivation(make.conv(last_in, last), make.norm(last), hard_swish),
            ]
        )
        self.low_level_channels = plans[LOW_LEVEL_BLOCK - 1].expanded_channels
        self.channels = (first, *(plan.out_channels for plan in plans), last)

    @property
    def out_channels(self) -> int:
        return self.channels[int(self.out_feature)]

    @property
    def aux_channels(self) -> int:
        return self.channels[int(self.aux_feature)]

    def __call__(
        self, images: Float[Array, "n h w c"], *, update_bn: bool = False, remat: bool = False
    ) -> dict[str, Array]:
        """Features "0", ..., "16", `[n, h', w', c']` each: what the layer of that place gives.

        And "3.expanded": what the projection of that inverted residual reads.

        Args:
          images: normalised pixels.
          update_bn: whether batch norm uses the batch's statistics and moves the running ones.
          remat: whether each inverted residual is computed again in the backward pass, to save
            memory.
        """
        features = {}
        x = images
        for index, unit in enumerate(self):
            if not isinstance(unit, InvertedResidual):
                x = unit(x, update_bn=update_bn)
            else:
                block: Callable[..., tuple[Array, Array]] = unit.with_expansion
                if remat:
                    block = functools.partial(recompute, unit, method="with_expansion")
                expanded, x = block(x, update_bn=update_bn)
                if index == LOW_LEVEL_BLOCK:
                    features[self.low_level_feature] = expanded
            features[str(index)] = x
        return features


def _require_fixed(architecture: Architecture) -> None:
    problems = [
        f"{field} must stay {value!r}, got {getattr(architecture, field)!r}"
        for field, value in FIXED.items()
        if getattr(architecture, field) != value
    ]
    if problems:
        raise UserError(
            f"architecture {architecture.name}: {'; '.join(problems)}: its backbone "
            f"{architecture.backbone} has no such choice, only the ResNets do"
        )
