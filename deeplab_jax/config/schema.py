"""The config of a run: typed dataclasses, one for each section.

A file under `configs/` defines `get_config() -> Config` and sets only the fields that differ from
the defaults here. Every field is a flag of the command line, as in `--config.train.steps=10`; a
tuple is written `--config.model.multi_grid=1,2,4`. `config.rules.validate` checks the values.
"""

# No `from __future__ import annotations` here: the command line reads the types of the fields.

import dataclasses
import json
from typing import Any

from deeplab_jax.utils.registry import Registry


@dataclasses.dataclass
class ModelConfig:
    """The model. None stands for the value that the named architecture has."""

    architecture: str = "paper_resnet101"  # a name in `models.architecture.ARCHITECTURES`
    num_classes: int | None = None  # None: the number of classes of the data set
    output_stride: int | None = None  # 8, 16 or 32; with a cascade up to 256
    cascade: int | None = None  # 0 to 3 copies of the last stage in place of ASPP; None: ASPP
    multi_grid: tuple[int, ...] | None = None  # unit rates of the last stage and of its copies
    atrous_rates: tuple[int, ...] | None = None  # rates of ASPP at this model's output stride
    image_pooling: bool | None = None  # whether ASPP has image-level features
    head: str | None = None  # "aspp", or a name registered in `models.architecture.HEADS`
    head_channels: int | None = None  # of ASPP, head and decoder, before the factor `width`
    projection_kernel: int | None = None  # side of the convolution that joins ASPP's branches
    separable_aspp: bool | None = None  # whether ASPP's 3x3 convolutions are separable
    separable_head: bool | None = None  # the same for the 3x3 convolutions behind ASPP
    decoder_convs: int | None = None  # number of 3x3 convolutions of the decoder "plus"
    dilation_rule: str | None = None  # rates of the last stages: "paper", "torchvision", "mmseg"
    residual: str | None = None  # "post" or "pre" activation
    stem: str | None = None  # "conv7x7"; three 3x3 convolutions: "deep" or (wider) "deep128"
    shortcut: str | None = None  # of strided blocks: "conv1x1" or "avg_pool" (ResNet-D)
    stride_place: str | None = None  # strided layer of a bottleneck: "conv2" (v1.5), "conv1" (v1)
    padding: str | None = None  # of strided convolutions: "symmetric" or "same" (TensorFlow's)
    width: float | None = None  # factor for the number of channels of every layer
    aux_head: bool | None = None  # whether there is an auxiliary head; see loss.aux_weight
    dropout: float | None = None  # probability of dropout before the logits
    decoder: str | None = None  # "bilinear", "transposed" (learned) or "plus" (DeepLabv3+)
    align_corners: bool | None = None  # how logits are resized, in the sense of torch
    bn_momentum: float | None = None  # decay of the running statistics; PyTorch's 0.1 is 0.9 here
    bn_epsilon: float | None = None  # added to the variance in batch norm
    dtype: str = "float32"  # of the computation, or "bfloat16"; parameters are always float32


@dataclasses.dataclass
class ShapesConfig:
    """The generated data set "shapes"."""

    size: int = 64  # side of an image, pixels
    num_train: int = 4000  # number of training images
    num_eval: int = 200  # number of evaluation images
    radius_range: tuple[float, ...] = (0.2, 0.4)  # smallest, largest radius / side of the image
    max_shapes: int = 3  # most shapes in an image
    seed: int = 0  # of the images; independent of the seed of the run


@dataclasses.dataclass
class FolderConfig:
    """The data set "folder": your own images and masks, laid out as docs/own_data.md says."""

    # Pixel values of masks: "auto" finds out which of "ids", "colors" or "binary" (0 and 255).
    masks_hold: str = "auto"
    threshold: int | None = None  # of two classes: grey values from it on are the second one
    # Paths of images and masks below the root, as "{split}/{name}_mask.png"; empty: found.
    image_pattern: str = ""
    mask_pattern: str = ""
    mask_name: str = "{name}"  # file name in masks without its suffix; {name}: the image's
    classes: str = ""  # file of classes; empty: classes.txt in the root, or another usual name
    val_fraction: float = 0.2  # of the images, for val; unused if folders or lists give a val split
    seed: int = 0  # of the choice of val images; independent of the seed of the run
    channels: int = 3  # channels of the images: 3 is RGB, 1 grey, 4 RGBA, or any other number


MIXES = ("cutmix", "classmix", "copy_paste")


@dataclasses.dataclass
class AugmentConfig:
    """Augmentation besides scale, crop and flip; all is off by default (docs/augmentation.md)."""

    photometric: float = 0.0  # probability of photometric distortion, as in SSD and mmseg
    color_jitter: float = 0.0  # strength s, 0..1, of torchvision's ColorJitter(s, s, s, s / 4)
    gray: float = 0.0  # probability that an image loses its colours
    blur: float = 0.0  # probability of a Gaussian blur, sigma 0.1 to 2 pixels
    rotation: float = 0.0  # largest angle, degrees, in either direction
    max_class_share: float = 1.0  # of a class in a crop; 10 places of the crop are tried
    mix: str = ""  # pastes parts of a second crop: "cutmix", "classmix" or "copy_paste"
    mix_probability: float = 0.5  # that a crop is mixed with another


@dataclasses.dataclass
class DataConfig:
    """The data set and its augmentation; paths may be in a bucket: gs://bucket/path."""

    # "voc", "coco", "cityscapes", "ade20k", "folder", "shapes" (docs/datasets.md), or a registered
    # name.
    name: str = "voc"
    root: str = ""  # folder of the data, CSV or COCO file for "folder"; empty: VOC is downloaded
    split: str = "trainaug"  # training split; VOC has train, trainaug, trainval and val
    eval_split: str = "val"  # evaluation split
    crop_size: tuple[int, ...] = (513,)  # of training crops, pixels: one side, or height,width
    scale_range: tuple[float, ...] = (0.5, 2.0)  # smallest, largest factor of random scaling
    flip: bool = True  # whether each training image is mirrored with probability 1/2
    duplicate_classes: tuple[str, ...] = ()  # class names; images with one are oversampled
    duplicates: int = 2  # how often an epoch shows those images; it shows the others once
    ignore_label: int = 255  # label of pixels that count neither in the loss nor in the metrics
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, in 0..1; ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # of each channel, in 0..1; ImageNet's
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    num_workers: int = 2  # processes that prepare batches; 0: threads of the main process
    folder: FolderConfig = dataclasses.field(default_factory=FolderConfig)
    shapes: ShapesConfig = dataclasses.field(default_factory=ShapesConfig)


@dataclasses.dataclass
class InitConfig:
    """The initial parameters; random where `path` and `backbone` are empty.

    Both take a workdir, a checkpoint folder, a weights file of any family (docs/weights.md), the
    name of published weights, such as "resnet101", or "hf://org/name". Paths may be in a bucket.
    """

    path: str = ""  # model to start from; its logits layers are new if the classes differ
    backbone: str = ""  # model whose backbone to start from
    allow_missing: str = ""  # regular expression: variables that the file may lack


SCHEDULES = ("poly", "cosine", "constant")


@dataclasses.dataclass
class OptimizerConfig:
    """The optimizer, one of optax, and its learning rate; see docs/training.md."""

    name: str = "sgd"  # or "adamw", "lion", or another optimizer of optax
    # Its further arguments, as in b1=0.9,b2=0.95.
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 0.007  # at the start, after warm-up
    schedule: str = "poly"  # learning_rate * (1 - step/steps)^power; or "cosine", "constant"
    power: float = 0.9  # of the "poly" schedule
    momentum: float = 0.9  # of "sgd"
    weight_decay: float = 1e-4  # on kernels only, not on biases and batch norm
    # Whether the weight decay of "sgd" bypasses momentum. That of adamw, lion, lamb, ... always
    # does; other optimizers have it added to the gradient.
    decoupled_weight_decay: bool = False
    warmup_steps: int = 0  # steps in which the learning rate rises linearly from 0
    head_multiplier: float = 1.0  # factor for the learning rate of all layers but the backbone's
    layer_decay: float = 1.0  # factor for the backbone's rate, once more for each earlier stage
    clip_norm: float = 0.0  # largest global norm of the gradient; 0: no clipping
    ema_decay: float = 0.0  # of the moving average of parameters, which is evaluated; 0: none
    accumulate: int = 1  # number of parts of a batch, computed one after the other to save memory


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
    """The loss over all pixels that are not ignored; see `training.losses`."""

    name: str = "cross_entropy"  # or "focal", "dice", "lovasz", or a registered name
    focal_gamma: float = 2.0  # exponent gamma of the focal loss
    label_smoothing: float = 0.0  # share of a pixel's target that is spread over all classes
    # None: equal weights; one number per class; or "auto": from the class frequencies of the
    # training split.
    class_weights: object = None  # (`object`, because the command line parses no such union)
    hard_pixel_fraction: float = 1.0  # fraction of pixels, those of highest loss, that count
    aux_weight: float = 0.4  # factor for the loss of the auxiliary head
    upsample: bool = True  # logits to the labels' size; False: labels to the logits' size


# What metrics and pictures are written to: see `training.logging.Logger`.
LOGGERS: Registry[Any] = Registry(
    "logger", {"tensorboard": "deeplab_jax.training.logging:TensorBoard"}
)


@dataclasses.dataclass
class TrainConfig:
    """Training: its length, batch and intervals."""

    steps: int = 30_000  # number of training steps
    batch_size: int = 16  # images per step, over all devices and hosts
    freeze_bn: bool = False  # batch norm uses its running statistics and does not update them
    remat: bool = False  # recompute each residual unit in the backward pass, to save memory
    log_every: int = 20  # steps between lines of metrics
    eval_every: int = 1000  # steps between evaluations; 0: only at the end
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep: int = 2  # number of newest checkpoints to keep, in addition to the best one
    # Steps between digests of all arrays in receipt.jsonl (docs/receipts.md); 0: no receipt.
    receipt_every: int = 100
    strict_resume: bool = False  # resume only with the versions and images of the checkpoint
    # Where metrics and pictures go, besides metrics.jsonl and pictures/ (docs/logging.md).
    loggers: tuple[str, ...] = ("tensorboard",)


@dataclasses.dataclass
class SecondStageConfig:
    """A second stage from the last parameters of the first; other fields keep their values."""

    steps: int = 0  # number of training steps; 0: no second stage
    output_stride: int | None = None  # None: that of the first stage
    split: str = ""  # training split; empty: that of the first stage
    learning_rate: float = 0.001  # at the start of the stage, whose schedule is its own
    freeze_bn: bool = True  # as train.freeze_bn


PROTOCOLS = ("auto", "paper", "native", "torchvision")


@dataclasses.dataclass
class EvalConfig:
    """Evaluation, during training and by `deeplab-jax evaluate`; see `resolve_eval`."""

    batch_size: int = 8  # images per batch, over all devices and hosts
    output_stride: int | None = None  # of the evaluated model; None: the same as in training
    size: int = 513  # side that "paper" pads images to; larger ones to the next 256 k + 1
    num_pictures: int = 8  # number of predictions to draw at each evaluation
    # "paper", "native" or "torchvision" (docs/evaluation.md); "auto": native for your own images
    # (data.name = folder) and with windows, else paper.
    protocol: str = "auto"
    scales: tuple[float, ...] = (1.0,)  # image scales to average the probabilities over
    flip: bool = False  # whether to average over the mirrored image too
    # Side of a sliding window, pixels; 0: whole images. None: 1025 under native for images of more
    # than 4 million pixels, 0 for all others.
    window: int | None = None
    overlap: float = 0.5  # fraction of a window that the next window covers again


@dataclasses.dataclass
class MeshConfig:
    """The mesh of devices."""

    data: int = -1  # devices along the batch; -1: all devices / `space`
    space: int = 1  # devices along the height of each image
    fully_sharded: bool = False  # shard parameters and optimizer state over `data`, to save memory


@dataclasses.dataclass
class Config:
    """A run. Its output folder is the flag `--workdir`, which is not part of the config."""

    seed: int = 0  # of initialization, batches, augmentation and dropout
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    second_stage: SecondStageConfig = dataclasses.field(default_factory=SecondStageConfig)


# Fields that change how a run is observed or distributed, not what it computes. A run may resume
# with other values of them.
RESUMABLE = frozenset(
    {
        "data.num_workers",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.keep",
        "train.receipt_every",
        "train.strict_resume",
        "eval.batch_size",
        "eval.num_pictures",
        "mesh.data",
        "mesh.space",
        "mesh.fully_sharded",
    }
)


# Fields that are dictionaries; all others in a config's tree are its sections.
DICT_FIELDS = frozenset({"optimizer.arguments"})
# Fields that say where the data are. What a run computes depends on the data, not on their place.
DATA_PATHS = frozenset({"data.root", "data.folder.classes"})
# Fields that a run may change when it resumes.
FREE_FIELDS = DATA_PATHS | {"train.loggers"}


def output_strides(cascade: int | None) -> tuple[int, ...]:
    """Returns the output strides of a model with `cascade` copies of its last stage.

    Each copy can halve the resolution once more: 8, 16 and 32 without copies, up to 256 with three.
    """
    return tuple(8 * 2**halvings for halvings in range(3 + (cascade or 0)))


def resolve_eval(config: Config) -> EvalConfig:
    """Returns the section `eval` with the protocol and the window that its defaults stand for.

    The protocol is never "auto". Only under "native" may the window be None.
    """
    settings = config.eval
    protocol, window = settings.protocol, settings.window
    if protocol == "auto":
        protocol = "native" if window or config.data.name == "folder" else "paper"
    if window is None and protocol != "native":
        window = 0
    return dataclasses.replace(settings, protocol=protocol, window=window)


def crop_shape(data: DataConfig) -> tuple[int, int]:
    """Returns the height and width of a training crop, pixels."""
    return data.crop_size[0], data.crop_size[-1]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the fields of a config, or of its parsed JSON, as `{"train.steps": 10, ...}`."""
    tree = config if isinstance(config, dict) else dataclasses.asdict(config)
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        name = prefix + name
        is_section = isinstance(value, dict) and name not in DICT_FIELDS
        leaves |= flatten(value, f"{name}.") if is_section else {name: value}
    return leaves


def to_json(config: Config) -> str:
    """Returns the text of a run's `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(ours: Config, theirs: dict[str, Any]) -> dict[str, str]:
    """Compares a config with the parsed JSON of another, except for the fields in `RESUMABLE`.

    Fields that the other lacks, because an earlier version wrote it, have their defaults.

    Returns:
      The values of each differing field, such as `{"config.train.steps": "10 here, 20 there"}`.
    """
    here, default = (flatten(json.loads(to_json(each))) for each in (ours, type(ours)()))
    there = default | flatten(theirs)
    absent = "absent"
    return {
        f"config.{name}": f"{here.get(name, absent)} here, {there.get(name, absent)} there"
        for name in sorted(here.keys() | there.keys())
        if name not in RESUMABLE and here.get(name, absent) != there.get(name, absent)
    }
