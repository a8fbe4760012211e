"""DeepLabv3 (Chen et al. 2017, arXiv 1706.05587) from a backbone, heads and a decoder."""

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
    """A backbone and the heads that read its features.

    Like every Flax module it starts in training mode. `model.eval()` makes batch norm use running
    statistics and turns dropout off; `model.train()` reverts both.

    Every `nnx.Conv` inside, including those of user-defined parts, is computed by the fastest
    implementation for the platform and respects the padding mask (see `models.ops.convolution`),
    unless it was made with a `conv_general_dilated` of its own.

    Attributes:
      backbone: returns features by name, see `models.contracts.Backbone`.
      classifier: the head of the "out" logits, see `models.contracts.Head`.
      aux_classifier: the head of the "aux" logits, or None.
      decoder: learned upsampling of the "out" logits, or None for bilinear resizing.
      align_corners: how logits are resized, see `models.ops.resize`.
    """

    def __init__(
        self,
        backbone: Backbone,
        classifier: Head,
        aux_classifier: Head | None = None,
        decoder: TransposedDecoder | None = None,
        *,
        align_corners: bool = False,
    ) -> None:
        """Joins the parts.

        Raises:
          ValueError: a head reads a feature that the backbone does not have, or that has another
            number of channels.
        """
        for role, head in (("classifier", classifier), ("aux_classifier", aux_classifier)):
            if head is not None:
                check_head(role, head, backbone)
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.decoder = decoder
        self.align_corners = align_corners
        use_implementation(self, FASTEST)

    def __call__(
        self,
        images: Float[Array, "n h w c"],
        *,
        sizes: Int[Array, "n 2"] | None = None,
        upsample: bool = True,
        rngs: jax.Array | None = None,
    ) -> dict[str, Float[Array, "n ho wo classes"]]:
        """Computes float32 logits: "out", and "aux" if there is an auxiliary head.

        Args:
          images: normalized pixels, of any height and width.
          sizes: height and width of each image in pixels; the pixels outside are padding. Logits on
            the image are then those of the image without padding, up to rounding; logits on the
            padding have no meaning. For inference only, since the statistics of batch norm would
            include the padding.
          upsample: whether to resize logits to the images' size. False returns them at their own
            stride, for a loss that resizes them in parts. A learned decoder always upsamples.
          rngs: key of dropout, needed in training mode.

        Raises:
          ValueError: the images do not have the backbone's number of channels, the sizes are not
            `[n, 2]`, or the backbone's features do not have the size that it declares.
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
                outputs = {
                    name: resize_like(each, images, align_corners=self.align_corners)
                    for name, each in outputs.items()
                }
        return outputs


def build_model(
    name_or_architecture: str | Architecture,
    *,
    num_classes: int | None = None,
    rngs: nnx.Rngs,
    **overrides: Any,
) -> DeepLabV3:
    """Builds a model from an architecture.

    Args:
      name_or_architecture: a name in `ARCHITECTURES`, such as "paper_resnet101", or an
        `Architecture`.
      num_classes: number of classes; required with a name.
      rngs: random keys; `rngs.params` initializes the kernels.
      **overrides: fields to replace in the named architecture, see `architecture`.

    Raises:
      UserError: an unknown name or field, or an invalid value.

    Example:
      >>> model = build_model("paper_resnet18", num_classes=21, width=0.125, rngs=nnx.Rngs(0))
      >>> model.eval()
      >>> model(jax.numpy.zeros((1, 65, 65, 3)))["out"].shape
      (1, 65, 65, 21)
    """
    if isinstance(name_or_architecture, Architecture):
        if overrides or num_classes is not None:
            raise TypeError("num_classes and overrides are for a name, not for an Architecture")
        chosen = name_or_architecture
    else:
        if num_classes is None:
            raise TypeError("build_model needs num_classes with a name")
        chosen = architecture(name_or_architecture, num_classes=num_classes, **overrides)
    backbone = BACKBONES[chosen.backbone](chosen, rngs=rngs)
    decoder = None
    if chosen.decoder == "transposed":
        decoder = TransposedDecoder(chosen.num_classes, chosen.output_stride, dtype=chosen.dtype)
    return DeepLabV3(
        backbone,
        classifier=HEADS[chosen.head](backbone, chosen, rngs=rngs),
        aux_classifier=fcn_head(backbone, chosen, rngs=rngs) if chosen.aux_head else None,
        decoder=decoder,
        align_corners=chosen.align_corners,
    )
