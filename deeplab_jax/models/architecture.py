"""Descriptions of models, named architectures, and the registries of backbones and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from deeplab_jax.config import output_strides
from deeplab_jax.config.rules import model_rules, spell_choices
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.registry import Registry

# Entries are called as `BACKBONES[name](architecture, rngs=rngs)`. Their attribute `options` names
# the fields of `BACKBONE_NEUTRAL` that they support.
BACKBONES: Registry[Callable[..., Any]] = Registry("backbone")
# Entries are called as `HEADS[name](backbone, architecture, rngs=rngs)`. Their attribute `options`
# names the fields of `HEAD_NEUTRAL` that they support, and "plus" for DeepLabv3+'s decoder.
HEADS: Registry[Callable[..., Any]] = Registry("head")

# Fields that not every backbone supports. With one that does not, they must have these values.
BACKBONE_NEUTRAL: dict[str, Any] = {
    "multi_grid": (1, 1, 1),
    "dilation_rule": "paper",
    "residual": "post",
    "stem": "conv7x7",
    "shortcut": "conv1x1",
    "stride_place": "conv2",
    "padding": "symmetric",
    "cascade": None,
    "width": 1.0,
}
# The same for heads.
HEAD_NEUTRAL: dict[str, Any] = {
    "atrous_rates": (),
    "image_pooling": True,
    "head_conv": False,
    "head_channels": 256,
    "projection_kernel": 1,
    "separable_aspp": False,
    "separable_head": False,
    "decoder_convs": 2,
}

_DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The description of a model."""

    name: str  # key of the entry in `ARCHITECTURES` that this one is derived from
    backbone: str  # a name in `BACKBONES`
    num_classes: int  # number of classes, and so of logits per pixel
    # Image size divided by the size of the last features: 8, 16 or 32, or up to 32 * 2**cascade.
    output_stride: int
    # Unit rates of the blocks of the last stage and its copies in a cascade, multiplied by the
    # dilation of the stage unless the dilation rule is "mmseg". A stage with fewer blocks
    # (ResNet-18 has 2) uses the first entries; a stage with more repeats them.
    multi_grid: tuple[int, ...]
    # Rates of ASPP's 3x3 convolutions at this output stride. () leaves a 1x1 convolution and image
    # pooling; a cascade has () and no ASPP.
    atrous_rates: tuple[int, ...]
    # "paper", "torchvision" or "mmseg": the dilations of stages whose strides are removed; see
    # `backbones.resnet`.
    dilation_rule: str
    aux_head: bool  # whether there is a second head, on the features of the second to last stage
    # Whether a 3x3 convolution precedes the logits or a "plus" decoder, as in torchvision and not
    # in the paper.
    head_conv: bool
    # Probability before the logits, in [0, 1). In the auxiliary head it is at most 0.1, as in
    # torchvision.
    dropout: float
    bn_momentum: float  # decay of batch norm's running statistics; torch's 0.1 is 0.9 here
    bn_epsilon: float = 1e-5  # added to batch norm's variance
    backbone_bn_momentum: float | None = None  # the same for the backbone; None: as in the heads
    backbone_bn_epsilon: float | None = None  # the same for the backbone; None: as in the heads
    in_channels: int = 3  # number of channels of the images
    residual: str = "post"  # (conv, norm, relu), or "pre" (norm, relu, conv: He et al. 2016)
    # "conv7x7"; or three 3x3 convolutions of 32, 32 and 64 channels ("deep") or of 64, 64 and 128
    # ("deep128").
    stem: str = "conv7x7"
    # The shortcut of a block that changes the size: a strided 1x1 convolution "conv1x1", or
    # "avg_pool", a 2x2 average pool and a 1x1 convolution (ResNet-D, arXiv 1812.01187).
    shortcut: str = "conv1x1"
    # The convolution of a bottleneck that has the stride: the 3x3 "conv2" (v1.5) or the first 1x1
    # "conv1" (v1). In a basic block it is always the first.
    stride_place: str = "conv2"
    # Padding of strided convolutions: "symmetric", as in torch, or "same", which is TensorFlow's
    # SAME and depends on the size of the map.
    padding: str = "symmetric"
    width: float = 1.0  # multiplies all numbers of channels, which stay at least 8
    # Channels of ASPP's branches, `head_conv` and a "plus" decoder, before the factor `width`.
    head_channels: int = 256
    projection_kernel: int = 1  # side of the convolution that joins ASPP's branches, 1 or 3
    # Whether ASPP's 3x3 convolutions are a depthwise and a 1x1 convolution (arXiv 1802.02611,
    # section 3.1).
    separable_aspp: bool = False
    # The same for `head_conv` and the 3x3 convolutions of a "plus" decoder.
    separable_head: bool = False
    # How logits are brought to the image's size: "bilinear"; "transposed" (learned); or "plus"
    # (DeepLabv3+, arXiv 1802.02611), which joins features with those of stride 4.
    decoder: str = "bilinear"
    decoder_convs: int = 2  # number of 3x3 convolutions of a "plus" decoder
    # Whether logits and features are resized with aligned corners, as by torch's
    # `interpolate(align_corners=True)`; otherwise with half-pixel centres.
    align_corners: bool = False
    # Dtype of the computation. Parameters, statistics and logits are float32 under "bfloat16", and
    # float64 under "float64", which needs `jax_enable_x64`.
    dtype: str = "float32"
    # None for ASPP behind the last stage (arXiv 1706.05587, section 3.3). Otherwise the number of
    # copies of the last stage, 0 to 3, that replace ASPP: block5 to block7 of section 3.2. 0 is the
    # column "block4" of the paper's tables 2 and 3.
    cascade: int | None = None
    image_pooling: bool = True  # whether ASPP has image-level features: the paper's table 5
    head: str = "aspp"  # a name in `HEADS`

    def __post_init__(self) -> None:
        for field in ("multi_grid", "atrous_rates"):  # JSON gives lists, which do not hash
            object.__setattr__(self, field, tuple(getattr(self, field)))
        problems = [
            f"{field} must be {expected}, got {getattr(self, field)!r}"
            for field, expected, ok in self._rules()
            if not ok
        ]
        if problems:
            raise UserError(f"architecture {self.name}: " + "; ".join(problems))

    def _rules(self) -> Iterable[tuple[str, str, bool]]:
        """Yields (field, what it must be, whether it is that)."""
        yield from model_rules(self)
        yield "dtype", spell_choices(_DTYPES), self.dtype in _DTYPES
        small = self.decoder != "transposed" or self.output_stride <= 32
        yield "decoder", "bilinear or plus at output strides above 32", small
        has_decoder = self.decoder != "plus" or "plus" in options_of(HEADS[self.head])
        yield "decoder", f"bilinear or transposed: head {self.head}", has_decoder
        for part, registry, neutral in (
            ("backbone", BACKBONES, BACKBONE_NEUTRAL),
            ("head", HEADS, HEAD_NEUTRAL),
        ):
            name = getattr(self, part)
            for field, value in neutral.items():
                if field not in options_of(registry[name]):
                    expected = f"{value!r} (the {part} {name} has no such choice)"
                    yield field, expected, getattr(self, field) == value

    @property
    def backbone_bn(self) -> tuple[float, float]:
        """Momentum and epsilon of the backbone's batch norm."""
        momentum, epsilon = self.backbone_bn_momentum, self.backbone_bn_epsilon
        return (
            self.bn_momentum if momentum is None else momentum,
            self.bn_epsilon if epsilon is None else epsilon,
        )

    def at_output_stride(self, output_stride: int) -> Architecture:
        """Returns the architecture at another output stride, with ASPP's rates scaled accordingly.

        Scales a multi-grid too, if the dilation rule "mmseg" makes it absolute. The parameters have
        the same names and shapes.

        Raises:
          UserError: the output stride is not supported, or a rate would not be whole, as 6 at
            output stride 16 scaled to 64.
        """
        scaled: dict[str, Any] = {}
        fields = ["atrous_rates"]
        if self.dilation_rule == "mmseg" and set(self.multi_grid) != {1}:
            fields.append("multi_grid")
        for field in fields if output_stride in output_strides(self.cascade) else []:
            before = getattr(self, field)
            numerators = [rate * self.output_stride for rate in before]
            if any(n % output_stride for n in numerators):
                after = ", ".join(f"{n / output_stride:g}" for n in numerators)
                raise UserError(
                    f"{field} {before} at output stride {self.output_stride} would be ({after}) "
                    f"at {output_stride}, which are not whole: give {field} for output stride "
                    f"{output_stride}"
                )
            scaled[field] = tuple(n // output_stride for n in numerators)
        return dataclasses.replace(self, output_stride=output_stride, **scaled)


# torchvision.models.segmentation.deeplabv3. Fields without an entry have `Architecture`'s defaults.
_TORCHVISION: dict[str, Any] = {
    "output_stride": 8,
    "multi_grid": (1, 1, 1),
    "atrous_rates": (12, 24, 36),
    "dilation_rule": "torchvision",
    "aux_head": True,
    "head_conv": True,
    "dropout": 0.5,
    "bn_momentum": 0.9,
}
_SMP = {"dilation_rule": "paper", "aux_head": False, "align_corners": True}
_VAINF = {"output_stride": 16, "atrous_rates": (6, 12, 18), "aux_head": False, "dropout": 0.1}
# The fields in which each family of models differs from torchvision's.
_FAMILIES: dict[str, dict[str, Any]] = {
    # arXiv 1706.05587, section 4; batch norm's momentum is in section 4.1.
    "paper": {
        "output_stride": 16,
        "multi_grid": (1, 2, 4),
        "atrous_rates": (6, 12, 18),
        "dilation_rule": "paper",
        "aux_head": False,
        "head_conv": False,
        "dropout": 0.1,
        "bn_momentum": 0.9997,
    },
    "torchvision": {},
    # mmsegmentation's DeepLabV3 with ResNetV1c, configs/_base_/models/deeplabv3_r50-d8.py.
    "mmseg": {
        "dilation_rule": "mmseg",
        "stem": "deep",
        "head_conv": False,
        "head_channels": 512,
        "projection_kernel": 3,
        "dropout": 0.1,
    },
    # DeepLabV3 and DeepLabV3Plus of segmentation_models.pytorch.
    "smp": _SMP,
    "smpplus": _SMP
    | {
        "output_stride": 16,
        "separable_aspp": True,
        "separable_head": True,
        "decoder": "plus",
        "decoder_convs": 1,
    },
    # deeplabv3 and deeplabv3plus of VainF/DeepLabV3Plus-Pytorch.
    "vainf": _VAINF,
    "vainfplus": _VAINF | {"head_conv": False, "decoder": "plus", "decoder_convs": 1},
    # tensorflow/models, research/deeplab, with MobileNetV2.
    "tf": {
        "output_stride": 16,
        "atrous_rates": (),
        "aux_head": False,
        "head_conv": False,
        "dropout": 0.1,
        "bn_momentum": 0.9997,
        "backbone_bn_momentum": 0.997,
        "backbone_bn_epsilon": 1e-3,
        "padding": "same",
        "align_corners": True,
    },
}
_RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
# The backbones of the families that do not have all of them.
_FAMILY_BACKBONES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mmseg", "smp", "smpplus", "vainf", "vainfplus"), _RESNETS),
    "tf": ("mobilenet_v2",),
}

# Fields that a backbone sets in all families, and that a named architecture sets.
_BACKBONE_FIELDS: dict[str, dict[str, Any]] = {
    "mobilenet_v3_large": {"backbone_bn_momentum": 0.99, "backbone_bn_epsilon": 1e-3},
    # With ASPP's rates of the ResNets at output stride 8.
    "torchvision_mobilenet_v3_large": {"output_stride": 16},
    "mmseg_resnet18": {"head_channels": 128},  # configs/deeplabv3/deeplabv3_r18-d8_*.py
}


def _backbones_of(family: str) -> list[str]:
    return [name for name in BACKBONES if name in _FAMILY_BACKBONES.get(family, BACKBONES)]


def options_of(entry: Any) -> frozenset[str]:
    """Returns the optional fields that a registered backbone or head supports."""
    return frozenset(getattr(entry, "options", ()))


class _Architectures(Mapping[str, Architecture]):
    """Each family with each registered backbone that it has, such as "paper_resnet101"."""

    def __getitem__(self, name: str) -> Architecture:
        family, _, backbone = name.partition("_")
        if family not in _FAMILIES or backbone not in _backbones_of(family):
            raise KeyError(name)
        options = options_of(BACKBONES[backbone])
        fields = _TORCHVISION | _FAMILIES[family]
        fields |= {field: v for field, v in BACKBONE_NEUTRAL.items() if field not in options}
        fields |= _BACKBONE_FIELDS.get(backbone, {}) | _BACKBONE_FIELDS.get(name, {})
        return Architecture(name=name, backbone=backbone, num_classes=21, **fields)

    def __iter__(self) -> Iterator[str]:
        return (f"{family}_{name}" for family in _FAMILIES for name in _backbones_of(family))

    def __len__(self) -> int:
        return sum(1 for _ in self)


ARCHITECTURES: Mapping[str, Architecture] = _Architectures()


def architecture(name: str, *, num_classes: int, **overrides: Any) -> Architecture:
    """Returns a named architecture with some fields replaced.

    Args:
      name: a key of `ARCHITECTURES`.
      num_classes: number of classes.
      **overrides: fields of `Architecture`; None keeps the value of the named architecture. An
        `output_stride` without `atrous_rates` scales the rates, as `at_output_stride` does. A
        `cascade` sets them to (). A `bn_momentum` or `bn_epsilon` applies to the backbone too,
        unless its own is given. The decoder "plus" has 3x3 convolutions of its own and sets
        `head_conv` to False unless given.

    Raises:
      UserError: an unknown name or field, or an invalid value.
    """
    if name not in ARCHITECTURES:
        raise UserError(_unknown("architecture", name, ARCHITECTURES))
    fields = [field.name for field in dataclasses.fields(Architecture)]
    for field in overrides:
        if field not in fields or field == "name":
            raise UserError(_unknown("field of an architecture", field, fields[1:]))
    chosen = {field: value for field, value in overrides.items() if value is not None}
    base = ARCHITECTURES[name]
    options = options_of(HEADS[chosen.get("head", base.head)])
    for field, value in HEAD_NEUTRAL.items():
        if field not in options:
            chosen.setdefault(field, value)
    if "cascade" in chosen:
        chosen.setdefault("atrous_rates", ())
    if chosen.get("decoder") == "plus" != base.decoder:
        chosen.setdefault("head_conv", False)
    if "output_stride" in chosen and "atrous_rates" not in chosen:
        base = base.at_output_stride(chosen.pop("output_stride"))
    for field in ("bn_momentum", "bn_epsilon"):
        if field in chosen:
            chosen.setdefault(f"backbone_{field}", None)
    return dataclasses.replace(base, num_classes=num_classes, **chosen)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    return f"unknown {what} {name!r}{did_you_mean(name, known)}. Known: {', '.join(known)}"
