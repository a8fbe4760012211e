"""Validation of a config: types, ranges and combinations, with all problems in one error."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from deeplab_jax.config import optimizers
from deeplab_jax.config.schema import (
    IMAGE_LOSSES,
    LOGGERS,
    MIXES,
    PIXEL_LOSSES,
    PROTOCOLS,
    SCHEDULES,
    Config,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    flatten,
    output_strides,
    resolve_eval,
)
from deeplab_jax.utils.errors import UserError, did_you_mean

# The name of a field, what its value must be, and whether it is that.
Rule = tuple[str, str, bool]
# What a value must be, and a function that tells whether it is.
Range = tuple[str, Callable[[Any], bool]]

_FROM_0: Range = ("0 or more", lambda value: value >= 0)
_FROM_1: Range = ("1 or more", lambda value: value >= 1)
_ABOVE_0: Range = ("above 0", lambda value: 0 < value < math.inf)
_0_TO_1: Range = ("in [0, 1]", lambda value: 0 <= value <= 1)
_TO_1: Range = ("above 0 and at most 1", lambda value: 0 < value <= 1)
_0_TO_BELOW_1: Range = ("in [0, 1)", lambda value: 0 <= value < 1)


def _ascend(values: tuple[float, ...]) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1]


def _are_weights(values: Any) -> bool:
    return values == "auto" or (
        _has_type(values, tuple[float, ...])
        and any(values)
        and all(0 <= value < math.inf for value in values)
    )


def _is_mask_name(text: str) -> bool:
    has_suffix = re.search(r"\.(png|jpe?g|tiff?|bmp|gif|npy)$", text, re.I)
    return text.count("{name}") == 1 and not has_suffix


def _is_pattern(text: str) -> bool:
    named = re.search(r"\{(name|number)\}.*\.(\w+|\*)$", text)
    other = re.search(r"^/|\*(?!$)|\{(?!(name|number|split|folder)\})", text)
    return not text or (named is not None and other is None)


# What single fields must be. None is always in range.
_RANGES: dict[str, Range] = {
    "model.num_classes": ("at most 255", lambda number: number <= 255),
    "data.crop_size": (
        "one side or height,width, each 1 pixel or more",
        lambda sides: len(sides) in (1, 2) and min(sides) >= 1,
    ),
    "data.scale_range": ("two scales above 0, the smaller first", _ascend),
    "data.ignore_label": ("an id, 0 to 255", lambda label: 0 <= label <= 255),
    "data.mean": ("finite numbers", lambda values: all(map(math.isfinite, values))),
    "data.augment.photometric": _0_TO_1,
    "data.augment.color_jitter": _0_TO_1,
    "data.augment.gray": _0_TO_1,
    "data.augment.blur": _0_TO_1,
    "data.augment.rotation": ("degrees, 0 to 180", lambda angle: 0 <= angle <= 180),
    "data.augment.max_class_share": _TO_1,
    "data.augment.mix_probability": _0_TO_1,
    "data.duplicates": _FROM_1,
    "data.num_workers": _FROM_0,
    "data.folder.threshold": ("1 to 65535", lambda value: 1 <= value <= 65535),
    "data.folder.mask_name": (
        "a text that holds {name} once and no suffix, such as {name}_mask",
        _is_mask_name,
    ),
    **{
        f"data.folder.{kind}_pattern": (
            "empty, or a path below data.root with {name} and a suffix (.* is any), such as "
            f"{{split}}/{kind}s/{{name}}.png",
            _is_pattern,
        )
        for kind in ("image", "mask")
    },
    "data.folder.val_fraction": _0_TO_1,
    "data.folder.channels": _FROM_1,
    "data.shapes.size": ("16 or more", lambda size: size >= 16),
    "data.shapes.num_train": _FROM_1,
    "data.shapes.num_eval": _FROM_1,
    "data.shapes.max_shapes": _FROM_1,
    "data.shapes.radius_range": (
        "two fractions of the side, above 0 and below 1, the smaller first",
        lambda radii: _ascend(radii) and radii[1] < 1,
    ),
    "optimizer.learning_rate": _ABOVE_0,
    "optimizer.power": _FROM_0,
    "optimizer.momentum": _0_TO_BELOW_1,
    "optimizer.weight_decay": _FROM_0,
    "optimizer.head_multiplier": _ABOVE_0,
    "optimizer.layer_decay": _TO_1,
    "optimizer.clip_norm": _FROM_0,
    "optimizer.ema_decay": _0_TO_BELOW_1,
    "loss.focal_gamma": _FROM_0,
    "loss.label_smoothing": _0_TO_BELOW_1,
    "loss.class_weights": (
        "None, auto, or numbers of 0 or more (a,b,...), not all 0",
        _are_weights,
    ),
    "loss.hard_pixel_fraction": _TO_1,
    "loss.aux_weight": _FROM_0,
    "train.steps": _FROM_1,
    "train.batch_size": _FROM_1,
    "train.log_every": _FROM_1,
    "train.eval_every": _FROM_0,
    "train.save_every": _FROM_0,
    "train.keep": _FROM_1,
    "train.receipt_every": _FROM_0,
    "eval.batch_size": _FROM_1,
    "eval.size": _FROM_1,
    "eval.num_pictures": _FROM_0,
    "eval.scales": (
        "one or more numbers above 0",
        lambda scales: len(scales) > 0 and all(0 < scale < math.inf for scale in scales),
    ),
    "eval.window": (
        "0 (whole images) or a side of 32 pixels or more",
        lambda side: side == 0 or side >= 32,
    ),
    "eval.overlap": _0_TO_BELOW_1,
    "mesh.data": ("-1 or 1 or more", lambda devices: devices == -1 or devices >= 1),
    "mesh.space": _FROM_1,
    "second_stage.steps": _FROM_0,
    "second_stage.learning_rate": _ABOVE_0,
}

# Of `ModelConfig` and `models.Architecture`.
_MODEL_RANGES: dict[str, Range] = {
    "num_classes": _FROM_1,
    "in_channels": _FROM_1,
    "head_channels": _FROM_1,
    "decoder_convs": _FROM_1,
    "width": _ABOVE_0,
    "dropout": _0_TO_BELOW_1,
    "bn_momentum": _0_TO_1,
    "bn_epsilon": _ABOVE_0,
    "backbone_bn_momentum": _0_TO_1,
    "backbone_bn_epsilon": _ABOVE_0,
}
_MODEL_CHOICES: dict[str, tuple[Any, ...]] = {
    "cascade": (None, 0, 1, 2, 3),
    "dilation_rule": ("paper", "torchvision", "mmseg"),
    "residual": ("post", "pre"),
    "stem": ("conv7x7", "deep", "deep128"),
    "shortcut": ("conv1x1", "avg_pool"),
    "stride_place": ("conv2", "conv1"),
    "padding": ("symmetric", "same"),
    "projection_kernel": (1, 3),
    "decoder": ("bilinear", "transposed", "plus"),
}
# Of names. Those of registries grow.
_CHOICES: dict[str, Sequence[Iterable[str]]] = {
    "model.dtype": [("float32", "bfloat16")],
    "data.augment.mix": [("", *MIXES)],
    "data.folder.masks_hold": [("auto", "ids", "colors", "binary")],
    "optimizer.schedule": [SCHEDULES],
    "loss.name": [PIXEL_LOSSES, IMAGE_LOSSES],
    "eval.protocol": [PROTOCOLS],
}


def validate(config: Config) -> None:
    """Checks the types, ranges and combinations that depend neither on data nor on devices.

    Raises:
      UserError: one line for each wrong field, with what it must be and what it is.
    """
    problems = list(type_problems(config))
    if not problems:  # values of a wrong type cannot be compared
        values = flatten(config)
        problems = [
            f"config.{field} must be {expected}, got {values[field]!r}"
            for field, expected, holds in _rules(config)
            if not holds
        ]
    if problems:
        raise UserError("\n".join(problems))


_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "None",
    tuple[int, ...]: "whole numbers (a,b,...)",
    tuple[float, ...]: "numbers (a,b,...)",
    tuple[str, ...]: "names (a,b,...)",
    dict[str, Any]: "arguments (name=value,...)",
}


def type_problems(config: Any, prefix: str = "config.") -> Iterator[str]:
    """Yields a line for each field of a dataclass, also a nested one, that has another type."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value, hint = prefix + field.name, getattr(config, field.name), hints[field.name]
        if not _has_type(value, hint):
            names = [_TYPE_NAMES.get(kind, f"a {kind.__name__}") for kind in union_types(hint)]
            yield f"{name} must be {' or '.join(names)}, got {value!r}"
        elif dataclasses.is_dataclass(hint):
            yield from type_problems(value, f"{name}.")


def union_types(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union such as `int | None`, or the one type of another hint."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _has_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, kind) for kind in union_types(hint))
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return isinstance(value, (tuple, list)) and all(_has_type(v, element) for v in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else typing.get_origin(hint) or hint)


def model_rules(model: Any) -> Iterator[Rule]:
    """Yields the rules that a `ModelConfig` and an `Architecture` of `models` share.

    A field that is absent or None satisfies its rules.
    """
    for field, choices in _MODEL_CHOICES.items():
        value = getattr(model, field)
        yield field, spell_choices(choices), value is None or value in choices
    for field, (expected, in_range) in _MODEL_RANGES.items():
        value = getattr(model, field, None)
        yield field, expected, value is None or in_range(value)
    yield _output_stride_rule("output_stride", model.output_stride, model.cascade)
    multi_grid, rates = model.multi_grid, model.atrous_rates
    yield "multi_grid", "whole rates of 1 or more", multi_grid is None or are_rates(multi_grid)
    yield "atrous_rates", "whole rates of 1 or more", not rates or are_rates(rates)
    yield (
        "atrous_rates",
        f"left out with cascade = {model.cascade}, which has no ASPP",
        model.cascade is None or not rates,
    )
    yield (
        "align_corners",
        "False with the decoder transposed, whose kernels assume that corners are not aligned",
        not model.align_corners or model.decoder != "transposed",
    )


def are_rates(values: tuple[Any, ...]) -> bool:
    """Returns whether the values are one or more atrous rates."""
    return bool(values) and all(isinstance(value, int) and value >= 1 for value in values)


def spell_choices(choices: Iterable[Any]) -> str:
    """Returns the choices as words: "8, 16 or 32"."""
    *others, last = (str(choice) or "empty" for choice in choices)
    return f"{', '.join(others)} or {last}"


def _choice_rule(field: str, value: str, names: Iterable[str]) -> Rule:
    names = list(names)
    return field, spell_choices(names) + did_you_mean(value, names), value in names


def _output_stride_rule(field: str, stride: int | None, cascade: int | None) -> Rule:
    strides = output_strides(cascade if cascade in _MODEL_CHOICES["cascade"] else None)
    if stride is None or stride in strides:
        return field, "", True
    nearest = min(strides, key=lambda known: abs(known - stride))
    return field, f"{spell_choices(strides)} (nearest: {nearest})", False


def _rules(config: Config) -> Iterator[Rule]:
    values = flatten(config)
    for field, (expected, in_range) in _RANGES.items():
        yield field, expected, values[field] is None or in_range(values[field])
    for field, groups in _CHOICES.items():
        yield _choice_rule(field, values[field], [name for group in groups for name in group])
    for name in config.train.loggers:
        yield _choice_rule("train.loggers", name, LOGGERS)
    for field, expected, holds in model_rules(config.model):
        yield f"model.{field}", expected, holds
    for field in ("eval.output_stride", "second_stage.output_stride"):
        yield _output_stride_rule(field, values[field], config.model.cascade)
    yield from _data_rules(config.data)
    yield from _loss_rules(config.loss, config.model.decoder)
    yield from _optimizer_rules(config.optimizer, config.train)
    evaluation = resolve_eval(config)
    yield (
        "eval.window",
        "0 under eval.protocol = paper, which pads whole images; choose native",
        (evaluation.window or 0) <= 0 or evaluation.protocol != "paper",
    )


def _data_rules(data: DataConfig) -> Iterator[Rule]:
    folder, num_channels = data.folder, len(data.mean)
    yield (
        "data.std",
        "as many finite numbers above 0 as data.mean",
        len(data.std) == num_channels and all(0 < value < math.inf for value in data.std),
    )
    neutral = ",".join(["0.5"] * folder.channels)
    yield (
        "data.mean",
        f"one number per channel, as data.folder.channels = {folder.channels}, and so must "
        "data.std. Without statistics of your images, set "
        f"--config.data.mean={neutral} --config.data.std={neutral}",
        data.name != "folder" or num_channels == folder.channels,
    )
    for field in ("photometric", "color_jitter", "gray"):
        yield (
            f"data.augment.{field}",
            f"0 for images of {num_channels} channels (data.mean): it changes colours, and only "
            "images of 1 channel (grey) or 3 (RGB) have them",
            getattr(data.augment, field) == 0 or num_channels in (1, 3),
        )
    yield (
        "data.folder.threshold",
        "None unless data.folder.masks_hold is auto or binary: only grey values have one",
        folder.threshold is None or folder.masks_hold in ("auto", "binary"),
    )
    image, mask = folder.image_pattern, folder.mask_pattern
    yield (
        "data.folder.mask_pattern",
        "set with data.folder.image_pattern, and another one",
        bool(image) == bool(mask) and (not mask or image != mask),
    )
    yield (
        "data.folder.mask_name",
        "{name}, because data.folder.mask_pattern says how masks are named",
        not mask or folder.mask_name == "{name}",
    )


def _optimizer_rules(optimizer: OptimizerConfig, train: TrainConfig) -> Iterator[Rule]:
    name, parts = optimizer.name, optimizer.accumulate
    for field, expected in optimizers.problems(optimizer):
        yield f"optimizer.{field}", expected, False
    yield (
        "optimizer.momentum",
        f"left out with optimizer.name = {name}: set what it has in optimizer.arguments",
        name == "sgd" or optimizer.momentum == OptimizerConfig.momentum,
    )
    yield (
        "optimizer.decoupled_weight_decay",
        f"false with optimizer.name = {name}: it is for sgd; adamw, lion and lamb always decouple",
        name == "sgd" or not optimizer.decoupled_weight_decay,
    )
    yield (
        "optimizer.warmup_steps",
        f"0 or more and below train.steps = {train.steps}",
        0 <= optimizer.warmup_steps < max(train.steps, 1),
    )
    yield (
        "optimizer.accumulate",
        f"1 or more, and must divide train.batch_size = {train.batch_size}",
        parts >= 1 and train.batch_size % parts == 0,
    )


def _loss_rules(loss: LossConfig, decoder: str | None) -> Iterator[Rule]:
    is_of_images = loss.name in IMAGE_LOSSES
    yield (
        "loss.class_weights",
        f"None with loss.name = {loss.name}, which weighs classes alike",
        loss.class_weights is None or not is_of_images,
    )
    yield (
        "loss.label_smoothing",
        f"0 with loss.name = {loss.name}: it is defined for cross_entropy",
        loss.label_smoothing == 0 or loss.name == "cross_entropy",
    )
    yield (
        "loss.hard_pixel_fraction",
        f"1 with loss.name = {loss.name}, which is a mean over images, not pixels",
        loss.hard_pixel_fraction == 1 or not is_of_images,
    )
    yield (
        "loss.upsample",
        f"true with model.decoder = {decoder}, which itself upsamples the logits",
        loss.upsample or decoder in (None, "bilinear"),
    )
