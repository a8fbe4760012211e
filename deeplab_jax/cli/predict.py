"""`deeplab-jax predict`."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from deeplab_jax.cli import outputs

if TYPE_CHECKING:
    import numpy as np

    from deeplab_jax.data.labels import LabelSet
    from deeplab_jax.inference.files import Predicted


def predict(
    checkpoint: Annotated[str, typer.Argument(help="Workdir, checkpoint or torchvision's file.")],
    images: Annotated[list[str], typer.Argument(help="Files, folders (all below) or patterns.")],
    out: Annotated[str, typer.Option(help="Folder for the results; made if absent.")],
    heatmap: Annotated[
        list[str] | None,
        typer.Option(help="Draw where this class (name or id) lights up; may be repeated."),
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Draw the image beside its overlay too.")
    ] = False,
    opacity: Annotated[
        float, typer.Option(min=0, max=1, help="Of class colours over the image.")
    ] = 0.5,
    output_stride: Annotated[
        int | None,
        typer.Option(help="8, 16 or 32; more with a cascade. Default: the checkpoint's."),
    ] = None,
    scales: Annotated[
        str, typer.Option(help="Average over these: 0.5,0.75,1,1.25,1.5,1.75.")
    ] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Average over mirror images too.")] = False,
    window: Annotated[
        int | None,
        typer.Option(
            help="Side of a sliding window; 0: whole images. "
            "Default: 1025 for images of more than 4 million pixels."
        ),
    ] = None,
    json_file: Annotated[
        str, typer.Option("--json", help="Write class areas and file names here; -: to stdout.")
    ] = "",
) -> None:
    """Segment images: class ids, overlays with a legend, and the area of each class.

    Of each image NAME, OUT gets NAME_ids.png, a palette PNG whose values are class ids, and
    NAME_overlay.png. Files that are no images are told at the end, when all others are done.

    Examples:

      deeplab-jax predict runs/voc photo.jpg --out predicted

      deeplab-jax predict runs/voc photos/ --out predicted --side-by-side --json areas.json

      deeplab-jax predict deeplabv3_resnet50_coco-cd0a2569.pth 'photos/*.jpg' --out predicted
      --heatmap dog --heatmap person

      deeplab-jax predict runs/voc huge.tif --out predicted --window 1025 --scales 0.75,1 --flip
    """
    from deeplab_jax.data.io.reading import raise_together, watch
    from deeplab_jax.inference import files as prediction
    from deeplab_jax.inference import segmenter
    from deeplab_jax.utils.errors import UserError

    folder = pathlib.Path(out)
    jobs = prediction.find(images, folder)
    prediction.prepare_folder(folder)
    outputs.check_json(json_file)
    model = segmenter.load(
        checkpoint,
        output_stride=output_stride,
        scales=outputs.parse_scales(scales),
        flip=flip,
        window=window,
    )
    heat = dict.fromkeys(prediction.class_id(name, model.labels) for name in heatmap or ())
    wanted = prediction.Outputs(folder, opacity, tuple(heat), side_by_side)

    predicted: list[Predicted] = []
    problems: list[str] = []
    for job in watch(jobs, "predict", len(jobs)):
        try:
            predicted.append(prediction.predict(model, job, wanted))
        except prediction.OutputError:
            raise
        except UserError as error:
            problems.append(str(error))

    report = {"checkpoint": str(model.path)} | prediction.to_json(predicted, model.labels)
    outputs.write_json(json_file, report | {"problems": problems})
    console = outputs.console(json_file)
    windowed = [one for one in predicted if window is None and model.window_of(*one.size)]
    if windowed:
        console.print(
            f"{len(windowed)} of more than {segmenter.LARGE / 1e6:g} million pixels: segmented in "
            f"windows of {segmenter.WINDOW} (--window 0: at once)"
        )
    if predicted:
        total = prediction.total_counts(predicted, model.labels)
        console.print(_area_table(predicted, total, model.labels))
        noun = "image" if len(predicted) == 1 else "images"
        console.print(f"{len(predicted)} {noun} in {folder}", markup=False)
    raise_together(f"{len(problems)} of {len(jobs)} images could not be predicted", problems)


def _area_table(predicted: list[Predicted], total: np.ndarray, labels: LabelSet) -> Table:
    """Pixels of each class that occurs, the largest first."""
    from deeplab_jax.visualization import overlays as pictures

    table = Table("class", "colour", box=None, pad_edge=False)
    for title in ("pixels", "share", *(["images"] if len(predicted) > 1 else [])):
        table.add_column(title, justify="right")
    for index in sorted(range(labels.num_classes), key=lambda index: -total[index]):
        if total[index]:
            red, green, blue = labels.colors[index]
            swatch = Text("██ ", style=f"rgb({red},{green},{blue})")
            row: list[str | Text] = [
                Text(labels.names[index]),
                swatch.append(f"#{red:02x}{green:02x}{blue:02x}", style="default"),
                f"{total[index]:,}",
                pictures.share(int(total[index]), int(total.sum())),
            ]
            if len(predicted) > 1:
                row.append(str(sum(one.counts[index] > 0 for one in predicted)))
            table.add_row(*row)
    return table
