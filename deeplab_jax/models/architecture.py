"""What a DeepLabv3 is made of: registries of its parts, and descriptions of whole models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from deeplab_jax.config import output_strides
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.registry import Registry

# Called as `BACKBONES[name](architecture, rngs=rngs)`. An attribute `options` names the fields of
# `NEUTRAL` that the backbone heeds.
BACKBONES: Registry[Callable[..., Any]] = Registry("backbone")
# Called as `HEADS[name](backbone, architecture, rngs=rngs)`. An attribute `options` names the
# fields of `HEAD_NEUTRAL` that the head heeds, and "plus" if it has DeepLabv3+'s decoder.
HEADS: Registry[Callable[..., Any]] = Registry("head")

# Choices that not every backbone has, and the values that they keep with one that has not.
NEUTRAL: dict[str, Any] = {
    "multi_grid": (1, 1, 1),
    "dilation_rule": "paper",
    "residual": "post",
    "stem": "conv7x7",
    "stride_place": "conv2",
    "cascade": None,
    "width": 1.0,
}
# The same for heads.
HEAD_NEUTRAL: dict[str, Any] = {"atrous_rates": (), "image_pooling": True, "head_conv": False}

# What each field that names a variant may be.
CHOICES: dict[str, tuple[Any, ...]] = {
    "cascade": (None, 0, 1, 2, 3),
    "dilation_rule": ("paper", "torchvision"),
    "residual": ("post", "pre"),
    "stem": ("conv7x7", "deep"),
    "stride_place": ("conv2", "conv1"),
    "decoder": ("bilinear", "transposed", "plus"),
    "dtype": ("float32", "bfloat16", "float64"),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A DeepLabv3, each choice made.

    Attributes:
      name: of the entry in `ARCHITECTURES` that it comes from.
      backbone: a name in `BACKBONES`.
      num_classes: number of logits a pixel.
      output_stride: pixels of the image a pixel of the last stage's features: 8, 16 or 32, and
        up to 32 * 2**cascade.
      multi_grid: unit rates of the last stage and of its copies in a cascade, multiplied with the
        stage's own rate. Its first entries are taken where the stage has fewer units (ResNet-18
        has 2); it starts over where the stage has more.
      atrous_rates: of ASPP's 3x3 convolutions, at this output stride; none in a cascade.
      dilation_rule: which rates the stages get whose strides are removed; see `backbones.resnet`.
      residual: "post" (conv, norm, relu) or "pre" (norm, relu, conv: He et al. 2016).
      stem: "conv7x7" or "deep" (three 3x3).
      stride_place: the convolution of a bottleneck that is strided: its 3x3 "conv2" (v1.5) or the
        first 1x1 "conv1" (v1). A basic unit's is its first.
      width: multiplies all numbers of channels, which stay at least 8.
      aux_head: whether there is a second head, on the features of the last stage but one.
      dropout: probability before the logits, in [0, 1). In the auxiliary head it is at most 0.1,
        as torchvision has it.
      head_conv: whether a 3x3 convolution to 256 channels precedes the logits or a "plus"
        decoder, as in torchvision and not in the paper.
      decoder: how logits come to the image's size: "bilinear"; "transposed" (learned); or "plus",
        DeepLabv3+'s (arXiv 1802.02611): from features joined with those of stride 4.
      bn_momentum: decay of batch norm's running statistics; torch's 0.1 is 0.9 here.
      bn_epsilon: added to batch norm's variance.
      backbone_bn_momentum, backbone_bn_epsilon: those of the backbone, where they are not the
        heads'; None: the same.
      in_channels: of the images.
      dtype: of the computation; parameters, statistics and logits are float32 under "bfloat16",
        and float64 under "float64", which needs `jax_enable_x64`.
      image_pooling: whether ASPP has image-level features: the last row of the paper's table 5.
      head: a name in `HEADS`.
      cascade: None: ASPP follows the last stage (arXiv 1706.05587, section 3.3). 0 to 3: in its
        place so many copies of that stage do, block5 to block7 of section 3.2, whose features go
        to the logits as they are; 0 is the column "block4" of the paper's tables 2 and 3.
    """

    name: str
    backbone: str
    num_classes: int
    output_stride: int
    multi_grid: tuple[int, ...]
    atrous_rates: tuple[int, ...]
    dilation_rule: str
    aux_head: bool
    head_conv: bool
    dropout: float
    bn_momentum: float
    bn_epsilon: float = 1e-5
    backbone_bn_momentum: float | None = None
    backbone_bn_epsilon: float | None = None
    in_channels: int = 3
    residual: str = "post"
    stem: str = "conv7x7"
    stride_place: str = "conv2"
    width: float = 1.0
    decoder: str = "bilinear"
    dtype: str = "float32"
    cascade: int | None = None
    image_pooling: bool = True
    head: str = "aspp"

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
        """(field, what it must be, whether it is)."""
        for field, choices in CHOICES.items():
            yield field, _one_of(choices), getattr(self, field) in choices
        strides = output_strides(self.cascade) if self.cascade in CHOICES["cascade"] else ()
        yield "output_stride", _one_of(strides), not strides or self.output_stride in strides
        small = self.decoder != "transposed" or self.output_stride <= 32
        yield "decoder", "bilinear or plus at output strides past 32", small
        for field in ("num_classes", "in_channels"):
            yield field, "1 or more", getattr(self, field) >= 1
        yield "multi_grid", _RATES, _are_rates(self.multi_grid)
        if self.cascade is not None:
            yield "atrous_rates", "() in a cascade, which has no ASPP", not self.atrous_rates
        elif "atrous_rates" in options_of(HEADS[self.head]):
            yield "atrous_rates", _RATES, _are_rates(self.atrous_rates)
        yield from self._fixed("backbone", NEUTRAL, options_of(BACKBONES[self.backbone]))
        yield from self._fixed("head", HEAD_NEUTRAL, options_of(HEADS[self.head]))
        has_plus = "plus" in options_of(HEADS[self.head])
        yield (
            "decoder",
            f"bilinear or transposed: head {self.head}",
            self.decoder != "plus" or has_plus,
        )
        yield "width", "above 0", 0 < self.width < math.inf
        yield "dropout", "in [0, 1)", 0 <= self.dropout < 1
        for field in ("bn_momentum", "backbone_bn_momentum"):
            momentum = getattr(self, field)
            yield field, "in [0, 1]", momentum is None or 0 <= momentum <= 1
        for field in ("bn_epsilon", "backbone_bn_epsilon"):
            epsilon = getattr(self, field)
            yield field, "above 0", epsilon is None or epsilon > 0

    def _fixed(
        self, part: str, neutral: Mapping[str, Any], options: Iterable[str]
    ) -> Iterator[tuple[str, str, bool]]:
        """The fields that a part does not heed, which so must keep their neutral values."""
        why = f"the {part} {getattr(self, part)} has no such choice"
        for field, value in neutral.items():
            if field not in options:
                yield field, f"{value!r} ({why})", getattr(self, field) == value

    @property
    def backbone_bn(self) -> tuple[float, float]:
        """Momentum and epsilon of the backbone's batch norm."""
        momentum, epsilon = self.backbone_bn_momentum, self.backbone_bn_epsilon
        return (
            self.bn_momentum if momentum is None else momentum,
            self.bn_epsilon if epsilon is None else epsilon,
        )

    def at_output_stride(self, output_stride: int) -> Architecture:
        """The same parameters used at another output stride: ASPP's rates scale with features.

        Raises:
          UserError: a rate would not be whole, as 6 at output stride 16 for 64; or there is no
            such output stride.
        """
        numerators = [rate * self.output_stride for rate in self.atrous_rates]
        known = output_stride in output_strides(self.cascade)
        if known and any(n % output_stride for n in numerators):
            rates = ", ".join(f"{n / output_stride:g}" for n in numerators)
            raise UserError(
                f"atrous_rates {self.atrous_rates} at output stride {self.output_stride} would be "
                f"({rates}) at {output_stride}, which are not whole: give atrous_rates for "
                f"output stride {output_stride}"
            )
        scaled = tuple(n // max(output_stride, 1) for n in numerators)
        return dataclasses.replace(self, output_stride=output_stride, atrous_rates=scaled)


_RATES = "one or more whole rates of 1 or more"


def _are_rates(rates: tuple[Any, ...]) -> bool:
    return bool(rates) and all(isinstance(rate, int) and rate >= 1 for rate in rates)


def _one_of(choices: Iterable[Any]) -> str:
    return "one of " + ", ".join(map(str, choices))


# What each family sets; the rest are the defaults of `Architecture`.
_FAMILIES: dict[str, dict[str, Any]] = {
    # arXiv 1706.05587, section 4; batch norm's momentum: its section 4.1.
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
    # torchvision.models.segmentation.deeplabv3.
    "torchvision": {
        "output_stride": 8,
        "multi_grid": (1, 1, 1),
        "atrous_rates": (12, 24, 36),
        "dilation_rule": "torchvision",
        "aux_head": True,
        "head_conv": True,
        "dropout": 0.5,
        "bn_momentum": 0.9,
    },
}

# What a backbone sets in all families, and in one of them.
_BACKBONE_FIELDS: dict[str, dict[str, Any]] = {
    "mobilenet_v3_large": {"backbone_bn_momentum": 0.99, "backbone_bn_epsilon": 1e-3},
    # With the rates of ASPP that the ResNets have at output stride 8.
    "torchvision_mobilenet_v3_large": {"output_stride": 16},
}


def options_of(entry: Any) -> frozenset[str]:
    """The optional fields of an architecture that a registered backbone or head heeds."""
    return frozenset(getattr(entry, "options", ()))


class _Architectures(Mapping[str, Architecture]):
    """The families with every registered backbone: "paper_resnet101", "torchvision_resnet50"."""

    def __getitem__(self, name: str) -> Architecture:
        family, _, backbone = name.partition("_")
        if family not in _FAMILIES or backbone not in BACKBONES:
            raise KeyError(name)
        options = options_of(BACKBONES[backbone])
        fixed = {field: value for field, value in NEUTRAL.items() if field not in options}
        fields = _FAMILIES[family] | fixed
        fields |= _BACKBONE_FIELDS.get(backbone, {}) | _BACKBONE_FIELDS.get(name, {})
        return Architecture(name=name, backbone=backbone, num_classes=21, **fields)

    def __iter__(self) -> Iterator[str]:
        return (f"{family}_{backbone}" for family in _FAMILIES for backbone in BACKBONES)

    def __len__(self) -> int:
        return len(_FAMILIES) * len(BACKBONES)


ARCHITECTURES: Mapping[str, Architecture] = _Architectures()


def architecture(name: str, *, num_classes: int, **overrides: Any) -> Architecture:
    """A named architecture with some choices made otherwise.

    Args:
      name: a key of `ARCHITECTURES`.
      num_classes: number of logits a pixel.
      **overrides: fields of `Architecture`; None means the named one's own. Another
        `output_stride` without `atrous_rates` scales the rates, as `at_output_stride` does; a
        `cascade` has none. Another `bn_momentum` or `bn_epsilon` holds for the backbone too,
        unless it is given its own. The decoder "plus" has its own 3x3 convolutions: `head_conv` is
        then False unless given.

    Raises:
      UserError: an unknown name or field, or a value that cannot be.
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
    if chosen.get("decoder") == "plus":
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
