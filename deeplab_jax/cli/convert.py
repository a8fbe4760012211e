"""`deeplab-jax convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from deeplab_jax.cli import options, outputs


def convert(
    source: options.Checkpoint,
    destination: Annotated[
        str,
        options.path_argument(
            "New folder for a checkpoint; or of a checkpoint: .pth or .safetensors file, or "
            "hf://org/name."
        ),
    ],
    family: Annotated[
        str,
        typer.Option(
            "--as",
            help="Whose names to read or write: torchvision, mmseg, smp, vainf, timm (backbone "
            "only); reading also hf, tf. Default: read what the names tell; write that of the "
            "architecture.",
        ),
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="FIELD=VALUE that a weights file does not tell: model.output_stride=16, "
            "model.multi_grid=1,2,4, model.atrous_rates=6,12,18, model.align_corners=true, "
            "data.mean=0.5,0.5,0.5; repeatable.",
        ),
    ] = None,
    classes: Annotated[str, options.path_option("File of class names, one per line.")] = "",
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Keep NaN and infinite weights.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no table of arrays.")] = False,
) -> None:
    """Convert weights of another codebase to a checkpoint, or a checkpoint to such a file.

    Reads DeepLabs of torchvision, mmsegmentation, segmentation_models.pytorch, VainF,
    transformers (MobileNetV2) and TFLite files of TensorFlow's, and folders as on the hub. Every
    array is converted or listed as dropped; an array without a counterpart is an error. What the
    file does not tell is printed.

    Examples:
      deeplab-jax convert deeplabv3_resnet50_coco-cd0a2569.pth runs/coco
      deeplab-jax convert deeplabv3_resnet101 runs/coco101
      deeplab-jax convert deeplabv3_r50-d16-mg124.pth runs/city --set model.output_stride=16 --set model.multi_grid=1,2,4
      deeplab-jax convert runs/voc deeplab.safetensors
      deeplab-jax convert runs/voc mmseg.pth --as mmseg
    """  # noqa: E501
    from deeplab_jax.weights.convert import convert

    done = convert(
        source,
        destination,
        family=family,
        settings=settings or (),
        classes=classes,
        allow_nonfinite=allow_nonfinite,
    )
    console = outputs.console()
    if not quiet:
        if done.used:
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
    console.print(*lines, sep="\n")
