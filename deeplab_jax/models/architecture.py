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
    "stride_place": "conv2",
    "cascade": None,
    "width": 1.0,
}
# The same for heads.
HEAD_NEUTRAL: dict[str, Any] = {"atrous_rates": (), "image_pooling": True, "head_conv": False}

_DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The description of a model.

    Attributes:
      name: key of the entry in `ARCHITECTURES` that this one is derived from.
      backbone: a name in `BACKBONES`.
      num_classes: number of classes, and so of logits per pixel.
      output_stride: image size divided by the size of the last features: 8, 16 or 32, or up to
        32 * 2**cascade.
      multi_grid: unit rates of the blocks of the last stage and its copies in a cascade, multiplied
        by the dilation of the stage. A stage with fewer blocks (ResNet-18 has 2) uses the first
        entries; a stage with more repeats them.
      atrous_rates: rates of ASPP's 3x3 convolutions at this output stride; () in a cascade.
      dilation_rule: "paper" or "torchvision": the dilations of stages whose strides are removed;
        see `backbones.resnet`.
      residual: "post" (conv, norm, relu) or "pre" (norm, relu, conv: He et al. 2016).
      stem: "conv7x7" or "deep" (three 3x3).
      stride_place: the convolution of a bottleneck that has the stride: the 3x3 "conv2" (v1.5) or
        the first 1x1 "conv1" (v1). In a basic block it is always the first.
      width: multiplies all numbers of channels, which stay at least 8.
      aux_head: whether there is a second head, on the features of the second to last stage.
      dropout: probability before the logits, in [0, 1). In the auxiliary head it is at most 0.1,
        as in torchvision.
      head_conv: whether a 3x3 convolution to 256 channels precedes the logits or a "plus"
        decoder, as in torchvision and not in the paper.
      decoder: how logits are brought to the image's size: "bilinear"; "transposed" (learned); or
        "plus" (DeepLabv3+, arXiv 1802.02611), which joins features with those of stride 4.
      bn_momentum: decay of batch norm's running statistics; torch's 0.1 is 0.9 here.
      bn_epsilon: added to batch norm's variance.
      backbone_bn_momentum, backbone_bn_epsilon: the same for the backbone; None means as in the
        heads.
      in_channels: number of channels of the images.
      dtype: dtype of the computation. Parameters, statistics and logits are float32 under
        "bfloat16", and float64 under "float64", which needs `jax_enable_x64`.
      image_pooling: whether ASPP has image-level features: the last row of the paper's table 5.
      head: a name in `HEADS`.
      cascade: None for ASPP behind the last stage (arXiv 1706.05587, section 3.3). Otherwise the
        number of copies of the last stage, 0 to 3, that replace ASPP: block5 to block7 of section
        3.2. 0 is the column "block4" of the paper's tables 2 and 3.
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
        """Yields (field, what it must be, whether it is that)."""
        yield from model_rules(self)
        yield "dtype", spell_choices(_DTYPES), self.dtype in _DTYPES
        small = self.decoder != "transposed" or self.output_stride <= 32
        yield "decoder", "bilinear or plus at output strides above 32", small
        options = options_of(HEADS[self.head])
        if self.cascade is None and "atrous_rates" in options:
            yield "atrous_rates", "one or more rates", bool(self.atrous_rates)
        has_decoder = self.decoder != "plus" or "plus" in options
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

        The parameters have the same names and shapes.

        Raises:
          UserError: the output stride is not supported, or a rate would not be whole, as 6 at
            output stride 16 scaled to 64.
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


# Fields that the families set; the others have the defaults of `Architecture`. "paper" is arXiv
# 1706.05587, section 4, with batch norm's momentum of section 4.1; "torchvision" is
# torchvision.models.segmentation.deeplabv3.
_FAMILIES = ("paper", "torchvision")
_FAMILY_FIELDS: dict[str, tuple[Any, Any]] = {
    "output_stride": (16, 8),
    "multi_grid": ((1, 2, 4), (1, 1, 1)),
    "atrous_rates": ((6, 12, 18), (12, 24, 36)),
    "dilation_rule": ("paper", "torchvision"),
    "aux_head": (False, True),
    "head_conv": (False, True),
    "dropout": (0.1, 0.5),
    "bn_momentum": (0.9997, 0.9),
}

# Fields that a backbone sets in all families, and that a named architecture sets.
_BACKBONE_FIELDS: dict[str, dict[str, Any]] = {
    "mobilenet_v3_large": {"backbone_bn_momentum": 0.99, "backbone_bn_epsilon": 1e-3},
    # With ASPP's rates of the ResNets at output stride 8.
    "torchvision_mobilenet_v3_large": {"output_stride": 16},
}


def options_of(entry: Any) -> frozenset[str]:
    """Returns the optional fields that a registered backbone or head supports."""
    return frozenset(getattr(entry, "options", ()))


class _Architectures(Mapping[str, Architecture]):
    """Each family with each registered backbone, such as "paper_resnet101"."""

    def __getitem__(self, name: str) -> Architecture:
        family, _, backbone = name.partition("_")
        if family not in _FAMILIES or backbone not in BACKBONES:
            raise KeyError(name)
        options = options_of(BACKBONES[backbone])
        column = _FAMILIES.index(family)
        fields = {field: values[column] for field, values in _FAMILY_FIELDS.items()}
        fields |= {field: v for field, v in BACKBONE_NEUTRAL.items() if field not in options}
        fields |= _BACKBONE_FIELDS.get(backbone, {}) | _BACKBONE_FIELDS.get(name, {})
        return Architecture(name=name, backbone=backbone, num_classes=21, **fields)

    def __iter__(self) -> Iterator[str]:
        return (f"{family}_{backbone}" for family in _FAMILIES for backbone in BACKBONES)

    def __len__(self) -> int:
        return len(_FAMILIES) * len(BACKBONES)


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
