"""`deeplab-jax export`."""

from __future__ import annotations

from typing import Annotated

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError

ANY = "symbolic"


def export(
    checkpoint: options.Checkpoint,
    destination: Annotated[str, options.path_argument("File to write: OUT.stablehlo or OUT.onnx.")],
    height: Annotated[str, typer.Option(help="Height of images, pixels; symbolic: any.")] = ANY,
    width: Annotated[str, typer.Option(help="Width of images, pixels; symbolic: any.")] = ANY,
    batch: Annotated[str, typer.Option(help="Number of images; symbolic: any.")] = ANY,
    output: Annotated[str, typer.Option(help="ids, probabilities or logits.")] = "ids",
    platforms: Annotated[
        str, typer.Option(help="Platforms that a StableHLO file runs on; must include cpu.")
    ] = "cpu,cuda,tpu",
    layout: Annotated[
        str,
        typer.Option(help="Axes of images, probabilities and logits in ONNX: nhwc or nchw."),
    ] = "nhwc",
) -> None:
    """Write a model as StableHLO or ONNX, to run without this package.

    The file includes pre- and postprocessing: it takes uint8 images and returns class ids (or
    probabilities, or logits) at their size. It is then loaded and compared with the model; if the
    results differ, it is deleted.

    Examples:
      deeplab-jax export runs/voc voc.stablehlo
      deeplab-jax export runs/voc voc.onnx --layout nchw --output probabilities
      deeplab-jax export runs/voc voc.onnx --height 512 --width 1024 --batch 1
    """
    from deeplab_jax.export.export import export

    done = export(
        checkpoint,
        destination,
        height=_parse_size("--height", height),
        width=_parse_size("--width", width),
        batch=_parse_size("--batch", batch),
        output=output,
        platforms=[name.strip() for name in platforms.split(",")],
        layout=layout,
    )
    limit = f"difference from the model (limit {done.limit:g})"
    columns = ("compared on", "images x height x width", limit, "same class")
    rows = [
        (one.images, "x".join(map(str, one.shape)), f"{one.difference:.1e}", f"{one.agreement:.4%}")
        for one in done.comparisons
    ]
    console = outputs.console()
    console.print(outputs.table(columns, rows))
    if done.nodes:
        parts = ", ".join(f"{count} {name}" for name, count in done.nodes.items())
        console.print(f"{sum(done.nodes.values())} nodes: {parts}")
    console.print(f"{done.path}: {done.num_bytes / 1e6:.1f} MB", markup=False)


def _parse_size(option: str, text: str) -> int | None:
    if text == ANY:
        return None
    if not text.isdecimal():
        raise UserError(f"{option} must be a whole number or {ANY}, got {text!r}")
    return int(text)
