"""mmsegmentation's DeepLabv3: an `EncoderDecoder` of ResNet or ResNetV1c and `ASPPHead`.

Source: mmseg 1.4, `models/decode_heads/{aspp_head,fcn_head}.py`, `models/backbones/resnet.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import Description, Family, Shapes, Table, pool_first
from deeplab_jax.weights.families.resnets import (
    MMSEG_STEM,
    channels,
    list_of_rates,
    num_classes,
    read_resnet,
    resnet_rows,
    section,
)

_MAX_CONFIG = 1_000_000  # characters


def _modules(architecture: Architecture) -> Table:
    return (
        *resnet_rows(architecture, "backbone.", MMSEG_STEM),
        (r"classifier\.aspp\.branches\.(\d+\.(?:conv|bn))", r"decode_head.aspp_modules.\1"),
        (r"classifier\.aspp\.branches\.\d+\.project\.(conv|bn)", r"decode_head.image_pool.1.\1"),
        (r"classifier\.aspp\.project\.(conv|bn)", r"decode_head.bottleneck.\1"),
        (r"classifier\.logits", "decode_head.conv_seg"),
        (r"aux_classifier\.head_conv\.(conv|bn)", r"auxiliary_head.convs.0.\1"),
        (r"aux_classifier\.logits", "auxiliary_head.conv_seg"),
    )


def _describe(shapes: Shapes, config: Mapping[str, Any]) -> Description:
    fields = read_resnet(shapes, "backbone.", deep_stem="stem.0")
    if fields["shortcut"] == "avg_pool":
        raise UserError(
            "the file has a backbone ResNetV1d of mmsegmentation, which is not supported: where a "
            "stride is removed, its shortcuts do not average as timm's do"
        )
    fields |= {
        "num_classes": num_classes(shapes, "decode_head.conv_seg.weight"),
        "aux_head": any(name.startswith("auxiliary_head.") for name in shapes),
        "head_channels": channels(
            shapes, "decode_head.bottleneck.conv.weight", fields["width"], 512
        ),
    }
    meta = section(config, "meta")
    model = model_of_config(meta.get("cfg") or meta.get("config"))
    fields |= _settings(model)
    classes = meta.get("CLASSES") or section(meta, "dataset_meta").get("classes")
    names = tuple(classes) if isinstance(classes, list | tuple) else ()
    if not all(isinstance(name, str) for name in names):
        names = ()
    return Description(f"mmseg_{fields['backbone']}", fields, names)


def _settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that a config's model says."""
    backbone, head = section(model, "backbone"), section(model, "decode_head")
    fields: dict[str, Any] = {}
    if strides := list_of_rates(backbone.get("strides")):
        fields["output_stride"] = 4
        for stride in strides:
            fields["output_stride"] *= stride
    if grid := list_of_rates(backbone.get("multi_grid")):
        fields["multi_grid"] = grid
    if rates := list_of_rates(head.get("dilations")):
        fields["atrous_rates"] = rates[1:]  # the first is the 1x1 convolution's
    if isinstance(head.get("align_corners"), bool):
        fields["align_corners"] = head["align_corners"]
    return fields


def model_of_config(text: Any) -> Mapping[str, Any]:
    """Returns `model` of a config's Python text without running it; empty if it has none.

    Only literals and calls of `dict` are read. Everything else counts as None.
    """
    if not isinstance(text, str) or len(text) > _MAX_CONFIG:
        return {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign):
                continue
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id == "model":
                found = _literal(statement.value)
                return found if isinstance(found, dict) else {}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return {}


def _literal(node: ast.AST) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {each.arg: _literal(each.value) for each in node.keywords}
    if isinstance(node, ast.Dict):
        return {
            key.value: _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        }
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(each) for each in node.elts]
    return node.value if isinstance(node, ast.Constant) else None


def _rename(names: Sequence[str]) -> list[str]:
    """Adds "backbone." to the names of a pretrained backbone's file."""
    if any(name.startswith("backbone.") for name in names):
        return list(names)
    return [name if name.startswith(("fc.", "head.")) else f"backbone.{name}" for name in names]


MMSEG = Family(
    name="mmseg",
    title="mmsegmentation",
    signature=(r"decode_head\.aspp_modules\.0\.conv\.", r"decode_head\.conv_seg\.weight"),
    modules=_modules,
    describe=_describe,
    assumed=("output_stride", "multi_grid", "atrous_rates", "align_corners"),
    backbone=r"backbone\.",
    head_prefixes=("decode_head.", "auxiliary_head."),
    first_channels=pool_first,
    rename=_rename,
    resize="random scale 0.5..2.0 of the config's image scale, bilinear, half-pixel centres",
)
