"""`deeplab-jax convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from deeplab_jax.cli import options, outputs


def convert(
    source: options.Checkpoint,
    destination: Annotated[
        str, options.path_argument("New folder for a checkpoint, or .pth or .safetensors file.")
    ],
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no table of arrays.")] = False,
) -> None:
    """Convert torchvision's weights to a checkpoint, or a checkpoint to torchvision's format.

    Every array is converted or listed as dropped; an array without a counterpart is an error.

    Examples:
      deeplab-jax convert deeplabv3_resnet50_coco-cd0a2569.pth runs/coco
      deeplab-jax convert deeplabv3_resnet101 runs/coco101
      deeplab-jax convert runs/voc deeplab.safetensors
    """
    from deeplab_jax.weights.convert import convert

    done = convert(source, destination)
    console = outputs.console()
    if not quiet:
        console.print(outputs.table(("from", "to"), done.used, num_text_columns=2))
        if done.dropped:
            console.print(outputs.table(("dropped", "reason"), done.dropped, num_text_columns=2))
    model = done.architecture
    lines = [
        *done.notes,
        f"{done.source.name}: {model.name}, {model.num_classes} classes, auxiliary head: "
        f"{'yes' if model.aux_head else 'no'}; {len(done.used)} arrays converted, "
        f"{len(done.dropped)} dropped",
        str(done.destination),
    ]
    console.print(*lines, sep="\n", markup=False)
