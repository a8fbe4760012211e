"""ResNet (He et al. 2015, 2016), in which atrous convolution may replace the later strides.

Output stride 32 is the published network. At 16 and 8 the last one or two stages have stride 1, and
their convolutions a dilation instead; the parameters stay the same. A cascade (arXiv 1706.05587,
section 3.2) appends up to three copies of `layer4`, the paper's block4. Each copy halves the
features, down to output stride 256, or doubles the dilation once the requested output stride is
reached. In block4 and its copies the multi-grid (section 3.2.1) multiplies the dilations. Where
strides are removed, the dilation rule decides the dilations:

- "torchvision": the dilation of a convolution is the product of the strides removed before it.
  Subsampling the dense features by the removed strides gives the strided network's features
  exactly. The 3x3 convolution of a bottleneck that lost its stride has the dilation before it.
- "paper": all blocks of a stage have the same dilation: at output stride 16, 2 in block4; at 8, 2
  in block3 and 4 in block4.
- "mmseg" (mmsegmentation): as "torchvision", but the second convolution of a basic block is never
  dilated, and a multi-grid other than all ones gives the rates of block4's convolutions themselves.

With full pre-activation (He et al. 2016, arXiv 1603.05027, appendix) the first block has no first
activation of its own, because the stem ends with one. Batch norm and relu follow the last block.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
from flax.core import FrozenDict
from jax.nn import relu
from jaxtyping import Array, Float

from deeplab_jax.models.architecture import BACKBONE_NEUTRAL, Architecture
from deeplab_jax.models.contracts import Feature
from deeplab_jax.models.layers import BatchNorm, Conv, ConvBN, batch_norm, scaled_channels
from deeplab_jax.models.ops.convolution import add_relu
from deeplab_jax.models.ops.pooling import average_pool, max_pool


class BlockSpec(NamedTuple):
    """The settings of a residual block.

    Attributes:
      in_features: number of channels of the input.
      features: number of channels of the inner convolutions; the output has `expansion` times as
        many.
      strides: stride of the block, pixels.
      first_dilation: dilation of the convolutions up to the strided one.
      kernel_dilation: dilation of the convolutions after the strided one.
      project: whether the shortcut is a convolution. It depends on the published stride of the
        stage, so that the parameters are the same at each output stride.
      activated: whether the input is already normalized and activated, as by the stem.
      pool: whether the shortcut averages 2x2 pixels at the stride of the block before its
        convolution, which then has stride 1.
    """

    in_features: int
    features: int
    strides: int
    first_dilation: int
    kernel_dilation: int
    project: bool
    activated: bool = False
    pool: bool = False


class _ResidualBlock(nnx.Module):
    """Base class of residual blocks.

    Attributes:
      conv1, bn1, ...: convolutions and norms. A norm follows its convolution, or precedes it with
        `pre_activation`.
      downsample: convolution of the shortcut, with batch norm unless `pre_activation`; or None.
      pool_strides: stride of the average pool before `downsample`; 0 if there is none.
      add_relu: function that computes `relu(shortcut + y)`.
    """

    num_convs: int
    expansion: int

    def __init__(
        self,
        spec: BlockSpec,
        architecture: Architecture,
        *,
        norm: Callable[[int], BatchNorm],
        rngs: nnx.Rngs,
    ) -> None:
        layer: dict[str, Any] = {"dtype": architecture.dtype, "rngs": rngs}
        self.pre_activation = architecture.residual == "pre"
        convs = self.convs(spec, architecture, functools.partial(Conv, **layer))
        for number, conv in enumerate(convs, start=1):
            features = conv.in_features if self.pre_activation else conv.out_features
            activated = self.pre_activation and number == 1 and spec.activated
            setattr(self, f"conv{number}", conv)
            setattr(self, f"bn{number}", None if activated else norm(features))
        sizes = spec.in_features, spec.features * self.expansion
        shortcut: Any = Conv if self.pre_activation else functools.partial(ConvBN, norm=norm)
        layer["strides"] = 1 if spec.pool else spec.strides
        self.pool_strides = spec.strides if spec.pool else 0
        self.downsample = shortcut(*sizes, **layer) if spec.project else None
        self.add_relu: Callable[[Array, Array, Array], Array] = add_relu

    def convs(
        self, spec: BlockSpec, architecture: Architecture, conv: Callable[..., Conv]
    ) -> Sequence[Conv]:
        """Makes the convolutions in the order of execution."""
        raise NotImplementedError

    def conv_norms(self) -> Sequence[tuple[str, str]]:
        if self.pre_activation:
            return []
        return [(f"conv{i}", f"bn{i}") for i in range(1, self.num_convs + 1)]

    def __call__(self, x: Float[Array, "n h w cin"]) -> Float[Array, "n ho wo cout"]:
        return self._pre_activation(x) if self.pre_activation else self._post_activation(x)

    def _layers(self) -> Iterator[tuple[Any, Any]]:
        for number in range(1, self.num_convs + 1):
            yield getattr(self, f"conv{number}"), getattr(self, f"bn{number}")

    def _post_activation(self, x: Array) -> Array:
        """He et al. 2015, figure 5: relu(shortcut + norm(conv(... relu(norm(conv(x))))))."""
        y = x
        for index, (conv, norm) in enumerate(self._layers()):
            y = norm(conv(relu(y) if index else y))
        return self.add_relu(self._shortcut(x), y, conv.kernel[...][0, 0, 0, 0])

    def _pre_activation(self, x: Array) -> Array:
        """He et al. 2016, figure 4e: shortcut + conv(relu(norm(...))), with no activation after.

        A projection reads the first activation, as in the authors' code; an identity reads `x`. In
        the first block, whose input is activated already, both read `x`.
        """
        y, shortcut = x, x
        for index, (conv, norm) in enumerate(self._layers()):
            if norm is not None:
                y = relu(norm(y))
            if index == 0 and self.downsample is not None:
                shortcut = self._shortcut(y)
            y = conv(y)
        return shortcut + y

    def _shortcut(self, x: Array) -> Array:
        if self.downsample is None:
            return x
        return self.downsample(average_pool(x, self.pool_strides) if self.pool_strides else x)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions and a shortcut."""

    num_convs = 2
    expansion = 1

    def convs(
        self, spec: BlockSpec, architecture: Architecture, conv: Callable[..., Conv]
    ) -> Sequence[Conv]:
        features, dilation = spec.features, spec.first_dilation
        return (
            conv(spec.in_features, features, 3, spec.strides, kernel_dilation=dilation),
            conv(features, features, 3, kernel_dilation=spec.kernel_dilation),
        )


class Bottleneck(_ResidualBlock):
    """A 1x1, a 3x3 and a 1x1 convolution with four times the channels, and a shortcut."""

    num_convs = 3
    expansion = 4

    def convs(
        self, spec: BlockSpec, architecture: Architecture, conv: Callable[..., Conv]
    ) -> Sequence[Conv]:
        features = spec.features
        strides1, strides2, dilation = 1, spec.strides, spec.first_dilation
        if architecture.stride_place == "conv1":
            strides1, strides2, dilation = spec.strides, 1, spec.kernel_dilation
        return (
            conv(spec.in_features, features, 1, strides1),
            conv(features, features, 3, strides2, kernel_dilation=dilation),
            conv(features, features * self.expansion, 1),
        )


class Stages(NamedTuple):
    """The kind of block of a ResNet and the number of blocks of each stage."""

    block: type[BasicBlock] | type[Bottleneck]
    sizes: tuple[int, int, int, int]


# He et al. 2015, arXiv 1512.03385, table 1.
RESNETS: dict[str, Stages] = {
    "resnet18": Stages(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Stages(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Stages(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Stages(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Stages(Bottleneck, (3, 8, 36, 3)),
}
STEM_FEATURES = 64
# Numbers of channels of a 7x7 convolution, or of three 3x3 convolutions.
STEMS = {"conv7x7": (STEM_FEATURES,), "deep": (32, 32, 64), "deep128": (64, 64, 128)}
STEM_STRIDE = 4  # pixels, the max pool's included
STAGE_FEATURES = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 2, 2)
LAST_STAGE = 3  # layer4, the paper's block4, which a cascade repeats


def block_specs(architecture: Architecture) -> list[list[BlockSpec]]:
    """Returns the blocks of each stage, including the stages of a cascade.

    They have the strides and dilations of the architecture's output stride.
    """
    block, sizes = RESNETS[architecture.backbone]
    published = [*range(LAST_STAGE + 1), *[LAST_STAGE] * (architecture.cascade or 0)]
    in_features = stem_features(architecture)
    mmseg = architecture.dilation_rule == "mmseg"
    total_stride, dilation = STEM_STRIDE, 1
    stages: list[list[BlockSpec]] = []
    for stage in published:
        published_stride = STAGE_STRIDES[stage]
        features = scaled_channels(STAGE_FEATURES[stage], architecture.width)
        strides, first_dilation = published_stride, dilation
        if total_stride * strides > architecture.output_stride:
            strides, dilation = 1, dilation * published_stride
        total_stride *= strides
        if architecture.dilation_rule == "paper":
            first_dilation = dilation
        grid = architecture.multi_grid if stage == LAST_STAGE else (1,)
        specs = []
        for index in range(sizes[stage]):
            first, unit_rate = index == 0, grid[index % len(grid)]
            before, after = (
                rate * unit_rate for rate in (first_dilation if first else dilation, dilation)
            )
            if mmseg:
                before = before if set(grid) == {1} else unit_rate
                after = before if block is Bottleneck else 1
            out_features = features * block.expansion
            specs.append(
                BlockSpec(
                    in_features=in_features,
                    features=features,
                    strides=strides if first else 1,
                    first_dilation=before,
                    kernel_dilation=after,
                    project=first and (published_stride > 1 or in_features != out_features),
                    activated=first and not stages,
                    pool=first and published_stride > 1 and architecture.shortcut == "avg_pool",
                )
            )
            in_features = out_features
        stages.append(specs)
    return stages


class ResNet(nnx.Module):
    """A ResNet without its classifier.

    Attributes:
      stem: convolutions with batch norm and relu: one 7x7, or three 3x3 in a deep stem.
      layer1, ..., layer4: lists of residual blocks; in a cascade also layer5 to layer7.
      features: channels and stride of each feature map that `__call__` returns.
      final_bn: batch norm after the last block with pre-activation, otherwise None.
      remat: whether to recompute each block in the backward pass, to save memory.
    """

    options = frozenset(BACKBONE_NEUTRAL) - {"padding"}
    aux_feature = "layer3"
    low_level_feature = "layer1"  # stride 4, "Conv2" of arXiv 1802.02611

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs) -> None:
        self.in_channels = architecture.in_channels
        norm = batch_norm(architecture.dtype, *architecture.backbone_bn)
        shared: dict[str, Any] = {"norm": norm, "rngs": rngs}
        self.stem = nnx.List(_stem(architecture, **shared))
        block = RESNETS[architecture.backbone].block
        specs = block_specs(architecture)
        total_stride = STEM_STRIDE
        features: dict[str, Feature] = {"stem": Feature(stem_features(architecture), STEM_STRIDE)}
        for number, stage in enumerate(specs, start=1):
            blocks = nnx.List([block(spec, architecture, **shared) for spec in stage])
            setattr(self, f"layer{number}", blocks)
            total_stride *= stage[0].strides
            out_features = stage[-1].features * block.expansion
            features[f"layer{number}"] = Feature(out_features, total_stride)
        self.features: Mapping[str, Feature] = FrozenDict(features)
        self.out_feature = f"layer{len(specs)}"
        self.final_bn = norm(out_features) if architecture.residual == "pre" else None
        self.remat = False

    def __call__(self, images: Float[Array, "n h w c"]) -> dict[str, Array]:
        """Returns "stem" (the features after the max pool), "layer1", ... of normalized images."""
        x = images
        for conv in self.stem:
            x = conv(x)
        x = max_pool(x)
        features: dict[str, Array] = {"stem": x}
        run = nnx.remat(_ResidualBlock.__call__) if self.remat else _ResidualBlock.__call__
        for name in list(self.features)[1:]:
            for block in getattr(self, name):
                x = run(block, x)
            features[name] = x
        if self.final_bn is not None:
            features[self.out_feature] = relu(self.final_bn(x))
        return features


def stem_features(architecture: Architecture) -> int:
    """Returns the number of channels of the stem's last convolution."""
    return scaled_channels(STEMS[architecture.stem][-1], architecture.width)


def _stem(architecture: Architecture, **shared: Any) -> list[ConvBN]:
    shared |= {"activation": relu, "dtype": architecture.dtype}
    sizes = [scaled_channels(features, architecture.width) for features in STEMS[architecture.stem]]
    kernel_size = 7 if len(sizes) == 1 else 3
    return [
        ConvBN(before, features, kernel_size, strides=1 if number else 2, **shared)
        for number, (before, features) in enumerate(
            itertools.pairwise([architecture.in_channels, *sizes])
        )
    ]
