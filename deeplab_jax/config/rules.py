"""What a config must be: types, ranges and combinations, told all together."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Any

from deeplab_jax.config import (
    IMAGE_LOSSES,
    PIXEL_LOSSES,
    PROTOCOLS,
    Config,
    DataConfig,
    output_strides,
)
from deeplab_jax.utils.errors import UserError, did_you_mean


def validate(config: Config) -> None:
    """Checks types, ranges and combinations that need no data and no devices.

    Raises:
      UserError: naming every field that is wrong and what it must be.
    """
    problems = list(_type_problems(config))
    if not problems:  # ranges of values of the wrong type mean nothing
        problems = [
            f"config.{field} {expected}, got {getattr_dotted(config, field)!r}"
            for field, expected, ok in _rules(config)
            if not ok
        ]
    if problems:
        raise UserError("\n".join(problems))


def getattr_dotted(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _type_problems(config: Any, prefix: str = "") -> typing.Iterator[str]:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(expected):
            if isinstance(value, typing.cast(type, expected)):
                yield from _type_problems(value, f"{prefix}{field.name}.")
            else:
                yield f"config.{prefix}{field.name} must be a {expected}, got {value!r}"
        elif not _has_type(value, expected):
            yield f"config.{prefix}{field.name} must be {_spell(expected)}, got {value!r}"


def _has_type(value: Any, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return any(_has_type(value, option) for option in typing.get_args(expected))
    if origin is tuple:
        element = typing.get_args(expected)[0]
        return isinstance(value, (tuple, list)) and all(_has_type(v, element) for v in value)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _spell(expected: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(option) for option in typing.get_args(expected))
    if origin is tuple:
        element = typing.get_args(expected)[0]
        words = {int: "whole numbers", float: "numbers", str: "names"}
        return words.get(element, "values") + " (a,b,...)"
    return "None" if expected is type(None) else words.get(expected, str(expected))


def _rules(config: Config) -> list[tuple[str, str, bool]]:
    """(field, what it must be, whether it is) for each range and combination."""
    model, data, optimizer = config.model, config.data, config.optimizer
    loss, train, evaluation = config.loss, config.train, config.eval
    blocks = model.cascade if model.cascade in (1, 2, 3) else 0
    strides = output_strides(blocks)
    spelled = f"must be {', '.join(map(str, strides[:-1]))} or {strides[-1]}"
    scales, radii = data.scale_range, data.shapes.radius_range
    return [
        (
            "model.output_stride",
            spelled + _nearest_stride(model.output_stride, strides),
            model.output_stride in (None, *strides),
        ),
        (
            "eval.output_stride",
            spelled + _nearest_stride(evaluation.output_stride, strides),
            evaluation.output_stride in (None, *strides),
        ),
        ("model.cascade", "must be None or 0 to 3", model.cascade in (None, 0, 1, 2, 3)),
        (
            "model.atrous_rates",
            f"must be None with model.cascade = {model.cascade}, which has no ASPP",
            model.atrous_rates is None or model.cascade is None,
        ),
        ("model.multi_grid", "must be rates of 1 or more", _all_from(1, model.multi_grid)),
        ("model.atrous_rates", "must be rates of 1 or more", _all_from(1, model.atrous_rates)),
        (
            "model.num_classes",
            "must be 1 to 255",
            model.num_classes is None or 1 <= model.num_classes <= 255,
        ),
        ("model.dtype", "must be float32 or bfloat16", model.dtype in ("float32", "bfloat16")),
        (
            "data.crop_size",
            "must be one side or height,width, each 1 pixel or more",
            len(data.crop_size) in (1, 2) and _all_from(1, data.crop_size),
        ),
        (
            "data.scale_range",
            "must be two scales above 0, the smaller first",
            len(scales) == 2 and 0 < scales[0] <= scales[1],
        ),
        ("data.duplicates", "must be 1 or more", data.duplicates >= 1),
        ("data.ignore_label", "must be an id, 0 to 255", 0 <= data.ignore_label <= 255),
        (
            "data.std",
            "must hold as many numbers above 0 as data.mean",
            len(data.std) == len(data.mean) and all(value > 0 for value in data.std),
        ),
        ("data.num_workers", "must be 0 or more", data.num_workers >= 0),
        *_folder_rules(data),
        ("data.shapes.size", "must be 16 or more", data.shapes.size >= 16),
        ("data.shapes.num_train", "must be 1 or more", data.shapes.num_train >= 1),
        ("data.shapes.num_eval", "must be 1 or more", data.shapes.num_eval >= 1),
        (
            "data.shapes.radius_range",
            "must be two shares of the side, above 0 and below 1, the smaller first",
            len(radii) == 2 and 0 < radii[0] <= radii[1] < 1,
        ),
        ("data.shapes.max_shapes", "must be 1 or more", data.shapes.max_shapes >= 1),
        ("optimizer.learning_rate", "must be above 0", optimizer.learning_rate > 0),
        ("optimizer.power", "must be 0 or more", optimizer.power >= 0),
        ("optimizer.momentum", "must be in [0, 1)", 0 <= optimizer.momentum < 1),
        ("optimizer.weight_decay", "must be 0 or more", optimizer.weight_decay >= 0),
        (
            "optimizer.warmup_steps",
            f"must be 0 or more and below train.steps = {train.steps}",
            0 <= optimizer.warmup_steps < max(train.steps, 1),
        ),
        ("optimizer.head_multiplier", "must be above 0", optimizer.head_multiplier > 0),
        ("optimizer.clip_norm", "must be 0 or more", optimizer.clip_norm >= 0),
        ("optimizer.ema_decay", "must be in [0, 1)", 0 <= optimizer.ema_decay < 1),
        (
            "optimizer.accumulate",
            f"must divide train.batch_size = {train.batch_size}",
            optimizer.accumulate >= 1 and train.batch_size % optimizer.accumulate == 0,
        ),
        (
            "loss.name",
            f"must be {', '.join(PIXEL_LOSSES)} or {', '.join(IMAGE_LOSSES)}"
            f"{did_you_mean(loss.name, [*PIXEL_LOSSES, *IMAGE_LOSSES])}",
            loss.name in PIXEL_LOSSES or loss.name in IMAGE_LOSSES,
        ),
        ("loss.focal_gamma", "must be 0 or more", loss.focal_gamma >= 0),
        (
            "loss.class_weights",
            "must be None, auto, or numbers of 0 or more (a,b,...), not all 0",
            loss.class_weights in (None, "auto") or _are_weights(loss.class_weights),
        ),
        (
            "loss.class_weights",
            f"must be None with loss.name = {loss.name}, which weighs classes alike",
            loss.class_weights is None or loss.name not in IMAGE_LOSSES,
        ),
        (
            "loss.hard_pixel_fraction",
            f"must be 1 with loss.name = {loss.name}, a loss of images",
            loss.hard_pixel_fraction == 1 or loss.name not in IMAGE_LOSSES,
        ),
        (
            "loss.hard_pixel_fraction",
            "must be above 0 and at most 1",
            0 < loss.hard_pixel_fraction <= 1,
        ),
        ("loss.aux_weight", "must be 0 or more", loss.aux_weight >= 0),
        (
            "loss.upsample",
            f"must be true with model.decoder = {model.decoder}, which upsamples by itself",
            loss.upsample or model.decoder in (None, "bilinear"),
        ),
        ("train.steps", "must be 1 or more", train.steps >= 1),
        ("train.batch_size", "must be 1 or more", train.batch_size >= 1),
        ("train.log_every", "must be 1 or more", train.log_every >= 1),
        ("train.eval_every", "must be 0 or more", train.eval_every >= 0),
        ("train.save_every", "must be 0 or more", train.save_every >= 0),
        ("train.keep", "must be 1 or more", train.keep >= 1),
        ("eval.batch_size", "must be 1 or more", evaluation.batch_size >= 1),
        ("eval.size", "must be 1 or more", evaluation.size >= 1),
        ("eval.num_pictures", "must be 0 or more", evaluation.num_pictures >= 0),
        (
            "eval.protocol",
            f"must be {', '.join(PROTOCOLS)}{did_you_mean(evaluation.protocol, PROTOCOLS)}",
            evaluation.protocol in PROTOCOLS,
        ),
        (
            "eval.scales",
            "must be one or more numbers above 0",
            len(evaluation.scales) > 0 and all(0 < s < math.inf for s in evaluation.scales),
        ),
        (
            "eval.window",
            "must be 0 (whole images) or a side of 32 pixels or more",
            evaluation.window == 0 or evaluation.window >= 32,
        ),
        (
            "eval.window",
            "must be 0 under eval.protocol = paper, which pads whole images; choose native",
            evaluation.window <= 0 or evaluation.protocol != "paper",
        ),
        ("eval.overlap", "must be in [0, 1)", 0 <= evaluation.overlap < 1),
        ("mesh.data", "must be -1 or 1 or more", config.mesh.data == -1 or config.mesh.data >= 1),
        ("mesh.space", "must be 1 or more", config.mesh.space >= 1),
        ("second_stage.steps", "must be 0 or more", config.second_stage.steps >= 0),
        ("second_stage.learning_rate", "must be above 0", config.second_stage.learning_rate > 0),
        (
            "second_stage.output_stride",
            spelled + _nearest_stride(config.second_stage.output_stride, strides),
            config.second_stage.output_stride in (None, *strides),
        ),
    ]


def _folder_rules(data: DataConfig) -> list[tuple[str, str, bool]]:
    folder = data.folder
    values = ",".join(["0.5"] * folder.channels)
    return [
        (
            "data.folder.masks_hold",
            "must be ids, colors or binary",
            folder.masks_hold in ("ids", "colors", "binary"),
        ),
        (
            "data.folder.mask_name",
            "must hold {name} once, and no suffix, as in {name}_mask",
            folder.mask_name.count("{name}") == 1
            and not re.search(r"\.(png|jpe?g|tiff?|bmp|gif|npy)$", folder.mask_name, re.I),
        ),
        (
            "data.folder.val_fraction",
            "must be in [0, 1]",
            0 <= folder.val_fraction <= 1,
        ),
        ("data.folder.channels", "must be 1 or more", folder.channels >= 1),
        (
            "data.mean",
            f"must hold one number a channel, as data.folder.channels = {folder.channels}; so "
            f"must data.std. Where you know no better: --config.data.mean={values} "
            f"--config.data.std={values}",
            data.name != "folder" or len(data.mean) == folder.channels,
        ),
    ]


def _all_from(least: float, values: tuple[float, ...] | None) -> bool:
    return values is None or (len(values) > 0 and all(value >= least for value in values))


def _are_weights(values: object) -> bool:
    if not _has_type(values, tuple[float, ...]):
        return False
    weights = typing.cast(tuple[float, ...], values)
    return _all_from(0, weights) and any(weights) and all(map(math.isfinite, weights))


def _nearest_stride(stride: int | None, strides: tuple[int, ...]) -> str:
    if stride is None or stride in strides:
        return ""
    return f" (nearest: {min(strides, key=lambda s: abs(s - stride))})"
