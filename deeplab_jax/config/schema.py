"""The config of a run: typed dataclasses, one a branch; `config.rules.validate` checks one.

A file under `configs/` holds `get_config() -> Config` and says only what differs from the defaults
here. Every field is reachable on the command line, as in `--config.train.steps=10`; a tuple is
given as `--config.model.multi_grid=1,2,4`.
"""

# No `from __future__ import annotations` here: the command line reads the types of the fields.

import dataclasses
import json
from typing import Any

from deeplab_jax.utils.registry import Registry


@dataclasses.dataclass
class ModelConfig:
    """What is built; None: the architecture's own (see `models.architecture.ARCHITECTURES`)."""

    architecture: str = "paper_resnet101"
    num_classes: int | None = None  # None: the data set's
    output_stride: int | None = None  # 8, 16 or 32; up to 256 with a cascade
    cascade: int | None = None  # copies of the last stage, 0 to 3, in ASPP's place; None: ASPP
    multi_grid: tuple[int, ...] | None = None  # unit rates of the last stage and its copies
    atrous_rates: tuple[int, ...] | None = None  # of ASPP, at this output stride
    image_pooling: bool | None = None  # whether ASPP has it
    head: str | None = None  # "aspp", or a name in `models.architecture.HEADS`
    dilation_rule: str | None = None  # "paper" or "torchvision"
    residual: str | None = None  # "post" or "pre" activation
    stem: str | None = None  # "conv7x7" or "deep" (three 3x3)
    stride_place: str | None = None  # "conv2" (v1.5) or "conv1" (v1) of a bottleneck
    width: float | None = None  # multiplies the number of channels of each layer
    aux_head: bool | None = None
    dropout: float | None = None  # probability, before the logits
    decoder: str | None = None  # "bilinear", "transposed" (learned) or "plus" (DeepLabv3+)
    bn_momentum: float | None = None  # decay of the running statistics; torch's 0.1 is 0.9 here
    bn_epsilon: float | None = None
    dtype: str = "float32"  # of the computation: "float32" or "bfloat16"; parameters are float32


@dataclasses.dataclass
class ShapesConfig:
    """The generated data set."""

    size: int = 64  # side of an image, pixels
    num_train: int = 4000  # images
    num_eval: int = 200  # images
    radius_range: tuple[float, ...] = (0.2, 0.4)  # of the shapes, of an image's side
    max_shapes: int = 3  # in an image
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

    # Or "coco", "cityscapes", "ade20k", "folder", "shapes" (docs/datasets.md), a registered name.
    name: str = "voc"
    root: str = ""  # folder (or, for "folder", CSV file) of the data; empty: VOC is downloaded
    split: str = "trainaug"  # to train on: "train", "trainaug", "trainval" or "val"
    eval_split: str = "val"
    crop_size: tuple[int, ...] = (513,)  # pixels: a side, or height and width
    scale_range: tuple[float, ...] = (0.5, 2.0)  # of random scaling; equal ends: that scale
    flip: bool = True  # mirror half of the images
    duplicate_classes: tuple[str, ...] = ()  # images that hold one of these are shown
    duplicates: int = 2  # times in an epoch, the others once
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


_LOSSES = "deeplab_jax.training.losses"
# Means over pixels: functions of the cross-entropies `[n, h, w]` and the `LossConfig`.
PIXEL_LOSSES: Registry[Any] = Registry(
    "loss", {"cross_entropy": f"{_LOSSES}:identity", "focal": f"{_LOSSES}:focal"}
)
# Means over images: functions of logits `[n, h, w, classes]` and labels `[n, h, w]`, giving `[n]`.
IMAGE_LOSSES: Registry[Any] = Registry(
    "loss", {"dice": f"{_LOSSES}:dice", "lovasz": f"{_LOSSES}:lovasz"}
)


@dataclasses.dataclass
class LossConfig:
    """Over the pixels that are not ignored; see `training.losses`."""

    # "cross_entropy" or "focal"; "dice" or "lovasz", by image and class; or a registered name.
    name: str = "cross_entropy"
    focal_gamma: float = 2.0  # power of the share that is wrong, of "focal"
    # One number a class, or "auto": from the frequency of each class in the training split.
    class_weights: object = None  # (`object` for the command line, which reads no union)
    hard_pixel_fraction: float = 1.0  # share of pixels, those of highest loss, that count
    aux_weight: float = 0.4  # of the auxiliary head's loss
    upsample: bool = True  # logits to the labels' size; False: labels are shrunk to the logits'


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


@dataclasses.dataclass
class SecondStageConfig:
    """A second stage, from the first's last parameters; what is not here stays as it was."""

    steps: int = 0  # 0: there is none
    output_stride: int | None = None  # None: the first's
    split: str = ""  # to train on; empty: the first's
    learning_rate: float = 0.001  # at its start; "poly" starts anew
    freeze_bn: bool = True


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
    data: int = -1  # devices that a batch is divided over; -1: all, by `space`
    space: int = 1  # devices that the height of each image is divided over
    fully_sharded: bool = False  # parameters and momentum lie in parts over `data`, to save memory


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
    second_stage: SecondStageConfig = dataclasses.field(default_factory=SecondStageConfig)


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
        "mesh.space",
        "mesh.fully_sharded",
    }
)


def output_strides(cascade: int | None) -> tuple[int, ...]:
    """Those of a model with so many copies of its last stage: each may halve the features again."""
    return tuple(8 * 2**halvings for halvings in range(3 + (cascade or 0)))


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
