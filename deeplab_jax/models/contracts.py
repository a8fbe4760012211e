"""Protocols of a backbone and a head, and checks that the two fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jax import export
from jaxtyping import Array, Float

from deeplab_jax.utils.errors import did_you_mean


class Feature(NamedTuple):
    """The size of a feature map that a backbone returns.

    Attributes:
      channels: number of channels.
      stride: size of the image divided by the size of the map, a power of 2 up to 256. For images
        of any height the map has `ceil(height / stride)` rows, and the same for the width.
    """

    channels: int
    stride: int


@runtime_checkable
class Backbone(Protocol):
    """The protocol of a backbone, which is an `nnx.Module`.

    Attributes:
      features: the feature maps by name.
      out_feature: name of the feature that the head reads.
      aux_feature: name of the feature that the auxiliary head reads, or "".
      low_level_feature: name of the feature of stride 4 that DeepLabv3+'s decoder reads, or "".

    Optional attributes: `in_channels` (of the images, checked in each call) and `remat` (whether to
    recompute blocks in the backward pass; training sets it to the config's `train.remat`).
    """

    @property
    def features(self) -> Mapping[str, Feature]: ...

    out_feature: str
    aux_feature: str
    low_level_feature: str

    def __call__(self, images: Float[Array, "n h w c"]) -> dict[str, Array]: ...


@runtime_checkable
class Head(Protocol):
    """The protocol of a head, which is an `nnx.Module`.

    Its last layer should be called `logits`: fine-tuning with another number of classes gives new
    parameters to the layer of that name.

    Attributes:
      in_features: number of channels of each feature that the head reads, by the feature's name.
    """

    @property
    def in_features(self) -> Mapping[str, int]: ...

    def __call__(
        self, features: dict[str, Array], *, rngs: jax.Array | None = None
    ) -> Float[Array, "n h w classes"]: ...


def channels_of(backbone: Backbone, name: str, reads: str) -> int:
    """Returns the number of channels of a feature.

    Raises:
      ValueError: the backbone has no such feature. The message says what `reads` it.
    """
    if name not in backbone.features:
        raise ValueError(
            f"{reads} {name!r}, which {type(backbone).__name__} does not have"
            f"{did_you_mean(name, backbone.features)}. It has {', '.join(backbone.features)}"
        )
    return backbone.features[name].channels


def check_head(role: str, head: Head, backbone: Backbone) -> None:
    """Raises ValueError unless a backbone has the features that a head reads."""
    reads = f"{type(head).__name__}, the {role}, reads the feature"
    for name, channels in head.in_features.items():
        actual = channels_of(backbone, name, reads)
        if actual != channels:
            raise ValueError(
                f"{reads} {name!r} with {channels} channels, but {type(backbone).__name__} gives "
                f"{actual}: build the head for this backbone"
            )


def check_features(
    backbone: Backbone, features: Mapping[str, Array], images: Float[Array, "n h w c"]
) -> None:
    """Raises ValueError unless each feature map has the size and channels that it should have."""
    height, width = images.shape[1:3]
    if export.is_symbolic_dim(height) or export.is_symbolic_dim(width):
        return
    for name, (channels, stride) in backbone.features.items():
        expected = (images.shape[0], -(-height // stride), -(-width // stride), channels)
        actual = features[name].shape if name in features else "nothing"
        if actual != expected:
            raise ValueError(
                f"{type(backbone).__name__} declares the feature {name!r} with {channels} "
                f"channels at stride {stride}: for images {images.shape} it must be {expected}, "
                f"got {actual}. Pad each layer so that it gives ceil(size / stride) rows"
            )
