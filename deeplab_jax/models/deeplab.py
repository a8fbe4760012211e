"""DeepLabv3 (Chen et al. 2017, arXiv 1706.05587): backbone, head, auxiliary head, decoder."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from deeplab_jax.models.architecture import BACKBONES, HEADS, Architecture, architecture
from deeplab_jax.models.contracts import Backbone, Head, check_features, check_head
from deeplab_jax.models.decoders import TransposedDecoder
from deeplab_jax.models.heads import fcn_head
from deeplab_jax.models.ops.convolution import FASTEST, use_implementation
from deeplab_jax.models.ops.masking import padding_mask
from deeplab_jax.models.ops.resize import resize_like


class DeepLabV3(nnx.Module):
    """A backbone and the heads on its features.

    Like all of Flax's modules it is in training mode when it is made: `model.eval()` has batch norm
    use its running statistics and turns dropout off, `model.train()` turns both on again.

    Every `nnx.Conv` inside, the user's own ones too, is computed by the fastest implementation for
    the platform and respects the padding mask (see `models.ops.convolution`), unless it was given
    another function than `lax.conv_general_dilated`.

    Attributes:
      backbone: gives features by name, see `models.contracts.Backbone`.
      classifier: the head of the "out" logits, see `models.contracts.Head`.
      aux_classifier: the head of the "aux" logits, or None.
      decoder: learned upsampling of the "out" logits; None: they are resized.
    """

    def __init__(
        self,
        backbone: Backbone,
        classifier: Head,
        aux_classifier: Head | None = None,
        decoder: TransposedDecoder | None = None,
    ) -> None:
        """Joins parts that fit.

        Raises:
          ValueError: a head reads features that the backbone does not have, or not with so many
            channels.
        """
        check_head("classifier", classifier, backbone)
        if aux_classifier is not None:
            check_head("aux_classifier", aux_classifier, backbone)
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.decoder = decoder
        use_implementation(self, FASTEST)

    def __call__(
        self,
        images: Float[Array, "n h w c"],
        *,
        sizes: Int[Array, "n 2"] | None = None,
        upsample: bool = True,
        rngs: jax.Array | None = None,
    ) -> dict[str, Float[Array, "n ho wo classes"]]:
        """Returns the logits "out", and "aux" with an auxiliary head: float32, of the images' size.

        Args:
          images: normalised pixels, of any height and width.
          sizes: height and width of each image, pixels; what lies beyond is padding. The logits on
            the image are then those of the image alone, up to rounding; those beyond have no
            meaning. For inference only: batch norm's statistics would include the padding.
          upsample: whether logits are resized to the images' size. False returns them at their own
            stride, for a loss that resizes them in parts. A learned decoder always upsamples.
          rngs: key of dropout, needed in training mode.

        Raises:
          ValueError: the images have another number of channels than the backbone, the sizes are
            not `[n, 2]`, or the backbone's features do not have the size that it declares.
        """
        in_channels = getattr(self.backbone, "in_channels", None)
        if images.ndim != 4 or images.shape[3] != (in_channels or images.shape[3]):
            raise ValueError(
                f"images must be [n, h, w, {in_channels or 'c'}], got {list(images.shape)}"
            )
        keys: Any = (None, None) if rngs is None else jax.random.split(rngs)
        with padding_mask(sizes, images.shape):
            features = self.backbone(images)
            check_features(self.backbone, features, images)
            outputs = {"out": self.classifier(features, rngs=keys[0])}
            if self.aux_classifier is not None:
                outputs["aux"] = self.aux_classifier(features, rngs=keys[1])
            if self.decoder is not None:
                outputs["out"] = self.decoder(outputs["out"], images)
            if upsample:
                outputs = {name: resize_like(each, images) for name, each in outputs.items()}
        return outputs


def build_model(
    name_or_architecture: str | Architecture,
    *,
    num_classes: int | None = None,
    rngs: nnx.Rngs,
    **overrides: Any,
) -> DeepLabV3:
    """Builds a model from a description.

    Args:
      name_or_architecture: a name in `ARCHITECTURES`, such as "paper_resnet101"; or an
        architecture.
      num_classes: number of logits a pixel; needed with a name.
      rngs: `rngs.params` draws the kernels.
      **overrides: fields of the named architecture, see `architecture`.

    Raises:
      UserError: an unknown name or field, or a value that cannot be.

    Example:
      >>> model = build_model("paper_resnet18", num_classes=21, width=0.125, rngs=nnx.Rngs(0))
      >>> model.eval()
      >>> model(jax.numpy.zeros((1, 65, 65, 3)))["out"].shape
      (1, 65, 65, 21)
    """
    if isinstance(name_or_architecture, Architecture):
        if overrides or num_classes is not None:
            raise TypeError("num_classes and overrides are for a name, not for an Architecture")
        described = name_or_architecture
    else:
        if num_classes is None:
            raise TypeError("build_model needs num_classes with a name")
        described = architecture(name_or_architecture, num_classes=num_classes, **overrides)
    backbone = BACKBONES[described.backbone](described, rngs=rngs)
    classifier = HEADS[described.head](backbone, described, rngs=rngs)
    return DeepLabV3(
        backbone,
        classifier,
        fcn_head(backbone, described, rngs=rngs) if described.aux_head else None,
        TransposedDecoder(described.num_classes, described.output_stride, dtype=described.dtype)
        if described.decoder == "transposed"
        else None,
    )
