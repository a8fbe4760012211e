"""What a model is at a size of image: strides, rates, fields of view, parameters, arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from deeplab_jax.analysis.conv_trace import Convolution, convolutions
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel

COLUMNS = (
    *("convolution", "kernel", "stride", "rate", "output", "output stride", "field of view"),
    *("valid taps", "parameters", "GFLOP"),
)
PART_COLUMNS = ("part", "convolutions", "parameters", "GFLOP", "of all", "valid taps")


@dataclasses.dataclass(frozen=True)
class ModuleSummary:
    """Some convolutions of a model: those under one of its attributes, or all.

    Attributes:
      name: of the attribute, such as `backbone.layer4`.
      convolutions: in the order of execution.
    """

    name: str
    convolutions: tuple[Convolution, ...]

    @property
    def params(self) -> int:
        return sum(conv.params for conv in self.convolutions)

    @property
    def macs(self) -> int:
        """Multiply-adds of all taps."""
        return sum(conv.macs for conv in self.convolutions)

    @property
    def valid_macs(self) -> int:
        """Multiply-adds of the taps that fall on the map."""
        return sum(conv.valid_macs for conv in self.convolutions)

    @property
    def rates(self) -> tuple[int, ...]:
        """Of the kernels larger than 1x1, in the order of execution, repetitions left out."""
        rates = [conv.rate for conv in self.convolutions if conv.kernel_size > 1]
        return tuple(rate for rate, _ in itertools.groupby(rates))


@dataclasses.dataclass(frozen=True)
class Summary:
    """A model at a size of image.

    Attributes:
      architecture: of the model.
      height, width: of the image, pixels.
      all: every convolution.
      other_params: number of parameters that belong to none, as those of a learned decoder.
    """

    architecture: Architecture
    height: int
    width: int
    all: ModuleSummary
    other_params: int

    @property
    def params(self) -> int:
        """Number of the model's parameters."""
        return self.all.params + self.other_params

    @property
    def parts(self) -> list[ModuleSummary]:
        """By the first two names of each path, in the order of execution."""
        groups = itertools.groupby(
            self.all.convolutions, lambda conv: ".".join(conv.name.split(".")[:2])
        )
        return [ModuleSummary(name, tuple(convs)) for name, convs in groups]

    def to_json(self) -> dict[str, Any]:
        """All that the tables hold, as numbers; a FLOP is a multiplication or an addition."""
        return {
            "architecture": dataclasses.asdict(self.architecture),
            "height": self.height,
            "width": self.width,
            "params": self.params,
            "macs": self.all.macs,
            "flops": 2 * self.all.macs,
            "valid_macs": self.all.valid_macs,
            "valid_flops": 2 * self.all.valid_macs,
            "convolutions": [_conv_json(conv) for conv in self.all.convolutions],
        }


def summarize(architecture: Architecture, height: int, width: int | None = None) -> Summary:
    """Reads a model from the program that it is traced to; nothing is computed.

    Args:
      architecture: of the model.
      height, width: of the image, pixels; no width: the same.

    Raises:
      ValueError: a side is below 1.
    """
    model = FunctionalModel(architecture)
    every = ModuleSummary("all", tuple(convolutions(model, height, width)))
    params = sum(math.prod(leaf.shape) for leaf in model.abstract.params.values())
    return Summary(architecture, height, width or height, every, params - every.params)


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """A line a convolution, under `COLUMNS`."""
    return [
        (
            conv.name,
            _kernel(conv),
            str(conv.stride),
            str(conv.rate),
            "x".join(map(str, conv.out_shape)),
            "-" if conv.output_stride is None else str(conv.output_stride),
            field_of_view(conv),
            f"{100 * conv.valid_share:.1f} %",
            count(conv.params),
            f"{2 * conv.macs / 1e9:.3f}",
        )
        for conv in summary.all.convolutions
    ]


def part_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A line a part, under `PART_COLUMNS`."""
    return [
        (
            part.name,
            str(len(part.convolutions)),
            count(part.params),
            f"{2 * part.macs / 1e9:.3f}",
            f"{100 * part.macs / summary.all.macs:.1f} %",
            f"{100 * part.valid_macs / part.macs:.1f} %",
        )
        for part in summary.parts
    ]


def totals(summary: Summary) -> list[tuple[str, str]]:
    """What holds of the whole model: names and values."""
    macs, valid = summary.all.macs, summary.all.valid_macs
    other = f", {count(summary.other_params)} of them in no convolution"
    return [
        ("model", describe(summary.architecture)),
        ("image", f"{summary.height}x{summary.width}x{summary.architecture.in_channels}"),
        ("parameters", count(summary.params) + (other if summary.other_params else "")),
        ("GFLOP", f"{2 * macs / 1e9:.3f}  (a multiplication and an addition: two; all taps)"),
        (
            "of valid taps",
            f"{2 * valid / 1e9:.3f}  ({100 * valid / macs:.1f} %: the others read padding)",
        ),
        ("G multiply-adds", f"{macs / 1e9:.3f}  (what torchvision publishes as GFLOPS)"),
    ]


def describe(architecture: Architecture) -> str:
    """What tells a model from another, in a line."""
    rates = ", ".join(map(str, architecture.atrous_rates))
    head = f"atrous rates ({rates})"
    if architecture.cascade is not None:
        head = f"cascade of {architecture.cascade}"
    elif architecture.head != "aspp":
        head = f"head {architecture.head}"
    grid = ", ".join(map(str, architecture.multi_grid))
    return (
        f"{architecture.name}, {architecture.num_classes} classes, output stride "
        f"{architecture.output_stride}, multi-grid ({grid}), {head}, dilation rule "
        f"{architecture.dilation_rule}, auxiliary head: {'yes' if architecture.aux_head else 'no'}"
    )


def markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A table whose columns but the first are aligned right."""
    rule = ("---", *["---:"] * (len(columns) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *lines))


def field_of_view(conv: Convolution) -> str:
    """A side in pixels, "image" where it was pooled, or both."""
    if conv.field_of_view is None:
        return "image"
    return f"{conv.field_of_view}{' + image' if conv.sees_image else ''}"


def count(number: int) -> str:
    """A whole number, its thousands apart."""
    return f"{number:,}".replace(",", " ")


def _kernel(conv: Convolution) -> str:
    side = f"{conv.kernel_size}x{conv.kernel_size}"
    if conv.groups == 1:
        return side
    return f"{side} " + ("depthwise" if conv.groups == conv.in_shape[2] else f"/ {conv.groups}")


def _conv_json(conv: Convolution) -> dict[str, Any]:
    return dataclasses.asdict(conv) | {
        "valid_share": conv.valid_share,
        "macs": conv.macs,
        "flops": 2 * conv.macs,
        "valid_macs": conv.valid_macs,
    }
