"""The config of a run: typed dataclasses, one a branch, and `validate()`.

A file under `configs/` holds `get_config() -> Config` and says only what differs from the defaults
here. Every field is reachable on the command line, as in `--config.train.steps=10`; a tuple is
given as `--config.model.multi_grid=1,2,4`.
"""

# No `from __future__ import annotations` here: the command line reads the types of the fields.

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from typing import Any

from deeplab_jax.errors import UserError


@dataclasses.dataclass
class ModelConfig:
    """What is built; `None` means the architecture's own (see `models.deeplab.ARCHITECTURES`)."""

    architecture: str = "paper_resnet101"
    num_classes: int | None = None  # None: the data set's
    output_stride: int | None = None  # 8, 16 or 32
    multi_grid: tuple[int, ...] | None = None  # unit rates of the last stage
    atrous_rates: tuple[int, ...] | None = None  # of ASPP, at this output stride
    dilation_rule: str | None = None  # "paper" or "torchvision"
    residual: str | None = None  # "post" or "pre" activation
    stem: str | None = None  # "conv7x7" or "deep" (three 3x3)
    stride_place: str | None = None  # "conv2" (v1.5) or "conv1" (v1) of a bottleneck
    width: float | None = None  # multiplies the number of channels of each layer
    aux_head: bool | None = None
    dropout: float | None = None  # probability, before the logits
    decoder: str | None = None  # "bilinear" or "transposed"
    bn_momentum: float | None = None  # decay of the running statistics; torch's 0.1 is 0.9 here
    bn_epsilon: float | None = None
    dtype: str = "float32"  # of the computation: "float32" or "bfloat16"; parameters are float32


@dataclasses.dataclass
class ShapesConfig:
    """The generated data set."""

    size: int = 64  # side of an image, pixels
    num_train: int = 4000  # images
    num_eval: int = 200  # images
    seed: int = 0  # of the images, apart from the run's


@dataclasses.dataclass
class FolderConfig:
    """A user's own images and masks; docs/own_data.md says how they lie in `data.root`."""

    masks_hold: str = "ids"  # "ids", "colors" (those of the classes) or "binary" (0 and 255)
    mask_name: str = "{name}"  # name of a mask, without its suffix; {name} is its image's
    classes: str = ""  # file of class names, one a line; empty: classes.txt in the root
    val_fraction: float = 0.2  # of the images, where neither folders nor lists say what is val
    seed: int = 0  # of that division, apart from the run's
    channels: int = 3  # of the images; 1 is grey, 4 RGBA or any others


@dataclasses.dataclass
class DataConfig:
    """Where images come from and how they are augmented."""

    name: str = "voc"  # "voc", "folder" or "shapes"
    root: str = ""  # folder (or, for "folder", CSV file) of the data; empty: VOC is downloaded
    split: str = "trainaug"  # to train on: "train", "trainaug", "trainval" or "val"
    eval_split: str = "val"
    crop_size: tuple[int, ...] = (513,)  # pixels: a side, or height and width
    scale_range: tuple[float, ...] = (0.5, 2.0)  # of random scaling; equal ends: that scale
    flip: bool = True  # mirror half of the images
    ignore_label: int = 255  # id of the pixels that do not count
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of channels in 0..1; ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    num_workers: int = 2  # processes that prepare batches; 0: threads of this process
    folder: FolderConfig = dataclasses.field(default_factory=FolderConfig)
    shapes: ShapesConfig = dataclasses.field(default_factory=ShapesConfig)


@dataclasses.dataclass
class InitConfig:
    """What parameters start from."""

    # A workdir, a checkpoint's folder, a `.pth` or `.safetensors` file, or a name of torchvision's.
    path: str = ""  # of a whole model; layers that give logits start anew if the classes differ
    backbone: str = ""  # of a model whose backbone alone is taken; both empty: random
    allow_missing: str = ""  # regular expression: names of variables that it may lack


@dataclasses.dataclass
class OptimizerConfig:
    """SGD with momentum and the "poly" schedule, lr = learning_rate * (1 - step/steps)^power."""

    learning_rate: float = 0.007
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4  # on kernels; biases and batch norm have none
    warmup_steps: int = 0  # linear, from 0
    head_multiplier: float = 1.0  # of the learning rate of all but the backbone
    clip_norm: float = 0.0  # global norm of the gradient; 0: not clipped
    ema_decay: float = 0.0  # of the averaged parameters that are evaluated; 0: none
    accumulate: int = 1  # parts that a batch is computed in, one after the other


PIXEL_LOSSES = ("cross_entropy", "focal")  # means over pixels
IMAGE_LOSSES = ("dice", "lovasz")  # means over images


@dataclasses.dataclass
class LossConfig:
    """Over the pixels that are not ignored; see `training.losses`."""

    name: str = "cross_entropy"  # or "focal"; "dice" or "lovasz": by image and class
    focal_gamma: float = 2.0  # power of the share that is wrong, of "focal"
    # One number a class, or "auto": from the frequency of each class in the training split.
    class_weights: object = None  # (`object` for the command line, which reads no union)
    hard_pixel_fraction: float = 1.0  # share of pixels, those of highest loss, that count
    aux_weight: float = 0.4  # of the auxiliary head's loss


@dataclasses.dataclass
class TrainConfig:
    steps: int = 30_000
    batch_size: int = 16  # over all devices and hosts
    freeze_bn: bool = False  # batch norm uses its running statistics and leaves them
    remat: bool = False  # recompute each residual unit in the backward pass, to save memory
    log_every: int = 20  # steps
    eval_every: int = 1000  # steps; 0: only at the end
    save_every: int = 500  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept, beside the best


PROTOCOLS = ("paper", "native", "torchvision")


@dataclasses.dataclass
class EvalConfig:
    batch_size: int = 8
    output_stride: int | None = None  # None: the model's
    size: int = 513  # side that "paper" pads images to; larger ones to the next 256 k + 1
    num_pictures: int = 8  # of predictions, written at each evaluation
    protocol: str = "paper"  # "paper", "native" or "torchvision", see `evaluation.protocols`
    scales: tuple[float, ...] = (1.0,)  # of the image, over which probabilities are averaged
    flip: bool = False  # and over its mirror image
    window: int = 0  # side of a sliding window, pixels; 0: whole images
    overlap: float = 0.5  # share of a window that the next one covers again


@dataclasses.dataclass
class MeshConfig:
    data: int = -1  # devices that a batch is divided over; -1: all


@dataclasses.dataclass
class Config:
    """A run. The folder it writes to is the flag `--workdir`, no part of it."""

    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


# Fields that change how a run is watched or spread, not what it computes: a run may resume with
# others.
RESUMABLE = frozenset(
    {
        "data.num_workers",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.keep",
        "eval.batch_size",
        "eval.num_pictures",
        "mesh.data",
    }
)


def crop_shape(data: DataConfig) -> tuple[int, int]:
    """Height and width of a training crop, pixels."""
    size = tuple(data.crop_size)
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 10, ...}`: each leaf field under its dotted name."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = value
    return leaves


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(ours: Config, theirs: dict[str, Any]) -> list[str]:
    """Fields, not counting `RESUMABLE`, in which a config differs from another's JSON.

    Args:
      ours: a config.
      theirs: what `json.loads(to_json(other))` gives.

    Returns:
      One line a field, as in `train.steps: 10 here, 20 there`.
    """
    here = _flatten_json(json.loads(to_json(ours)))
    there = _flatten_json(theirs)
    absent = "absent"
    return [
        f"{name}: {here.get(name, absent)} here, {there.get(name, absent)} there"
        for name in sorted(here.keys() | there.keys())
        if name not in RESUMABLE and here.get(name, absent) != there.get(name, absent)
    ]


def _flatten_json(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flatten_json(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


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
        return {int: "whole numbers", float: "numbers"}.get(element, "values") + " (a,b,...)"
    return "None" if expected is type(None) else words.get(expected, str(expected))


def _rules(config: Config) -> list[tuple[str, str, bool]]:
    """(field, what it must be, whether it is) for each range and combination."""
    model, data, optimizer = config.model, config.data, config.optimizer
    loss, train, evaluation = config.loss, config.train, config.eval
    strides = (None, 8, 16, 32)
    scales = data.scale_range
    return [
        (
            "model.output_stride",
            f"must be 8, 16 or 32{_nearest_stride(model.output_stride)}",
            model.output_stride in strides,
        ),
        (
            "eval.output_stride",
            f"must be 8, 16 or 32{_nearest_stride(evaluation.output_stride)}",
            evaluation.output_stride in strides,
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
            f"must be {', '.join(PIXEL_LOSSES)} or {', '.join(IMAGE_LOSSES)}",
            loss.name in PIXEL_LOSSES + IMAGE_LOSSES,
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
            f"must be {', '.join(PROTOCOLS)}{_nearest_name(evaluation.protocol, PROTOCOLS)}",
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


def _nearest_name(name: str, known: tuple[str, ...]) -> str:
    closest = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {closest[0]}?)" if closest else ""


def _nearest_stride(stride: int | None) -> str:
    if stride is None or stride in (8, 16, 32):
        return ""
    return f" (nearest: {min((8, 16, 32), key=lambda s: abs(s - stride))})"
