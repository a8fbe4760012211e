"""VainF's DeepLabV3Plus-Pytorch: DeepLabv3 and v3+ with torchvision's ResNets.

Source: github.com/VainF/DeepLabV3Plus-Pytorch, `network/_deeplab.py`, `network/modeling.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.weights.families.family import Description, Family, Shapes, Table
from deeplab_jax.weights.families.resnets import (
    aspp_rows,
    channels,
    num_branches,
    read_resnet,
    resnet_rows,
    side,
)
from deeplab_jax.weights.families.torchvision import head_rows


def _modules(architecture: Architecture) -> Table:
    resnet = resnet_rows(architecture, "backbone.")
    if architecture.decoder != "plus":
        return (*resnet, *head_rows("classifier.classifier."))
    return (
        *resnet,
        *aspp_rows("classifier.aspp"),
        (r"classifier\.decoder\.low_level\.conv", "classifier.project.0"),
        (r"classifier\.decoder\.low_level\.bn", "classifier.project.1"),
        (r"classifier\.decoder\.conv1\.conv", "classifier.classifier.0"),
        (r"classifier\.decoder\.conv1\.bn", "classifier.classifier.1"),
        (r"classifier\.logits", "classifier.classifier.3"),
    )


def _low_level_first(name: str, shape: tuple[int, ...], architecture: Architecture) -> int:
    """The decoder concatenates the low-level features before the upsampled ones."""
    if name != "classifier.decoder.conv1.conv.kernel":
        return 0
    return shape[2] - shape[3]  # the upsampled features have as many channels as the output


def _describe(shapes: Shapes, config: Mapping[str, Any]) -> Description:
    is_plus = any(name.startswith("classifier.project.") for name in shapes)
    fields = read_resnet(shapes, "backbone.")
    aspp = "classifier.aspp." if is_plus else "classifier.classifier.0."
    logits = f"classifier.classifier.{3 if is_plus else 4}.weight"
    fields |= {
        "num_classes": side(shapes, logits, 0, 21),
        "head_channels": channels(shapes, f"{aspp}project.0.weight", fields["width"], 256),
    }
    num_rates = num_branches(shapes, rf"{re.escape(aspp)}convs\.(\d+)\.0\.")
    name = f"{'vainfplus' if is_plus else 'vainf'}_{fields['backbone']}"
    return Description(name, fields, num_rates=num_rates)


VAINF = Family(
    name="vainf",
    title="VainF's DeepLabV3Plus-Pytorch",
    signature=(
        r"classifier\.(?:classifier\.0|aspp)\.convs\.",
        r"classifier\.classifier\.[34]\.weight",
    ),
    modules=_modules,
    describe=_describe,
    assumed=("output_stride", "atrous_rates"),
    backbone=r"backbone\.",
    head_prefixes=("classifier.",),
    first_channels=_low_level_first,
    resize="random scale 0.5..2.0 and crops of 513, bilinear, half-pixel centres",
    size=(513, 513),
)
