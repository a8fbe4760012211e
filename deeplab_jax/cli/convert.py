"""`deeplab-jax convert`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def convert(
    source: Annotated[str, typer.Argument(help="File, torchvision's name, checkpoint or workdir.")],
    destination: Annotated[str, typer.Argument(help="New folder, or file to write weights to.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no table of arrays.")] = False,
) -> None:
    """Convert torchvision's weights to a checkpoint, or a checkpoint to torchvision's format.

    Every array is used or listed as dropped; what does not fit is an error.

    Examples:

      deeplab-jax convert deeplabv3_resnet50_coco-cd0a2569.pth runs/coco

      deeplab-jax convert deeplabv3_resnet101 runs/coco101

      deeplab-jax convert runs/voc deeplab.safetensors
    """
    from deeplab_jax.weights.convert import convert

    done = convert(source, destination)
    console = Console(highlight=False, soft_wrap=True)
    if not quiet:
        console.print(_table(done.used, "from", "to"))
        if done.dropped:
            console.print(_table(done.dropped, "dropped", "because it"))
    for note in done.notes:
        console.print(note, markup=False)
    model = done.architecture
    console.print(
        f"{done.source.name}: {model.name}, {model.num_classes} classes, auxiliary head: "
        f"{'yes' if model.aux_head else 'no'}; {len(done.used)} arrays converted, "
        f"{len(done.dropped)} dropped",
        markup=False,
    )
    console.print(str(done.destination), markup=False)


def _table(rows: tuple[tuple[str, str], ...], *titles: str) -> Table:
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table
