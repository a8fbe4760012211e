"""segmentation_models.pytorch's DeepLabV3 and DeepLabV3Plus with ResNet encoders.

Source: segmentation_models_pytorch 0.6, `decoders/deeplabv3/{model,decoder}.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbones.resnet import RESNETS
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import ConfigFields, Family, Shapes, Table, any_begins
from deeplab_jax.weights.families.reading import list_of_rates
from deeplab_jax.weights.families.resnets import aspp_rows, resnet_rows

# Beginnings of names before `DeepLabV3Decoder` was a module with attributes.
_OLD_DECODER = {
    "decoder.0.": "decoder.aspp.",
    "decoder.1.": "decoder.conv.",
    "decoder.2.": "decoder.bn.",
}


def _modules(architecture: Architecture) -> Table:
    is_plus = architecture.decoder == "plus"
    aspp = "decoder.aspp.0" if is_plus else "decoder.aspp"
    rows = [*resnet_rows(architecture, "encoder."), (r"classifier\.logits", "segmentation_head.0")]
    if architecture.separable_aspp:  # the first branch is a 1x1 convolution
        branch = r"classifier\.aspp\.branches\.([1-9]\d*)"
        rows += _separable(branch, rf"{aspp}.convs.\1.0", rf"{aspp}.convs.\1.1")
    rows += aspp_rows(aspp)
    if not is_plus:
        return [
            *rows,
            (r"classifier\.head_conv\.conv", "decoder.conv"),
            (r"classifier\.head_conv\.bn", "decoder.bn"),
        ]
    return [
        *rows,
        *_separable(r"classifier\.head_conv", "decoder.aspp.1", "decoder.aspp.2"),
        (r"classifier\.decoder\.low_level\.conv", "decoder.block1.0"),
        (r"classifier\.decoder\.low_level\.bn", "decoder.block1.1"),
        *_separable(r"classifier\.decoder\.conv1", "decoder.block2.0", "decoder.block2.1"),
    ]


def _separable(ours: str, conv: str, bn: str) -> Table:
    return (
        (ours + r"\.depthwise", f"{conv}.0"),
        (ours + r"\.conv", f"{conv}.1"),
        (ours + r"\.bn", bn),
    )


def _read_config(config: Mapping[str, Any], shapes: Shapes) -> ConfigFields:
    """Reads the keyword arguments of the model, which a folder of the hub has."""
    encoder, depth = str(config.get("encoder_name", "resnet50")), config.get("encoder_depth", 5)
    if encoder not in RESNETS or depth != 5:
        raise UserError(
            f"the file's encoder is {encoder} of depth {depth}; known are {', '.join(RESNETS)} of "
            "depth 5"
        )
    fields: dict[str, Any] = {}
    if config.get("encoder_output_stride") in (8, 16):
        fields["output_stride"] = int(config["encoder_output_stride"])  # JSON's may be 8.0
    if rates := list_of_rates(config.get("decoder_atrous_rates")):
        fields["atrous_rates"] = rates
    return ConfigFields(fields)


def _rename(names: Sequence[str]) -> list[str]:
    if not any_begins(names, "decoder.0.convs."):
        return list(names)
    return [
        re.sub(r"decoder\.[012]\.", lambda m: _OLD_DECODER[m[0]], name, count=1) for name in names
    ]


SMP = Family(
    name="smp",
    title="segmentation_models.pytorch",
    signature=(
        ("segmentation_head.0.weight",),
        ("decoder.aspp.convs.", "decoder.aspp.0.convs.", "decoder.0.convs."),
    ),
    modules=_modules,
    assumed=("output_stride", "atrous_rates", "align_corners"),
    backbone="encoder.",
    read_config=_read_config,
    dropped=(
        (r"classification_head\..*", "classifies whole images, which a segmentation does not need"),
    ),
    rename=_rename,
    defaults={"atrous_rates": (12, 24, 36)},  # at each output stride
    optional=("separable_aspp",),
    resize="as the author of the weights did; images with sides that the output stride divides",
)
