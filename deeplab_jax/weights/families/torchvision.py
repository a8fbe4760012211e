"""torchvision's DeepLabv3, its classifiers' backbones, and timm's ResNets.

A classifier's backbone has the names of a segmentation model's without "backbone.". timm gives its
ResNets torchvision's names, and has names for deep stems and pooled shortcuts beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbones.mobilenet import MobileNet, MobileNetV2, MobileNetV3
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import ConfigFields, Family, Shapes, Table, any_begins
from deeplab_jax.weights.families.reading import numbers, section
from deeplab_jax.weights.families.resnets import head_rows, resnet_rows

_MOBILENETS: dict[str, type[MobileNet]] = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": MobileNetV3,
}
# In torchvision's classifiers the backbone's names have this prefix (MobileNets) or none (ResNets).
_CLASSIFIER_BACKBONE = "features."
_CLASSIFIER_HEADS = ("fc.", "classifier.", "conv_head.", "head.")


def _modules(architecture: Architecture) -> Table:
    if architecture.backbone in _MOBILENETS:
        return (*_mobilenet_rows(architecture), *head_rows("classifier."))
    return (*resnet_rows(architecture, "backbone."), *head_rows("classifier."))


def _mobilenet_rows(architecture: Architecture) -> Table:
    network = _MOBILENETS[architecture.backbone]
    is_v2 = network is MobileNetV2
    layers = (("conv", 0), ("bn", 1))
    rows = [(rf"backbone\.stem\.{layer}", f"backbone.0.{i}") for layer, i in layers]
    specs = network.block_specs(architecture)
    for block, spec in enumerate(specs, start=1):
        # torchvision numbers the parts that a block has.
        parts = [
            *(["expand"] if spec.expanded_features != spec.in_features else []),
            *("depthwise", *(["squeeze_excite"] if spec.row.squeeze_excite else []), "project"),
        ]
        theirs = f"backbone.{block}.{'conv' if is_v2 else 'block'}"
        for index, part in enumerate(parts):
            ours = rf"backbone\.block{block}\.{part}\."
            if is_v2 and part == "project":  # not a module of its own, but the last two layers
                rows += [(ours + layer, f"{theirs}.{index + i}") for layer, i in layers]
            else:
                rows += [(ours + layer, f"{theirs}.{index}.{i}") for layer, i in layers]
                rows.append((ours + r"(fc\d)", rf"{theirs}.{index}.\1"))
    last = f"backbone.{len(specs) + 1}"
    return [*rows, *((rf"backbone\.last\.{layer}", f"{last}.{i}") for layer, i in layers)]


def _read_config(config: Mapping[str, Any], shapes: Shapes) -> ConfigFields:
    """Reads timm's config, whose variants of ResNets may have the same arrays."""
    published = str(config.get("architecture", "resnet50"))
    if not re.fullmatch(r"resnet\d+[cdst]?|mobilenet\w*", published):
        raise UserError(f"the file is a {published} of timm, which is not supported")
    pretrained = section(config, "pretrained_cfg")
    return ConfigFields({}, (), numbers(pretrained.get("mean")), numbers(pretrained.get("std")))


def _rename(names: Sequence[str]) -> list[str]:
    if any_begins(names, "backbone."):
        return list(names)
    return [
        name
        if name.startswith(_CLASSIFIER_HEADS)
        else "backbone." + name.removeprefix(_CLASSIFIER_BACKBONE)
        for name in names
    ]


TORCHVISION = Family(
    name="torchvision",
    title="torchvision",
    signature=(("classifier.0.convs.",), ("classifier.4.weight",)),
    modules=_modules,
    assumed=("output_stride", "atrous_rates", "align_corners"),
    backbone="backbone.",
    read_config=_read_config,
    dropped=(
        # Of torchvision's MobileNetV2, and of the classifiers of others.
        (r"backbone\.18\..*", "belongs to the classifier, and only the backbone is used"),
    ),
    rename=_rename,
    optional=("aux_head",),
    # torchvision's `SemanticSegmentation` transform, with which its weights are evaluated.
    resize="shorter side to 520, bilinear, half-pixel centres",
    size=(520, 520),
)

# Backbones only: timm's classifiers are read by `TORCHVISION`.
TIMM = Family(
    name="timm",
    title="timm",
    signature=(),
    modules=lambda architecture: resnet_rows(architecture, ""),
    assumed=(),
    backbone="",
)
