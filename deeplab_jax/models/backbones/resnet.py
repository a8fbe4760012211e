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
from typing import Any, ClassVar, NamedTuple

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
    """The settings of a residual block."""

    in_features: int
    features: int  # of the inner convolutions; the output has `expansion` times as many
    strides: int
    first_dilation: int  # of the convolutions up to the strided one
    kernel_dilation: int  # of the convolutions after it
    # Whether the shortcut is a convolution. It depends on the published stride of the stage, so
    # that the parameters are the same at each output stride.
    project: bool
    activated: bool = False  # whether the input is normalized and activated, as by the stem
    # Whether the shortcut averages 2x2 pixels at the stride of the block before its convolution,
    # which then has stride 1.
    pool: bool = False


class ResidualBlock(nnx.Module):
    """Base class of residual blocks.

    Attributes:
      conv1, bn1, ...: convolutions and norms. A norm follows its convolution, or precedes it with
        `pre_activation`.
      downsample: convolution of the shortcut, with batch norm unless `pre_activation`; or None.
      pool_strides: stride of the average pool before `downsample`; 0 if there is none.
      add_relu: function that computes `relu(shortcut + y)`.
    """

    kernel_sizes: ClassVar[tuple[int, ...]]
    expansion: ClassVar[int]  # channels of the output per channel of the inner convolutions

    def __init__(
        self,
        spec: BlockSpec,
        architecture: Architecture,
        *,
        norm: Callable[[int], BatchNorm],
        rngs: nnx.Rngs,
    ) -> None:
        self.pre_activation = architecture.residual == "pre"
        options: dict[str, Any] = {"dtype": architecture.dtype, "rngs": rngs}
        inner = [spec.features] * (len(self.kernel_sizes) - 1)
        out_features = spec.features * self.expansion
        widths = itertools.pairwise([spec.in_features, *inner, out_features])
        # The strided convolution of a basic block is always the first.
        strided = 2 if len(inner) == 2 and architecture.stride_place == "conv2" else 1
        for number, (before, after) in enumerate(widths, start=1):
            kernel_size = self.kernel_sizes[number - 1]
            dilation = spec.first_dilation if number <= strided else spec.kernel_dilation
            conv = Conv(
                before,
                after,
                kernel_size,
                spec.strides if number == strided else 1,
                kernel_dilation=dilation if kernel_size > 1 else 1,
                **options,
            )
            activated = self.pre_activation and number == 1 and spec.activated
            setattr(self, f"conv{number}", conv)
            features = before if self.pre_activation else after
            setattr(self, f"bn{number}", None if activated else norm(features))
        shortcut: Any = Conv if self.pre_activation else functools.partial(ConvBN, norm=norm)
        options["strides"] = 1 if spec.pool else spec.strides
        self.pool_strides = spec.strides if spec.pool else 0
        self.downsample = (
            shortcut(spec.in_features, out_features, **options) if spec.project else None
        )
        self.add_relu: Callable[[Array, Array, Array], Array] = add_relu

    def conv_norms(self) -> Sequence[tuple[str, str]]:
        if self.pre_activation:
            return []
        return [(f"conv{i}", f"bn{i}") for i in range(1, len(self.kernel_sizes) + 1)]

    def __call__(self, x: Float[Array, "n h w cin"]) -> Float[Array, "n ho wo cout"]:
        return self._pre_activation(x) if self.pre_activation else self._post_activation(x)

    def _layers(self) -> Iterator[tuple[Any, Any]]:
        for number in range(1, len(self.kernel_sizes) + 1):
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


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut."""

    kernel_sizes = (3, 3)
    expansion = 1


class Bottleneck(ResidualBlock):
    """A 1x1, a 3x3 and a 1x1 convolution with four times the channels, and a shortcut."""

    kernel_sizes = (1, 3, 1)
    expansion = 4


class Stages(NamedTuple):
    """The kind of block of a ResNet and the number of blocks of each stage."""

    block: type[ResidualBlock]
    sizes: tuple[int, int, int, int]


# He et al. 2015, arXiv 1512.03385, table 1.
RESNETS: dict[str, Stages] = {
    "resnet18": Stages(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Stages(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Stages(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Stages(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Stages(Bottleneck, (3, 8, 36, 3)),
}
# Numbers of channels of a 7x7 convolution, or of three 3x3 convolutions.
STEMS = {"conv7x7": (64,), "deep": (32, 32, 64), "deep128": (64, 64, 128)}
STEM_STRIDE = 4  # pixels, the max pool's included
STAGE_FEATURES = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 2, 2)
LAST_STAGE = 3  # layer4, the paper's block4, which a cascade repeats


def stem_channels(architecture: Architecture) -> list[int]:
    """Returns the number of channels of each convolution of the stem."""
    return [scaled_channels(channels, architecture.width) for channels in STEMS[architecture.stem]]


def block_specs(architecture: Architecture) -> list[list[BlockSpec]]:
    """Returns the blocks of each stage, a cascade's included, at the output stride."""
    block, sizes = RESNETS[architecture.backbone]
    in_features = stem_channels(architecture)[-1]
    total_stride, dilation = STEM_STRIDE, 1
    stages: list[list[BlockSpec]] = []
    for stage in [*range(LAST_STAGE + 1), *[LAST_STAGE] * (architecture.cascade or 0)]:
        published_stride = strides = STAGE_STRIDES[stage]
        first_dilation = dilation
        if total_stride * strides > architecture.output_stride:
            strides, dilation = 1, dilation * published_stride
        total_stride *= strides
        if architecture.dilation_rule == "paper":
            first_dilation = dilation
        grid = architecture.multi_grid if stage == LAST_STAGE else (1,)
        features = scaled_channels(STAGE_FEATURES[stage], architecture.width)
        out_features = features * block.expansion
        specs = []
        for index in range(sizes[stage]):
            first, unit_rate = index == 0, grid[index % len(grid)]
            before = unit_rate * (first_dilation if first else dilation)
            after = unit_rate * dilation
            if architecture.dilation_rule == "mmseg":
                before = before if set(grid) == {1} else unit_rate
                after = before if block is Bottleneck else 1
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
        block = RESNETS[architecture.backbone].block
        norm = batch_norm(architecture.dtype, *architecture.backbone_bn)
        shared: dict[str, Any] = {"norm": norm, "rngs": rngs}
        channels = stem_channels(architecture)
        conv: Callable[..., ConvBN] = functools.partial(
            ConvBN, activation=relu, dtype=architecture.dtype, **shared
        )
        self.stem = nnx.List(
            conv(before, after, 7 if len(channels) == 1 else 3, strides=1 if index else 2)
            for index, (before, after) in enumerate(
                itertools.pairwise([self.in_channels, *channels])
            )
        )
        total_stride = STEM_STRIDE
        features = {"stem": Feature(channels[-1], STEM_STRIDE)}
        for number, stage in enumerate(block_specs(architecture), start=1):
            self.out_feature = f"layer{number}"
            blocks = nnx.List([block(spec, architecture, **shared) for spec in stage])
            setattr(self, self.out_feature, blocks)
            total_stride *= stage[0].strides
            out_features = stage[-1].features * block.expansion
            features[self.out_feature] = Feature(out_features, total_stride)
        self.features: Mapping[str, Feature] = FrozenDict(features)
        self.final_bn = norm(out_features) if architecture.residual == "pre" else None
        self.remat = False

    def __call__(self, images: Float[Array, "n h w c"]) -> dict[str, Array]:
        """Returns "stem" (the features after the max pool), "layer1", ... of normalized images."""
        x = images
        for conv in self.stem:
            x = conv(x)
        x = max_pool(x)
        features = {"stem": x}
        run = nnx.remat(ResidualBlock.__call__) if self.remat else ResidualBlock.__call__
        for name in list(self.features)[1:]:
            for block in getattr(self, name):
                x = run(block, x)
            features[name] = x
        if self.final_bn is not None:
            features[self.out_feature] = relu(self.final_bn(x))
        return features
