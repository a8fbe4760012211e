"""`deeplab-jax predict`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from deeplab_jax.cli import options, outputs
from deeplab_jax.cli.errors import exit_on_sigterm
from deeplab_jax.cli.startup import paused_collector, resume_collector

if TYPE_CHECKING:
    import numpy as np

    from deeplab_jax.data.labels import LabelSet
    from deeplab_jax.inference.files import ImageResult


@options.view_options
@paused_collector()
def predict(
    settings: dict[str, Any],
    checkpoint: options.Checkpoint,
    images: Annotated[
        list[str], options.path_argument("Image files, folders (searched recursively) or patterns.")
    ],
    out: Annotated[str, options.path_option("Folder for the results; created if it is missing.")],
    heatmap: Annotated[
        list[str] | None,
        typer.Option(help="Class (name or id) whose probability is drawn as heat map; repeatable."),
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Also draw the image and its overlay in a row.")
    ] = False,
    opacity: Annotated[
        float, typer.Option(min=0, max=1, help="Opacity of the class colours over the image.")
    ] = 0.5,
    positive: options.Positive = "",
    threshold: options.Threshold = None,
    json_file: options.Json = "",
) -> None:
    """Segment images: class ids, overlays with a legend, and the area of each class.

    For each image NAME, the folder OUT gets NAME_ids.png, a palette PNG whose pixel values are
    class ids, and NAME_overlay.png. Files that are not images are reported at the end, when all
    other files are done. Of folders and patterns, pictures that deeplab-jax wrote are left out.
    Scales, mirrored images and windows are those with which the run was evaluated during its
    training, unless the options say otherwise.

    Examples:
      deeplab-jax predict runs/voc photo.jpg --out predicted
      deeplab-jax predict runs/voc photos/ --out predicted --side-by-side --json areas.json
      deeplab-jax predict deeplabv3_resnet101 'photos/*.jpg' --out predicted --heatmap dog
      deeplab-jax predict runs/cracks photos/ --out predicted --threshold 0.35
      deeplab-jax predict runs/voc huge.tif --out predicted --window 1025 --scales 0.75,1 --flip
    """
    from deeplab_jax.buckets.outputs import local_output, shown
    from deeplab_jax.data.labels import class_id
    from deeplab_jax.inference import files, pipeline, predictor, segmenter
    from deeplab_jax.inference.positive import resolve
    from deeplab_jax.utils.errors import UserError, raise_problems
    from deeplab_jax.utils.paths import is_bucket
    from deeplab_jax.utils.progress import track

    inputs, num_own = files.find_images(images, out)
    outputs.check_folder("--out", out)
    outputs.check("--json", json_file, ".json")
    model = segmenter.load(checkpoint, **settings, wait=False)
    if positive and threshold is None:
        raise UserError("--positive needs --threshold: without it, the most probable class counts")
    chosen = None if threshold is None else resolve(model.labels, positive, threshold)
    classes = dict.fromkeys(class_id(name, model.labels) for name in heatmap or ())

    results: list[ImageResult] = []
    problems: list[str] = []
    with exit_on_sigterm(), local_output(out) as (folder, move), contextlib.ExitStack() as stack:
        predictions = pipeline.predict_images(
            model,
            {path: folder / name for path, name in inputs.items()},
            opacity=opacity,
            heatmap_classes=tuple(classes),
            side_by_side=side_by_side,
            positive=chosen,
            move=move if is_bucket(out) else None,
        )
        stack.callback(predictions.close)
        for result in track(predictions, "predict", len(inputs)):
            resume_collector()
            if isinstance(result, UserError):
                problems.append(shown(str(result)))
            else:
                results.append(result)

    console = outputs.console(json_file)
    if num_own:
        console.print(f"left out: {num_own} of the pictures, which deeplab-jax wrote")
    tta = model.tta
    console.print(
        f"output stride {model.architecture.output_stride}, scales "
        + options.spell_views(tta.scales, tta.flip)
        + (f", windows of {tta.window} pixels, overlap {tta.overlap:g}" if tta.window else "")
    )
    windowed = [one for one in results if tta.window is None and tta.window_of(*one.size)]
    if windowed:
        console.print(
            f"{len(windowed)} of more than {predictor.LARGE_IMAGE / 1e6:g} million pixels: "
            f"segmented in windows of {predictor.DEFAULT_WINDOW} (--window 0: as whole images)"
        )
    if results:
        columns = ["class", "colour", "pixels", "share", "images"]
        rows = _area_rows(results, files.total_counts(results, model.labels), model.labels)
        if len(results) == 1:
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        console.print(outputs.table(columns, rows, num_text_columns=2))
        noun = "image" if len(results) == 1 else "images"
        console.print(f"{len(results)} {noun} in {out}", markup=False)
    report: dict[str, Any] = {"checkpoint": str(model.path)}
    if chosen:
        report |= {"positive": model.labels.names[chosen.class_id], "threshold": threshold}
        console.print(f"{report['positive']}: from probability {threshold:g} on", markup=False)
    report |= files.to_json(results, model.labels)
    outputs.write_json(json_file, report | {"problems": problems})
    num_failed = len(inputs) - len(results)
    raise_problems(f"{num_failed} of {len(inputs)} images could not be predicted", problems)


def _area_rows(
    results: list[ImageResult], total: np.ndarray, labels: LabelSet
) -> list[list[str | Text]]:
    """Returns a row for each class that occurs, the largest area first."""
    from deeplab_jax.visualization.overlays import percentage

    rows: list[list[str | Text]] = []
    for index in sorted(total.nonzero()[0], key=lambda index: -total[index]):
        red, green, blue = labels.colors[index]
        swatch = Text("  ", style=f"on rgb({red},{green},{blue})")  # no block, for ASCII consoles
        rows.append(
            [
                labels.names[index],
                swatch.append(f" #{red:02x}{green:02x}{blue:02x}", style="default on default"),
                f"{total[index]:,}",
                percentage(int(total[index]), int(total.sum())),
                str(sum(one.counts[index] > 0 for one in results)),
            ]
        )
    return rows
