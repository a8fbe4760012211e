"""`deeplab-jax export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from deeplab_jax.export.export import Export

ANY = "symbolic"


def export(
    checkpoint: Annotated[str, typer.Argument(help="Workdir, checkpoint or torchvision's file.")],
    destination: Annotated[str, typer.Argument(help="File to write: OUT.stablehlo or OUT.onnx.")],
    height: Annotated[str, typer.Option(help="Of the images, pixels, or symbolic: any.")] = ANY,
    width: Annotated[str, typer.Option(help="Likewise.")] = ANY,
    batch: Annotated[str, typer.Option(help="Number of images, or symbolic: any.")] = ANY,
    output: Annotated[str, typer.Option(help="ids, probabilities or logits.")] = "ids",
    platforms: Annotated[
        str, typer.Option(help="Of StableHLO, with cpu among them.")
    ] = "cpu,cuda,tpu",
    layout: Annotated[
        str, typer.Option(help="nhwc or nchw: of ONNX's images, probabilities and logits.")
    ] = "nhwc",
) -> None:
    """Write a model as StableHLO or ONNX, to run without this package.

    Pre- and post-processing are inside: uint8 images in, class ids (or probabilities, or logits) at
    their size out. The file is loaded and compared with the model; one that differs is not kept.

    Examples:

      deeplab-jax export runs/voc voc.stablehlo

      deeplab-jax export runs/voc voc.onnx --layout nchw --output probabilities

      deeplab-jax export runs/voc voc.onnx --height 512 --width 1024 --batch 1
    """
    from deeplab_jax.export.export import export

    done = export(
        checkpoint,
        destination,
        height=_size("--height", height),
        width=_size("--width", width),
        batch=_size("--batch", batch),
        output=output,
        platforms=[name.strip() for name in platforms.split(",")],
        layout=layout,
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(done))
    if done.nodes:
        total = sum(done.nodes.values())
        parts = ", ".join(f"{count} {name}" for name, count in done.nodes.items())
        console.print(f"{total} nodes: {parts}")
    console.print(f"{done.path}: {done.num_bytes / 1e6:.1f} MB", markup=False)


def _size(option: str, text: str) -> int | None:
    from deeplab_jax.utils.errors import UserError

    if text == ANY:
        return None
    if not text.isdecimal():
        raise UserError(f"{option} must be a whole number or {ANY}, got {text!r}")
    return int(text)


def _table(done: Export) -> Table:
    limit = f"difference from the model (limit {done.limit:g})"
    table = Table("compared on", "images x height x width", limit, "same class", box=None)
    for one in done.comparisons:
        size = "x".join(map(str, one.shape))
        table.add_row(one.images, size, f"{one.difference:.1e}", f"{one.agreement:.4%}")
    return table
