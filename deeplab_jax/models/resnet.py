"""ResNet (He et al. 2015, 2016) whose later strides may be removed and made up for by rates.

Output stride 32 is the network as published. For 16 and 8 the strides of the last one or two
stages are removed, and the convolutions behind them get rates, with the same parameters. A cascade
(arXiv 1706.05587, section 3.2) goes on behind `layer4`, the paper's block4, by up to three copies
of it, that halve the features down to output stride 256 or, past the one asked for, double the
rate. Which rates is the dilation rule's:

- "torchvision": a convolution's rate is the product of the strides removed before it. Features
  taken at the removed strides are then exactly those of the strided network. A bottleneck's 3x3
  convolution, whose own stride was removed, thus keeps the rate of the stage before.
- "paper": all units of a stage have the rate of the stage: 2 in block4 at output stride 16,
  2 in block3 and 4 in block4 at 8.

In block4 and its copies the rates are multiplied with the multi-grid (section 3.2.1).

Where activation comes first (He et al. 2016, arXiv 1603.05027, appendix), the activation behind
the stem's convolution is the first unit's, which has none of its own, and a batch norm and relu
follow the last unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx
from jax import lax
from jax.nn import relu
from jaxtyping import Array, Float

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.atrous import METHODS, forced, unless_differentiated
from deeplab_jax.models.layers import (
    BatchNorm,
    ConvNorm,
    LayerMaker,
    max_pool,
    normalized,
    recompute,
    scaled_channels,
)


class UnitPlan(NamedTuple):
    """Place of a residual unit in the network.

    Attributes:
      in_channels: of what it is given.
      channels: of its inner convolutions; it returns `expansion` times as many.
      stride: pixels.
      entry_rate: of its convolutions up to the strided one.
      rate: of its convolutions after the strided one.
      project: whether the shortcut is a convolution. By the stage's published stride, so that the
        parameters are the same at each output stride.
      activated: whether what it is given was just normalised and activated, as by the stem.
    """

    in_channels: int
    channels: int
    stride: int
    entry_rate: int
    rate: int
    project: bool
    activated: bool = False


class _Unit(nnx.Module):
    """A residual unit of some `layers`.

    Attributes:
      pre_activation: whether batch norm and relu come before each convolution.
      downsample: `[conv, norm]` of the shortcut, see `_shortcut`.
    """

    pre_activation: bool
    downsample: nnx.List | None

    def layers(self) -> list[tuple[Any, Any]]:
        """(convolution, batch norm) in the order of use."""
        raise NotImplementedError

    def conv_norms(self) -> list[tuple[Any, Any]]:
        return [] if self.pre_activation else self.layers()

    def __call__(self, x: Float[Array, "n h w cin"], *, update_bn: bool = False) -> Array:
        unit = _pre_activation_unit if self.pre_activation else _post_activation_unit
        return unit(x, self.layers(), self.downsample, update_bn)


class BasicUnit(_Unit):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, plan: UnitPlan, architecture: Architecture, make: LayerMaker) -> None:
        self.pre_activation = architecture.residual == "pre"
        c_in, c = plan.in_channels, plan.channels
        self.conv1 = make.conv(c_in, c, 3, stride=plan.stride, rate=plan.entry_rate)
        self.bn1 = _first_norm(plan, make, self.pre_activation)
        self.conv2 = make.conv(c, c, 3, rate=plan.rate)
        self.bn2 = make.norm(c)
        self.downsample = _shortcut(plan, c, make, self.pre_activation)

    def layers(self) -> list[tuple[Any, Any]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class BottleneckUnit(_Unit):
    """A 1x1, a 3x3 and a 1x1 convolution to four times the channels, and a shortcut."""

    expansion = 4

    def __init__(self, plan: UnitPlan, architecture: Architecture, make: LayerMaker) -> None:
        self.pre_activation = architecture.residual == "pre"
        c_in, c, c_out = plan.in_channels, plan.channels, plan.channels * self.expansion
        stride1, stride2, rate2 = (
            (1, plan.stride, plan.entry_rate)
            if architecture.stride_place == "conv2"
            else (plan.stride, 1, plan.rate)
        )
        self.conv1 = make.conv(c_in, c, 1, stride=stride1)
        self.bn1 = _first_norm(plan, make, self.pre_activation)
        self.conv2 = make.conv(c, c, 3, stride=stride2, rate=rate2)
        self.bn2 = make.norm(c)
        self.conv3 = make.conv(c, c_out, 1)
        self.bn3 = make.norm(c if self.pre_activation else c_out)
        self.downsample = _shortcut(plan, c_out, make, self.pre_activation)

    def layers(self) -> list[tuple[Any, Any]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


def _first_norm(plan: UnitPlan, make: LayerMaker, pre_activation: bool) -> BatchNorm | None:
    """Batch norm behind the first convolution, or before it where activation comes first."""
    if not pre_activation:
        return make.norm(plan.channels)
    return None if plan.activated else make.norm(plan.in_channels)


def _shortcut(
    plan: UnitPlan, out_channels: int, make: LayerMaker, pre_activation: bool
) -> nnx.List | None:
    """`[conv, norm]` of a projection (no norm before an activation comes first), or None."""
    if not plan.project:
        return None
    conv = make.conv(plan.in_channels, out_channels, 1, stride=plan.stride)
    return nnx.List([conv]) if pre_activation else ConvNorm(conv, make.norm(out_channels))


def _post_activation_unit(
    x: Array, layers: list[tuple[Any, Any]], downsample: nnx.List | None, update_bn: bool
) -> Array:
    """He et al. 2015, figure 5: relu(shortcut + norm(conv(... relu(norm(conv(x))))))."""
    y = x
    for index, (conv, norm) in enumerate(layers):
        y = normalized(conv, norm, relu(y) if index else y, update_bn=update_bn)
    shortcut = x if downsample is None else downsample(x, update_bn=update_bn)
    return _activated_sum(shortcut, y, layers[-1][1].var[...][0])


def _activated_sum(shortcut: Array, y: Array, variance: Array) -> Array:
    """relu(shortcut + y); a variance, which is not negative, only keeps XLA from knowing so."""
    if forced(METHODS):  # for a reader of the program, or for XLA's partitioner
        return _plain_sum(shortcut, y, variance)
    on_cpu = unless_differentiated(_sum_once, _plain_sum)
    return lax.platform_dependent(shortcut, y, variance, cpu=on_cpu, default=_plain_sum)


def _plain_sum(shortcut: Array, y: Array, _: Array) -> Array:
    return relu(shortcut + y)


def _sum_once(shortcut: Array, y: Array, variance: Array) -> Array:
    """The sum behind a conditional, which XLA:CPU does not fuse into what reads it.

    Where no gradient keeps the sum XLA:CPU would compute it anew for each reader, and one of these
    is the next unit's sum: so each unit would add up all before it, which in ResNet-101 is a fifth
    of the forward pass. An optimization barrier is gone before XLA:CPU fuses.
    """
    return lax.cond(variance >= 0, _plain_sum, _plain_sum, shortcut, y, variance)


def _pre_activation_unit(
    x: Array, layers: list[tuple[Any, Any]], downsample: nnx.List | None, update_bn: bool
) -> Array:
    """He et al. 2016, figure 4e: shortcut + conv(relu(norm(...))), the sum left as it is.

    A projection reads the first activation, as in the authors' code; an identity reads `x`. The
    first unit's first activation is the stem's, before the paths divide: both read `x`.
    """
    y, shortcut = x, x
    for index, (conv, norm) in enumerate(layers):
        if norm is not None:
            y = relu(norm(y, update_bn=update_bn))
        if index == 0 and downsample is not None:
            shortcut = downsample[0](y)
        y = conv(y)
    return shortcut + y


class Spec(NamedTuple):
    unit: type[BasicUnit] | type[BottleneckUnit]
    num_units: tuple[int, int, int, int]


SPECS: dict[str, Spec] = {
    "resnet18": Spec(BasicUnit, (2, 2, 2, 2)),
    "resnet34": Spec(BasicUnit, (3, 4, 6, 3)),
    "resnet50": Spec(BottleneckUnit, (3, 4, 6, 3)),
    "resnet101": Spec(BottleneckUnit, (3, 4, 23, 3)),
    "resnet152": Spec(BottleneckUnit, (3, 8, 36, 3)),
}

STEM_CHANNELS = 64
STEM_STRIDE = 4  # pixels, the max pool's included
STAGE_CHANNELS = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 2, 2)
LAST_STAGE = 3  # the one that a cascade repeats: layer4, the paper's block4


def plan_stages(architecture: Architecture) -> list[list[UnitPlan]]:
    """The units of each stage, with their strides and rates at the architecture's output stride.

    The copies of a cascade come last.
    """
    unit, num_units = SPECS[architecture.backbone]
    published = [*range(LAST_STAGE + 1), *[LAST_STAGE] * (architecture.cascade or 0)]
    in_channels = scaled_channels(STEM_CHANNELS, architecture.width)
    total_stride, rate = STEM_STRIDE, 1
    stages: list[list[UnitPlan]] = []
    for stage in published:
        published_stride = STAGE_STRIDES[stage]
        channels = scaled_channels(STAGE_CHANNELS[stage], architecture.width)
        stride, rate_before = published_stride, rate
        if total_stride * stride > architecture.output_stride:
            stride, rate = 1, rate * published_stride
        total_stride *= stride
        entry_rate = rate_before if architecture.dilation_rule == "torchvision" else rate
        grid = architecture.multi_grid if stage == LAST_STAGE else (1,)
        plans = []
        for index in range(num_units[stage]):
            first, unit_rate = index == 0, grid[index % len(grid)]
            out_channels = channels * unit.expansion
            plans.append(
                UnitPlan(
                    in_channels=in_channels,
                    channels=channels,
                    stride=stride if first else 1,
                    entry_rate=(entry_rate if first else rate) * unit_rate,
                    rate=rate * unit_rate,
                    project=first and (published_stride > 1 or in_channels != out_channels),
                    activated=first and not stages,
                )
            )
            in_channels = out_channels
        stages.append(plans)
    return stages


class ResNet(nnx.Module):
    """Backbone of DeepLabv3.

    Attributes:
      conv1: the 7x7 convolution; in a "deep" stem the list `[conv, bn, None, conv, bn, None,
        conv]`, with timm's places.
      bn1: the stem's batch norm.
      layer1, ..., layer4: residual units; layer5 to layer7 in a cascade.
      final_bn: batch norm behind the last of them where activation comes first, otherwise None.
      channels: number of channels of each stage's features.
      out_feature: name of the last stage.
    """

    aux_feature = "layer3"
    low_level_feature = "layer1"  # of stride 4, "Conv2" of arXiv 1802.02611

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs | None) -> None:
        make = LayerMaker(architecture.dtype, *architecture.backbone_bn, rngs)
        pre_activation = architecture.residual == "pre"
        stem_channels = scaled_channels(STEM_CHANNELS, architecture.width)
        self.conv1 = _stem(architecture, stem_channels, make)
        self.bn1 = make.norm(stem_channels)
        unit = SPECS[architecture.backbone].unit
        plans = plan_stages(architecture)
        for number, stage in enumerate(plans, start=1):
            units = nnx.List([unit(plan, architecture, make) for plan in stage])
            setattr(self, f"layer{number}", units)
        self.out_feature = f"layer{len(plans)}"
        self.channels = tuple(stage[-1].channels * unit.expansion for stage in plans)
        self.final_bn = make.norm(self.channels[-1]) if pre_activation else None

    @property
    def out_channels(self) -> int:
        return self.channels[-1]

    @property
    def aux_channels(self) -> int:
        return self.channels[LAST_STAGE - 1]

    @property
    def low_level_channels(self) -> int:
        return self.channels[0]

    def __call__(
        self, images: Float[Array, "n h w c"], *, update_bn: bool = False, remat: bool = False
    ) -> dict[str, Array]:
        """Features "stem" (after the max pool), "layer1", ..., `[n, h', w', c']` each.

        Args:
          images: normalised pixels.
          update_bn: whether batch norm uses the batch's statistics and moves the running ones.
          remat: whether each unit is computed again in the backward pass, to save memory.
        """
        x = images
        for conv, norm in self.conv_norms():
            x = relu(normalized(conv, norm, x, update_bn=update_bn))
        features = {"stem": max_pool(x)}
        x = features["stem"]
        for name, stage in self._stages():
            for unit in stage:
                if remat:
                    x = recompute(unit, x, update_bn=update_bn)
                else:
                    x = unit(x, update_bn=update_bn)
            features[name] = x
        if self.final_bn is not None:
            features[self.out_feature] = relu(self.final_bn(x, update_bn=update_bn))
        return features

    def conv_norms(self) -> list[tuple[Any, Any]]:
        """(convolution, batch norm) of the stem, in the order of use."""
        if isinstance(self.conv1, nnx.List):
            conv_a, bn_a, _, conv_b, bn_b, _, conv_c = self.conv1
            return [(conv_a, bn_a), (conv_b, bn_b), (conv_c, self.bn1)]
        return [(self.conv1, self.bn1)]

    def _stages(self) -> Iterator[tuple[str, nnx.List]]:
        for number in range(1, len(self.channels) + 1):
            yield f"layer{number}", getattr(self, f"layer{number}")


def _stem(architecture: Architecture, channels: int, make: LayerMaker) -> Any:
    if architecture.stem == "conv7x7":
        return make.conv(architecture.in_channels, channels, 7, stride=2)
    half = scaled_channels(STEM_CHANNELS // 2, architecture.width)
    return nnx.List(
        [
            make.conv(architecture.in_channels, half, 3, stride=2),
            make.norm(half),
            None,
            make.conv(half, half, 3),
            make.norm(half),
            None,
            make.conv(half, channels, 3),
        ]
    )
