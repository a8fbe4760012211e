"""Summarizes a model at an image size: strides, rates, fields of view, parameters, arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

from deeplab_jax.analysis.conv_trace import Convolution, convolutions
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel

# Column of the table of convolutions -> its cell for a convolution.
COLUMNS: dict[str, Callable[[Convolution], str]] = {
    "convolution": lambda conv: conv.name,
    "kernel": lambda conv: f"{conv.kernel_size}x{conv.kernel_size}{_groups(conv)}",
    "stride": lambda conv: str(conv.stride),
    "rate": lambda conv: str(conv.rate),
    "output": lambda conv: "x".join(map(str, conv.out_shape)),
    "output stride": lambda conv: str(conv.output_stride or "-"),
    "field of view": lambda conv: _field_of_view(conv),
    "valid taps": lambda conv: f"{100 * conv.valid_fraction:.1f} %",
    "parameters": lambda conv: format_count(conv.params),
    "GFLOP": lambda conv: f"{2 * conv.macs / 1e9:.3f}",
}
PART_COLUMNS = ("part", "convolutions", "parameters", "GFLOP", "of all", "valid taps")


@dataclasses.dataclass(frozen=True)
class ModuleSummary:
    """The convolutions of a part of a model, or of all of it."""

    name: str  # of the model's attribute that holds them, such as `backbone.layer4`
    convolutions: tuple[Convolution, ...]  # in the order of execution

    @property
    def params(self) -> int:
        return sum(conv.params for conv in self.convolutions)

    @property
    def macs(self) -> int:
        """Number of multiply-adds of all taps."""
        return sum(conv.macs for conv in self.convolutions)

    @property
    def valid_macs(self) -> int:
        """Number of multiply-adds of the taps that read the map."""
        return sum(conv.valid_macs for conv in self.convolutions)

    @property
    def rates(self) -> tuple[int, ...]:
        """Atrous rates of the kernels larger than 1x1, without repetitions of neighbours."""
        rates = [conv.rate for conv in self.convolutions if conv.kernel_size > 1]
        return tuple(rate for rate, _ in itertools.groupby(rates))


@dataclasses.dataclass(frozen=True)
class Summary:
    """A model at an image size."""

    architecture: Architecture
    height: int  # of the image, pixels
    width: int
    all: ModuleSummary
    other_params: int  # outside convolutions, such as a learned decoder's

    @property
    def params(self) -> int:
        return self.all.params + self.other_params

    @property
    def parts(self) -> list[ModuleSummary]:
        """The convolutions grouped by the first two names of their paths."""
        groups = itertools.groupby(
            self.all.convolutions, lambda conv: ".".join(conv.name.split(".")[:2])
        )
        return [ModuleSummary(name, tuple(convs)) for name, convs in groups]

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers of all tables; a multiply-add is two FLOPs."""
        return {
            "architecture": dataclasses.asdict(self.architecture),
            "height": self.height,
            "width": self.width,
            "params": self.params,
            "macs": self.all.macs,
            "flops": 2 * self.all.macs,
            "valid_macs": self.all.valid_macs,
            "valid_flops": 2 * self.all.valid_macs,
            "convolutions": [
                dataclasses.asdict(conv)
                | {
                    "valid_share": conv.valid_fraction,
                    "macs": conv.macs,
                    "flops": 2 * conv.macs,
                    "valid_macs": conv.valid_macs,
                }
                for conv in self.all.convolutions
            ],
        }


def summarize(architecture: Architecture, height: int, width: int | None = None) -> Summary:
    """Summarizes a model by tracing it, see `convolutions`; nothing is computed."""
    model = FunctionalModel(architecture)
    every = ModuleSummary("all", tuple(convolutions(model, height, width)))
    params = sum(math.prod(leaf.shape) for leaf in model.abstract.params.values())
    return Summary(architecture, height, width or height, every, params - every.params)


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """Formats a row of `COLUMNS` per convolution."""
    return [tuple(cell(conv) for cell in COLUMNS.values()) for conv in summary.all.convolutions]


def part_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Formats a row of `PART_COLUMNS` per part."""
    return [
        (
            part.name,
            str(len(part.convolutions)),
            format_count(part.params),
            f"{2 * part.macs / 1e9:.3f}",
            f"{100 * part.macs / summary.all.macs:.1f} %",
            f"{100 * part.valid_macs / part.macs:.1f} %",
        )
        for part in summary.parts
    ]


def totals(summary: Summary) -> list[tuple[str, str]]:
    """Formats (name, value) pairs for the whole model."""
    macs, valid = summary.all.macs, summary.all.valid_macs
    other = f", {format_count(summary.other_params)} of them in no convolution"
    return [
        ("model", describe(summary.architecture)),
        ("image", f"{summary.height}x{summary.width}x{summary.architecture.in_channels}"),
        ("parameters", format_count(summary.params) + (other if summary.other_params else "")),
        ("GFLOP", f"{2 * macs / 1e9:.3f}  (a multiplication and an addition: two; all taps)"),
        (
            "of valid taps",
            f"{2 * valid / 1e9:.3f}  ({100 * valid / macs:.1f} %: the others read padding)",
        ),
        ("G multiply-adds", f"{macs / 1e9:.3f}  (what torchvision publishes as GFLOPS)"),
    ]


def describe(architecture: Architecture) -> str:
    """Describes an architecture in one line."""
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


def markdown_table(columns: Collection[str], lines: list[tuple[str, ...]]) -> str:
    """Formats a Markdown table; all columns but the first are right-aligned."""
    rule = ("---", *["---:"] * (len(columns) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *lines))


def _field_of_view(conv: Convolution) -> str:
    """Formats a side in pixels, "image" after pooling, or both."""
    if conv.field_of_view is None:
        return "image"
    return f"{conv.field_of_view}{' + image' if conv.sees_image else ''}"


def format_count(number: int) -> str:
    """Formats an integer with spaces between thousands."""
    return f"{number:,}".replace(",", " ")


def _groups(conv: Convolution) -> str:
    if conv.groups == 1:
        return ""
    return " depthwise" if conv.groups == conv.in_shape[2] else f" / {conv.groups}"
