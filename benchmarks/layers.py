"""Measures each convolution of a case, alternating with PyTorch's, and the rest of the program.

    python benchmarks/layers.py                          # the first case of benchmarks.speed
    python benchmarks/layers.py "train resnet50 os8" --json layers.json
    python benchmarks/layers.py --recorded layers.json   # prints recorded tables
    python benchmarks/layers.py "train resnet101 os16 16x" --bounds 731e12 3.35e12   # only bounds

Convolutions of one shape are measured once and counted as often as they occur; in a training step,
forward pass and gradients are measured together. The bound is the roofline, the larger of two
times: the arithmetic of the taps on the map at the speed of the machine's best matrix product, and
reading or writing each map and kernel once at the speed of a large copy. "what is left" is the
program without its convolutions: batch norm, relu, pooling, resizing, the loss, the optimizer.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deeplab_jax.analysis.conv_trace import Convolution, convolutions
from deeplab_jax.inference.compilation import ONEDNN_OPTIONS, has_onednn
from deeplab_jax.models.ops.atrous_conv import atrous_conv
from speed import measure, ours, theirs
from speed.cases import Built, Case, cases

_THEIR_MODES = {"float32": "channels_last", "bfloat16": "channels_last, autocast"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Properties that convolutions measured together have in common.

    Attributes:
      channels: of the input and of the output.
      reads_image: whether it is the first of a model, whose input needs no gradient.
    """

    kernel_size: int
    channels: tuple[int, int]
    map: tuple[int, int]
    stride: int
    rate: int
    reads_image: bool

    @classmethod
    def of(cls, conv: Convolution) -> Shape:
        height, width, channels = conv.in_shape
        out = conv.out_shape[2]
        first = conv.output_stride == conv.stride
        return cls(
            conv.kernel_size, (channels, out), (height, width), conv.stride, conv.rate, first
        )

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        rate = f", rate {self.rate}" if self.rate > 1 else ""
        channels, map_ = " -> ".join(map(str, self.channels)), "x".join(map(str, self.map))
        return f"{self.kernel_size}x{self.kernel_size}, {channels}, {map_}{stride}{rate}"


def bound_ms(conv: Convolution, case: Case, peak: float, bandwidth: float) -> float:
    """Returns the roofline of a convolution, or of it and its gradients, in milliseconds.

    Args:
      conv: the convolution, for one image.
      case: gives the batch size, the dtype, and whether gradients are computed.
      peak: speed of matrix products, FLOP/s.
      bandwidth: of memory, bytes/s.
    """
    passes = 1 if case.kind == "forward" else 2 if Shape.of(conv).reads_image else 3
    seconds = 2.0 * case.batch * passes * conv.valid_macs / peak
    kernel = conv.kernel_size**2 * conv.in_shape[2] // conv.groups * conv.out_shape[2]
    maps = case.batch * (math.prod(conv.in_shape) + math.prod(conv.out_shape))
    moved = jnp.dtype(case.dtype).itemsize * passes * (maps + kernel)
    return 1e3 * max(seconds, moved / bandwidth)


def our_side(conv: Convolution, case: Case) -> Built:
    shape = Shape.of(conv)
    # The same choice as in `inference.compilation.jit_inference`.
    by_onednn = case.kind == "forward" and jax.default_backend() == "cpu" and has_onednn()

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return atrous_conv(
            x,
            kernel,
            strides=shape.stride,
            kernel_dilation=shape.rate,
            method="native" if by_onednn else None,
        )

    def step(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
        if shape.reads_image:
            y, gradient = jax.vjp(lambda kernel: forward(x, kernel), kernel)
        else:
            y, gradient = jax.vjp(forward, x, kernel)
        return y, gradient(cotangent)

    keys = jax.random.split(jax.random.key(0), 3)
    side, (c_in, c_out) = shape.kernel_size, shape.channels
    shapes = [
        (case.batch, *conv.in_shape),
        (side, side, c_in // conv.groups, c_out),
        (case.batch, *conv.out_shape),
    ]
    x, kernel, cotangent = (
        jax.random.normal(key, shape, case.dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    if case.kind == "forward":
        options = ONEDNN_OPTIONS if by_onednn else None
        compiled = jax.jit(forward, compiler_options=options).lower(x, kernel).compile()
        return measure.running(compiled, x, kernel)
    return measure.running(
        jax.jit(step).lower(x, kernel, cotangent).compile(), x, kernel, cotangent
    )


def their_side(conv: Convolution, case: Case) -> Built:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    shape = Shape.of(conv)
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, case.dtype)}
    side, (c_in, c_out) = shape.kernel_size, shape.channels
    layout = torch.channels_last

    def random(*sizes: int) -> Any:
        return torch.randn(*sizes, **options).contiguous(memory_format=layout)

    x = random(case.batch, c_in, *conv.in_shape[:2])
    kernel = random(c_out, c_in // conv.groups, side, side)
    cotangent = random(case.batch, c_out, *conv.out_shape[:2])
    trains = case.kind == "train"
    kernel.requires_grad_(trains)
    x.requires_grad_(trains and not shape.reads_image)
    wanted = [leaf for leaf in (x, kernel) if leaf.requires_grad]

    def start() -> None:
        with torch.set_grad_enabled(trains):
            y = torch.nn.functional.conv2d(
                x,
                kernel,
                stride=shape.stride,
                padding=shape.rate * (side // 2),
                dilation=shape.rate,
                groups=conv.groups,
            )
            if trains:
                torch.autograd.grad(y, wanted, cotangent)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return Built(start, wait, 0.0, None)


def by_shape(case: Case) -> dict[Shape, list[Convolution]]:
    """Groups the convolutions of a case by shape."""
    found: dict[Shape, list[Convolution]] = collections.defaultdict(list)
    for conv in convolutions(ours.model_of(case), case.height, case.width):
        found[Shape.of(conv)].append(conv)
    return found


def bounds_table(case: Case, peak: float, bandwidth: float) -> Table:
    """Returns the bounds of the convolutions on a machine, largest first, and their sum."""
    result = Table(title=f"{case.name}: bounds, ms", box=None)
    result.add_column("convolution")
    for name in ("times", "one", "all"):
        result.add_column(name, justify="right")
    rows = [
        (str(shape), len(convs), bound_ms(convs[0], case, peak, bandwidth))
        for shape, convs in by_shape(case).items()
    ]
    for name, count, bound in sorted(rows, key=lambda row: -row[1] * row[2]):
        result.add_row(name, str(count), f"{bound:.2f}", f"{count * bound:.2f}")
    result.add_section()
    total = sum(count * bound for _, count, bound in rows)
    result.add_row("all convolutions", "", "", f"{total:.2f}")
    return result


def measured(case: Case, *, turns: int) -> dict[str, Any]:
    """Measures a case; returns its rows, slowest first, and the conditions.

    Args:
      case: the workload.
      turns: runs of each package, for each convolution and for the full program.
    """
    peak, copied = measure.matmul_peak(case.dtype), measure.copy_bandwidth()
    rows = []
    console = Console(stderr=True)
    for shape, convs in track(by_shape(case).items(), "convolutions", console=console):
        sides = our_side(convs[0], case), their_side(convs[0], case)
        mine, their = (1e3 * statistics.median(t) for t in measure.alternate(*sides, turns))
        rows.append(
            {
                "convolution": str(shape),
                "first": convs[0].name,
                "count": len(convs),
                "ours_ms": mine,
                "theirs_ms": their,
                "bound_ms": bound_ms(convs[0], case, peak, copied),
            }
        )
    rows.sort(key=lambda row: -row["count"] * row["ours_ms"])
    mode = _THEIR_MODES[case.dtype]
    programs = ours.build(case), theirs.build(case, mode)
    our_ms, their_ms = (1e3 * statistics.median(t) for t in measure.alternate(*programs, turns))
    return {
        "case": case.name,
        **measure.conditions(),
        "matmul_peak_flops": peak,
        "copy_bytes_per_second": copied,
        "rows": rows,
        "ours_whole_ms": our_ms,
        "theirs_whole_ms": their_ms,
        "theirs": mode,
    }


def table(found: dict[str, Any]) -> Table:
    """Returns the convolutions, slowest first, their sum, and the rest of the program."""
    flops, copied = found["matmul_peak_flops"] / 1e9, found["copy_bytes_per_second"] / 1e9
    result = Table(
        title=f"{found['case']}: ms; bound: {flops:.0f} GFLOP/s, {copied:.0f} GB/s", box=None
    )
    result.add_column("convolution")
    for name in ("times", "bound", "ours", "theirs", "ratio", "all: bound", "ours", "theirs"):
        result.add_column(name, justify="right")
    sums = dict.fromkeys(("bound_ms", "ours_ms", "theirs_ms"), 0.0)
    for row in found["rows"]:
        all_of = {key: row["count"] * row[key] for key in sums}
        sums = {key: sums[key] + all_of[key] for key in sums}
        one = [f"{row[key]:.1f}" for key in sums]
        result.add_row(row["convolution"], str(row["count"]), *one, *_ratio_and_times(all_of))
    none = [""] * 4
    result.add_section()
    result.add_row("all convolutions", *none, *_ratio_and_times(sums))
    whole = {"ours_ms": found["ours_whole_ms"], "theirs_ms": found["theirs_whole_ms"]}
    left = {key: whole[key] - sums[key] for key in whole}
    result.add_row("what is left", *none, *_ratio_and_times(left))
    result.add_row(f"whole (theirs: {found['theirs']})", *none, *_ratio_and_times(whole))
    return result


def _ratio_and_times(times: dict[str, float]) -> list[str]:
    bound = f"{times['bound_ms']:.0f}" if "bound_ms" in times else ""
    ours_ms, theirs_ms = times["ours_ms"], times["theirs_ms"]
    # "what is left" is a difference, which noise can make negative.
    ratio = f"{theirs_ms / ours_ms:.2f}" if ours_ms > 0 else ""
    return [ratio, bound, f"{ours_ms:.0f}", f"{theirs_ms:.0f}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = cases(jax.default_backend(), quick=False)
    parser.add_argument(
        "case", nargs="?", default=known[0].name, help="name of a case, or a part of it"
    )
    parser.add_argument(
        "--bounds",
        nargs=2,
        type=float,
        metavar=("FLOPS", "BYTES"),
        help="only print the bounds, for a machine with these FLOP/s and bytes/s",
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="runs of each package, for each convolution"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    parser.add_argument(
        "--recorded", type=pathlib.Path, help="print the tables of a file that --json wrote"
    )
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if args.turns < 1:
        parser.error(f"--turns must be 1 or more, got {args.turns}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    if args.recorded is not None:
        if not args.recorded.is_file():
            parser.error(f"--recorded: there is no file {args.recorded}")
        console.print(table(json.loads(args.recorded.read_text())))
        return 0
    if args.bounds is not None:
        if min(args.bounds) <= 0:
            parser.error("--bounds must be above 0")
        known = (*cases("cpu", quick=False), *cases("gpu", quick=False))
    chosen = [case for case in known if args.case in case.name]
    if not chosen:
        parser.error(f"no case contains {args.case!r}; cases: {', '.join(c.name for c in known)}")
    if args.bounds is not None:
        console.print(bounds_table(chosen[0], *args.bounds))
        return 0
    found = measured(chosen[0], turns=args.turns)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
