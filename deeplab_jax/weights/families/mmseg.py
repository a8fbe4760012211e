"""mmsegmentation's DeepLabv3: an `EncoderDecoder` of ResNet or ResNetV1c and `ASPPHead`.

Source: mmseg 1.4, `models/decode_heads/{aspp_head,fcn_head}.py`, `models/backbones/resnet.py`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import (
    ConfigFields,
    Family,
    Shapes,
    Table,
    any_begins,
    pool_first,
)
from deeplab_jax.weights.families.reading import list_of_rates, numbers, section
from deeplab_jax.weights.families.resnets import MMSEG_STEM, resnet_rows

_MAX_CONFIG = 1_000_000  # characters
_READ = ("model", "data_preprocessor", "img_norm_cfg")  # variables of a config
_BOTTLENECK = "backbone.layer1.0.conv3.weight"
_POOLED_SHORTCUT = "backbone.layer2.0.downsample.1.weight"  # a norm without the pool before it


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


def _read_config(config: Mapping[str, Any], shapes: Shapes) -> ConfigFields:
    if len(shapes.get(_POOLED_SHORTCUT, ())) == 4:
        raise UserError(
            "the file has a backbone ResNetV1d of mmsegmentation, which is not supported: where a "
            "stride is removed, its shortcuts do not average as timm's do"
        )
    meta = section(config, "meta")
    values = values_of_config(meta.get("cfg") or meta.get("config"))
    mean, std = _normalization(values)
    classes = meta.get("CLASSES") or section(meta, "dataset_meta").get("classes")
    names = tuple(classes) if isinstance(classes, list | tuple) else ()
    return ConfigFields(
        _settings(section(values, "model"), has_bottlenecks=_BOTTLENECK in shapes),
        names if all(isinstance(name, str) for name in names) else (),
        mean,
        std,
    )


def _settings(model: Mapping[str, Any], has_bottlenecks: bool) -> dict[str, Any]:
    """Returns the fields that a config's model says.

    Raises:
      UserError: It computes what no field expresses.
    """
    backbone, head = section(model, "backbone"), section(model, "decode_head")
    fields: dict[str, Any] = {}
    if backbone.get("style") == "caffe":
        fields["stride_place"] = "conv1"
    dilated = any(rate > 1 for rate in list_of_rates(backbone.get("dilations")) or ())
    contracts = backbone.get("contract_dilation", not dilated)  # mmsegmentation's default is False
    if contracts is False and not backbone.get("multi_grid"):
        if not has_bottlenecks:
            raise UserError("the config has contract_dilation=False, which is for ResNet-50 up")
        fields["dilation_rule"] = "paper"  # the first block has the whole rate too
    if strides := list_of_rates(backbone.get("strides")):
        fields["output_stride"] = 4 * math.prod(strides)
    if grid := list_of_rates(backbone.get("multi_grid")):
        fields["multi_grid"] = grid
    if rates := list_of_rates(head.get("dilations")):
        fields["atrous_rates"] = rates[1:]  # the first is the 1x1 convolution's
    if isinstance(head.get("align_corners"), bool):
        fields["align_corners"] = head["align_corners"]
    return fields


def _normalization(values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std, 0..1, of `data_preprocessor`, or of `img_norm_cfg` before 1.0."""
    given = section(values, "data_preprocessor") or section(values, "model", "data_preprocessor")
    given = given or section(values, "img_norm_cfg")
    if given.get("bgr_to_rgb", given.get("to_rgb", True)) is False:
        raise UserError("the config has bgr_to_rgb=False: models of BGR images are not supported")
    mean, std = (numbers(given.get(field)) for field in ("mean", "std"))
    return tuple(each / 255 for each in mean), tuple(each / 255 for each in std)


def values_of_config(text: Any) -> Mapping[str, Any]:
    """Returns the variables of a config's Python text without running it.

    Only literals and calls of `dict` are read. Everything else counts as None.
    """
    values: dict[str, Any] = {}
    if not isinstance(text, str) or len(text) > _MAX_CONFIG:
        return values
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign):
                continue
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id in _READ:
                values[target.id] = _literal(statement.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return values


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
    if any_begins(names, "backbone."):
        return list(names)
    return [name if name.startswith(("fc.", "head.")) else f"backbone.{name}" for name in names]


MMSEG = Family(
    name="mmseg",
    title="mmsegmentation",
    # DeepLabv3+ has a depthwise convolution instead of the first.
    signature=(("decode_head.aspp_modules.1.conv.",), ("decode_head.conv_seg.weight",)),
    modules=_modules,
    assumed=("output_stride", "multi_grid", "atrous_rates", "align_corners"),
    backbone="backbone.",
    read_config=_read_config,
    first_channels=pool_first,
    rename=_rename,
    optional=("aux_head", "stem"),
    resize="random scale 0.5..2.0 of the config's image scale, bilinear, half-pixel centres",
)
