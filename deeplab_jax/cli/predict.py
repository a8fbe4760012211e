"""`deeplab-jax predict`."""

from __future__ import annotations

import contextlib
import pathlib
import re
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
        list[str],
        options.path_argument(
            "Images, folders (with their subfolders), patterns, videos, camera:0."
        ),
    ],
    out: Annotated[str, options.path_option("Folder for the results; created if it is missing.")],
    heatmap: Annotated[
        list[str] | None, typer.Option(help="Class (name or id) to draw a heat map of; repeatable.")
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Also draw the image and its overlay in a row.")
    ] = False,
    opacity: Annotated[
        float, typer.Option(min=0, max=1, help="Opacity of the class colours over the image.")
    ] = 0.5,
    smooth: Annotated[
        float,
        typer.Option(min=0, help="Weight of earlier frames in a running mean of probabilities."),
    ] = 0.0,
    every: Annotated[int, typer.Option(min=1, help="Segment one of so many frames.")] = 1,
    frames: Annotated[
        int, typer.Option(min=0, help="Stop after so many frames; 0: at the end.")
    ] = 0,
    positive: options.Positive = "",
    threshold: options.Threshold = None,
    unsure: Annotated[
        bool, typer.Option("--unsure", help="Also mark the pixels that are unsure, see calibrate.")
    ] = False,
    calibration: options.Calibration = "",
    json_file: options.Json = "",
) -> None:
    """Segment images and videos: class ids, overlays with a legend, and the area of each class.

    For each image NAME, the folder OUT gets NAME_ids.png, a palette PNG whose pixel values are
    class ids, and NAME_overlay.png; with --unsure also NAME_unsure.png, which is 255 where the
    model is unsure and 0 elsewhere. Files that are not images are reported at the end, when all
    other files are done. Of folders and patterns, pictures that deeplab-jax wrote are left out.
    Scales, mirrored images and windows are those with which the run was evaluated during its
    training, unless the options say otherwise.

    For each video NAME, OUT gets NAME_overlay.mp4, without sound, and NAME_areas.csv with the share
    of each class in each frame. Ctrl-C ends the recording of a camera.

    Examples:
      deeplab-jax predict runs/voc photo.jpg --out predicted
      deeplab-jax predict runs/voc photos/ --out predicted --side-by-side --json areas.json
      deeplab-jax predict deeplabv3_resnet101 'photos/*.jpg' --out predicted --heatmap dog
      deeplab-jax predict runs/cracks photos/ --out predicted --threshold 0.35
      deeplab-jax predict runs/voc huge.tif --out predicted --window 1025 --scales 0.75,1 --flip
      deeplab-jax predict runs/voc photos/ --out predicted --unsure
      deeplab-jax predict runs/voc clip.mp4 --out predicted --smooth 0.8
      deeplab-jax predict runs/voc camera:0 --out predicted --frames 300
    """
    from deeplab_jax.buckets.outputs import local_output, shown
    from deeplab_jax.data.labels import class_id
    from deeplab_jax.inference import files, pipeline, predictor, segmenter, video
    from deeplab_jax.inference.calibration import require_calibration
    from deeplab_jax.inference.positive import resolve
    from deeplab_jax.utils.errors import UserError, raise_problems
    from deeplab_jax.utils.progress import track

    cameras = [name for name in images if re.fullmatch(video.CAMERA, name)]
    inputs, num_own = files.find_images([name for name in images if name not in cameras], out)
    is_video = [path for path in inputs if path.suffix.lower() in files.VIDEO_SUFFIXES]
    videos = {path: inputs.pop(path) for path in is_video}
    videos |= {pathlib.Path(name): pathlib.Path(name.replace(":", "_")) for name in cameras}
    if videos and (heatmap or side_by_side or unsure):
        raise UserError(
            "--heatmap, --side-by-side and --unsure are for images: predict videos without them"
        )
    if not videos and (smooth or every > 1 or frames):
        raise UserError("--smooth, --every and --frames are for videos and cameras")
    if not smooth < 1:
        raise UserError(f"--smooth must be 0 or more and below 1, got {smooth:g}")
    options.check_unsure(unsure, threshold, calibration)
    outputs.check("--out", out, kind="folder")
    model = segmenter.load(checkpoint, **settings, calibration=calibration or None, wait=False)
    rule = require_calibration(model) if unsure else None
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
            unsure=unsure,
            move=move,
        )
        stack.callback(predictions.close)
        for result in track(predictions, "predict", len(inputs)) if inputs else ():
            resume_collector()
            if isinstance(result, UserError):
                problems.append(shown(str(result)))
            else:
                results.append(result)
        for source, name in videos.items():
            resume_collector()
            try:
                result = video.predict_video(
                    *(model, source, folder / name),
                    opacity=opacity,
                    every=every,
                    move=move,
                    max_frames=frames,
                    smooth=smooth,
                    positive=chosen,
                )
                results.append(result)
            except UserError as error:
                problems.append(shown(f"{source}: {error}"))

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
        columns = ["class", "colour", "pixels", "share", "files" if videos else "images"]
        rows = _area_rows(results, files.total_counts(results, model.labels), model.labels)
        rows += [_unsure_row(results)] if rule else []
        if len(results) == 1:
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        console.print(outputs.table(columns, rows, num_text_columns=2))
        noun = "video" if videos and not inputs else "image" if not videos else "file"
        console.print(f"{len(results)} {noun}{'s' * (len(results) > 1)} in {out}")
        for one in results:
            if isinstance(one, files.VideoResult):
                noun = "frame" if one.num_frames == 1 else "frames"
                about = f"{one.num_frames} {noun}, {one.rate:g} per second, without sound"
                console.print("; ".join([f"{one.path}: {about}", *one.notes]))
    report: dict[str, Any] = {"checkpoint": str(model.path)}
    if chosen:
        report |= {"positive": model.labels.names[chosen.class_id], "threshold": threshold}
        console.print(f"{report['positive']}: from probability {threshold:g} on")
    if rule:
        console.print(f"unsure {rule.rule()}; {rule.promise()}")
        report["unsure"] = {name: getattr(rule, name) for name in ("threshold", "risk", "of")}
    report |= files.to_json(results, model.labels)
    outputs.write_json(json_file, report | {"problems": problems})
    number, noun = len(inputs) + len(videos), "files" if videos else "images"
    failed = f"{number - len(results)} of {number} {noun} could not be predicted"
    raise_problems(failed, problems)


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


def _unsure_row(results: list[ImageResult]) -> list[str | Text]:
    """Returns the row of the unsure pixels, which the rows of classes count too."""
    from deeplab_jax.visualization.overlays import percentage

    pixels = [one.unsure or 0 for one in results]
    total = sum(int(one.counts.sum()) for one in results)
    num_images = sum(count > 0 for count in pixels)
    area = f"{sum(pixels):,}", percentage(sum(pixels), total)
    return ["unsure", "hatched", *area, str(num_images)]
