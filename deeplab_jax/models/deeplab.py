"""DeepLabv3 (Chen et al. 2017, arXiv 1706.05587): backbone, head, auxiliary head, decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.nn import relu
from jaxtyping import Array, Float, Int

from deeplab_jax.models.architecture import ARCHITECTURES, Architecture, architecture
from deeplab_jax.models.aspp import ASPP
from deeplab_jax.models.layers import (
    BatchNorm,
    Conv,
    LayerMaker,
    dropout,
    folded_norms,
    normalized,
    scaled_channels,
)
from deeplab_jax.models.mobilenet_v3 import MobileNetV3
from deeplab_jax.models.padding import valid_area, valid_sizes
from deeplab_jax.models.plus import PlusDecoder
from deeplab_jax.models.resize import TransposedDecoder, resize_bilinear
from deeplab_jax.models.resnet import SPECS, ResNet

__all__ = [
    "ARCHITECTURES",
    "BACKBONES",
    "Architecture",
    "DeepLabV3",
    "architecture",
]

# A backbone gives features by name, of which it says in `out_feature`, `aux_feature` which the
# heads read, in `low_level_feature` which a "plus" decoder does, and in `out_channels`,
# `aux_channels`, `low_level_channels` how many channels these have.
BACKBONES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(SPECS, ResNet),
    "mobilenet_v3_large": MobileNetV3,
}

AUX_DROPOUT = 0.1
HEAD_CHANNELS = 256


class DeepLabHead(nnx.List):
    """ASPP `[0]` and logits `[4]`; between them, if `head_conv`, a 3x3 `[1]` and its norm `[2]`.

    The places are those of torchvision's `DeepLabHead`, also where they are empty. `[3]`, there a
    relu, is DeepLabv3+'s decoder if there is one. In a cascade there is no ASPP, and the logits
    are a 1x1 convolution of the last stage's features.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        architecture: Architecture,
        make: LayerMaker,
    ) -> None:
        aspp, channels = None, in_channels
        if architecture.cascade is None:
            aspp = ASPP(in_channels, architecture, make)
            channels = aspp.out_channels
        layers: list[Any] = [None, None]
        if architecture.head_conv:
            out_channels = scaled_channels(HEAD_CHANNELS, architecture.width)
            layers = [make.conv(channels, out_channels, 3), make.norm(out_channels)]
            channels = out_channels
        plus = None
        if architecture.decoder == "plus":
            plus = PlusDecoder(channels, low_level_channels, architecture.width, make)
            channels = plus.out_channels
        super().__init__([aspp, *layers, plus, make.logits(channels, architecture.num_classes)])
        self.dropout = architecture.dropout

    def conv_norms(self) -> list[tuple[Conv, BatchNorm]]:
        return [] if self[1] is None else [(self[1], self[2])]

    def __call__(
        self,
        features: Float[Array, "n h w c"],
        low_level: Float[Array, "n hl wl cl"] | None = None,
        *,
        update_bn: bool = False,
        key: jax.Array | None = None,
    ) -> Float[Array, "n ho wo classes"]:
        """Logits of the features' size; with the decoder of v3+, of the low-level features'."""
        aspp, conv, norm, plus, logits = self
        if aspp is not None:
            x = aspp(features, update_bn=update_bn, key=key)
        else:
            x = dropout(features, self.dropout, key)
        if conv is not None:
            x = relu(normalized(conv, norm, x, update_bn=update_bn))
        if plus is not None:
            x = plus(x, low_level, update_bn=update_bn)
        return logits(x)


class FCNHead(nnx.List):
    """Auxiliary head: 3x3 convolution `[0]`, batch norm `[1]`, dropout, logits `[4]`.

    The places are those of torchvision's `FCNHead`.
    """

    def __init__(self, in_channels: int, architecture: Architecture, make: LayerMaker) -> None:
        # in_channels carries the width already.
        channels = scaled_channels(in_channels, 1 / 4)
        conv, norm = make.conv(in_channels, channels, 3), make.norm(channels)
        super().__init__([conv, norm, None, None, make.logits(channels, architecture.num_classes)])
        self.dropout = min(AUX_DROPOUT, architecture.dropout)

    def conv_norms(self) -> list[tuple[Conv, BatchNorm]]:
        return [(self[0], self[1])]

    def __call__(
        self,
        features: Float[Array, "n h w c"],
        *,
        update_bn: bool = False,
        key: jax.Array | None = None,
    ) -> Float[Array, "n h w classes"]:
        conv, norm, _, _, logits = self
        x = relu(normalized(conv, norm, features, update_bn=update_bn))
        return logits(dropout(x, self.dropout, key))


class DeepLabV3(nnx.Module):
    """DeepLabv3. Its variables are `nnx.Param` and `nnx.BatchStat`, named as torchvision's modules.

    Attributes:
      architecture: what it is made of.
      backbone: see `BACKBONES`.
      classifier: the head of the "out" logits.
      aux_classifier: the head of the "aux" logits, or None.
      decoder: what upsamples the "out" logits if that is learned; None: they are resized.
    """

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs | None) -> None:
        """`rngs.params` draws the kernels; None: they are 0, for those who need their shapes."""
        make = LayerMaker(
            architecture.dtype, architecture.bn_momentum, architecture.bn_epsilon, rngs
        )
        self.architecture = architecture
        self.backbone = BACKBONES[architecture.backbone](architecture, rngs=rngs)
        self.classifier = DeepLabHead(
            self.backbone.out_channels, self.backbone.low_level_channels, architecture, make
        )
        self.aux_classifier = (
            FCNHead(self.backbone.aux_channels, architecture, make)
            if architecture.aux_head
            else None
        )
        self.decoder = (
            TransposedDecoder(
                architecture.num_classes, architecture.output_stride, dtype=architecture.dtype
            )
            if architecture.decoder == "transposed"
            else None
        )

    def __call__(
        self,
        images: Float[Array, "n h w c"],
        train: bool = False,
        key: jax.Array | None = None,
        *,
        freeze_bn: bool = False,
        remat: bool = False,
        sizes: Int[Array, "n 2"] | None = None,
        folded: bool = False,
        upsample: bool = True,
    ) -> dict[str, Float[Array, "n ho wo classes"]]:
        """Logits "out", and "aux" where there is that head, float32, at the images' size.

        Args:
          images: normalised pixels, of any height and width.
          train: whether batch norm uses the batch's statistics and moves the running ones, and
            dropout acts.
          key: of dropout; needed when `train`, unless the architecture's dropout is 0.
          freeze_bn: whether batch norm keeps to its running statistics although `train`.
          remat: whether each residual unit is computed again in the backward pass: less memory
            for about a third more arithmetic.
          sizes: height and width of each image, pixels. What lies beyond is padding: the logits on
            the image are then those of the image alone, up to rounding, and have no meaning beyond.
            Not when `train`.
          folded: whether the variables are those of `FunctionalModel.fold`. Not when `train`.
          upsample: whether the logits are resized to the images' size; False: as they are, for a
            loss that does it in parts. A learned decoder always gives the images' size.

        Raises:
          ValueError: the images' channels are not the architecture's, the key is missing, folded
            variables are trained, or the sizes are not as `models.padding.valid_area` takes them.
        """
        self._check(images, train, key, sizes, folded)
        out_key, aux_key = (None, None)
        if train and key is not None:
            out_key, aux_key = jax.random.split(key)
        update_bn = train and not freeze_bn
        with valid_area(sizes, images.shape), folded_norms(folded):
            features = self.backbone(images, update_bn=update_bn, remat=remat)

            out = self.classifier(
                features[self.backbone.out_feature],
                features[self.backbone.low_level_feature],
                update_bn=update_bn,
                key=out_key,
            )
            outputs = {"out": out}
            if self.aux_classifier is not None:
                aux = features[self.backbone.aux_feature]
                outputs["aux"] = self.aux_classifier(aux, update_bn=update_bn, key=aux_key)
            if self.decoder is not None:
                outputs["out"] = _to_images_size(self.decoder, out, images)
            if upsample:
                outputs = {
                    name: _to_images_size(resize_bilinear, logits, images)
                    for name, logits in outputs.items()
                }
        return outputs

    def _check(
        self,
        images: Array,
        train: bool,
        key: jax.Array | None,
        sizes: Array | None,
        folded: bool,
    ) -> None:
        in_channels = self.architecture.in_channels
        if images.ndim != 4 or images.shape[3] != in_channels:
            raise ValueError(f"images must be [n, h, w, {in_channels}], got {list(images.shape)}")
        if train and key is None and self.architecture.dropout > 0:
            raise ValueError(
                f"train=True needs a key: dropout is {self.architecture.dropout}, not 0"
            )
        if train and sizes is not None:
            # Batch norm's statistics would be those of the padding too.
            raise ValueError("train=True takes no sizes: padding is for inference alone")
        if train and folded:
            raise ValueError("folded variables are for inference: train those that were folded")


def _to_images_size(decode: Callable[..., Array], logits: Array, images: Array) -> Array:
    height, width = images.shape[1:3]
    return decode(
        logits, height, width, in_sizes=valid_sizes(logits), out_sizes=valid_sizes(images)
    )
