"""torchvision's DeepLabv3, its classifiers' backbones, and timm's ResNets.

A classifier's backbone has the names of a segmentation model's without "backbone.". timm gives its
ResNets torchvision's names, and has names for deep stems and pooled shortcuts beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbones.mobilenet import (
    MobileNet,
    MobileNetV2,
    MobileNetV3,
    divisible_channels,
)
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import Description, Family, Shapes, Table, any_match
from deeplab_jax.weights.families.resnets import (
    aspp_rows,
    channels,
    has_aux_head,
    num_branches,
    numbers,
    read_resnet,
    resnet_rows,
    section,
    side,
)

_MOBILENETS: dict[str, type[MobileNet]] = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": MobileNetV3,
}
LOGITS = "classifier.4.weight"
# In torchvision's classifiers the backbone's names have this prefix (MobileNets) or none (ResNets).
_CLASSIFIER_BACKBONE = "features."
_CLASSIFIER_HEADS = ("fc.", "classifier.", "conv_head.", "head.")


def head_rows(theirs: str = "classifier.") -> Table:
    """Returns the rows of the heads; `theirs` is the beginning of the names of the main one."""
    return (
        *aspp_rows(f"{theirs}0"),
        (r"classifier\.head_conv\.conv", f"{theirs}1"),
        (r"classifier\.head_conv\.bn", f"{theirs}2"),
        (r"classifier\.logits", f"{theirs}4"),
        (r"aux_classifier\.head_conv\.conv", "aux_classifier.0"),
        (r"aux_classifier\.head_conv\.bn", "aux_classifier.1"),
        (r"aux_classifier\.logits", "aux_classifier.4"),
    )


def _modules(architecture: Architecture) -> Table:
    if architecture.backbone in _MOBILENETS:
        return (*_mobilenet_rows(architecture), *head_rows())
    return (*resnet_rows(architecture, "backbone."), *head_rows())


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


def _describe(shapes: Shapes, config: Mapping[str, Any]) -> Description:
    fields = read_backbone(shapes)
    width = fields["width"]
    # Models of the paper, which this package writes with these names, have no 3x3 after ASPP.
    is_papers = TORCHVISION.matches(shapes) and "classifier.1.weight" not in shapes
    fields |= {
        "num_classes": side(shapes, LOGITS, 0, 21),
        "aux_head": has_aux_head(shapes, LOGITS, "aux_classifier.4.weight"),
        "head_channels": channels(shapes, "classifier.0.project.0.weight", width, 256),
    }
    pretrained = section(config, "pretrained_cfg")  # of timm
    mean, std = (numbers(pretrained.get(field)) for field in ("mean", "std"))
    published = str(config.get("architecture", "resnet50"))
    if not re.fullmatch(r"resnet\d+[cdst]?|mobilenet\w*", published):
        raise UserError(f"the file is a {published} of timm, which is not supported")
    num_rates = num_branches(shapes, r"classifier\.0\.convs\.(\d+)\.0\.")
    name = f"{'paper' if is_papers else 'torchvision'}_{fields['backbone']}"
    return Description(name, fields, (), mean, std, num_rates)


def read_backbone(shapes: Shapes) -> dict[str, Any]:
    """Returns the fields of `Architecture` that the shapes of a backbone tell."""
    if "backbone.0.0.weight" not in shapes:
        return read_resnet(shapes, "backbone.")
    is_v2 = any_match(r"backbone\.1\.conv\.", shapes)
    last, features = ("backbone.17.conv.2", 320) if is_v2 else ("backbone.16.0", 960)
    return {
        "backbone": "mobilenet_v2" if is_v2 else "mobilenet_v3_large",
        "width": width_of(side(shapes, f"{last}.weight", 0, features), features),
        "in_channels": side(shapes, "backbone.0.0.weight", 1, 3),
    }


def width_of(found: int, published: int) -> float:
    """Returns the width multiplier, in steps of 0.05, that gives a number of channels."""
    widths = [step / 20 for step in range(1, 61)]
    fits = [width for width in widths if divisible_channels(published * width) == found]
    return 1.0 if not fits or 1.0 in fits else min(fits, key=lambda w: abs(w - found / published))


def _rename(names: Sequence[str]) -> list[str]:
    if any(name.startswith("backbone.") for name in names):
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
    signature=(r"classifier\.0\.convs\.", r"classifier\.4\.weight"),
    modules=_modules,
    describe=_describe,
    assumed=("output_stride", "atrous_rates", "align_corners"),
    backbone=r"backbone\.",
    head_prefixes=("classifier.", "aux_classifier."),
    dropped=(
        # Of torchvision's MobileNetV2, and of the classifiers of others.
        (r"backbone\.18\..*", "belongs to the classifier, and only the backbone is used"),
    ),
    rename=_rename,
    # torchvision's `SemanticSegmentation` transform, with which its weights are evaluated.
    resize="shorter side to 520, bilinear, half-pixel centres",
    size=(520, 520),
)

# Backbones only: timm's classifiers are read by `TORCHVISION`.
TIMM = Family(
    name="timm",
    title="timm",
    signature=(r"(?!)",),
    modules=lambda architecture: resnet_rows(architecture, ""),
    describe=_describe,
    assumed=(),
    backbone="",
    head_prefixes=(),
)
