"""What `DeepLabV3` expects of a backbone and of a head, and checks that parts fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jax import export
from jaxtyping import Array, Float

from deeplab_jax.utils.errors import did_you_mean


class Feature(NamedTuple):
    """A feature map that a backbone returns.

    Attributes:
      channels: number of channels.
      stride: pixels of the image a pixel of the map, a power of 2 up to 256. For images of any
        height the map has `ceil(height / stride)` rows, and so for the width.
    """

    channels: int
    stride: int


@runtime_checkable
class Backbone(Protocol):
    """What `DeepLabV3` expects of a backbone, an `nnx.Module`.

    Attributes:
      features: the feature maps by name.
      out_feature: name of those that the head reads.
      aux_feature: name of those that the auxiliary head reads; "" if there are none.
      low_level_feature: name of those of stride 4 for DeepLabv3+'s decoder; "" if there are none.

    Optional attributes: `in_channels` (of the images, checked in each call) and `remat` (whether to
    recompute blocks in the backward pass; set by training as the config's `train.remat` says).
    """

    @property
    def features(self) -> Mapping[str, Feature]: ...

    out_feature: str
    aux_feature: str
    low_level_feature: str

    def __call__(self, images: Float[Array, "n h w c"]) -> dict[str, Array]: ...


@runtime_checkable
class Head(Protocol):
    """What `DeepLabV3` expects of a head, an `nnx.Module`.

    Its last layer should be called `logits`: on fine-tuning with another number of classes, what
    stands under that name starts with new parameters.

    Attributes:
      in_features: number of channels of each of the backbone's features that it reads.
    """

    @property
    def in_features(self) -> Mapping[str, int]: ...

    def __call__(
        self, features: dict[str, Array], *, rngs: jax.Array | None = None
    ) -> Float[Array, "n h w classes"]: ...


def channels_for(backbone: Backbone, role: str, reader: str) -> int:
    """Returns the number of channels of the features that a backbone has for a role.

    Args:
      backbone: to look at.
      role: its attribute that names the features, such as "aux_feature".
      reader: what needs them, for the error.

    Raises:
      ValueError: it has none.
    """
    name = getattr(backbone, role, "")
    if name not in backbone.features:
        raise ValueError(
            f"{reader} needs features that {type(backbone).__name__} does not have: its `{role}` "
            f"is {name!r}, its features are {', '.join(backbone.features)}"
        )
    return backbone.features[name].channels


def check_head(role: str, head: Head, backbone: Backbone) -> None:
    """Raises ValueError unless a backbone has the features that a head reads."""
    kinds = f"{type(head).__name__}, the {role}, reads the feature"
    for name, channels in head.in_features.items():
        if name not in backbone.features:
            raise ValueError(
                f"{kinds} {name!r}, which {type(backbone).__name__} does not have"
                f"{did_you_mean(name, backbone.features)}. It has {', '.join(backbone.features)}"
            )
        given = backbone.features[name].channels
        if given != channels:
            raise ValueError(
                f"{kinds} {name!r} with {channels} channels, but {type(backbone).__name__} gives "
                f"{given}: build the head for this backbone"
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
        found = features[name].shape if name in features else "nothing"
        if found != expected:
            raise ValueError(
                f"{type(backbone).__name__} declares the feature {name!r} with {channels} "
                f"channels at stride {stride}: for images {images.shape} it must be {expected}, "
                f"got {found}. Pad each layer so that it gives ceil(size / stride) rows"
            )
