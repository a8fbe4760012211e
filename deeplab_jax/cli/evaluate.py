"""`deeplab-jax evaluate`."""

from __future__ import annotations

import math
import pathlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.config import EvalConfig
from deeplab_jax.utils.errors import UserError, print_warning

if TYPE_CHECKING:
    from deeplab_jax.evaluation.evaluator import Evaluation


@options.evaluation_options
def evaluate(
    settings: EvalConfig,
    checkpoint: options.Checkpoint,
    data: Annotated[
        str,
        typer.Option(
            help="Data set (voc, coco, cityscapes, ade20k, folder, shapes), or config file whose "
            "data section to use. Default: the data set of the training.",
            callback=options.expand_path,
        ),
    ] = "",
    root: Annotated[
        str,
        typer.Option(
            help="Folder of the data. Default: the config's.", callback=options.expand_path
        ),
    ] = "",
    split: Annotated[str, typer.Option(help="Default: the config's eval_split, val.")] = "",
    protocol: Annotated[
        str,
        typer.Option(help="paper, native or torchvision. Default: paper, or native with --window."),
    ] = "",
    size: options.Size = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the first N images; 0: all.")] = 0,
    boundary: Annotated[
        bool, typer.Option("--boundary", help="Also compute the boundary IoU.")
    ] = False,
    bootstrap: Annotated[
        int,
        typer.Option(min=0, help="Resamples for a confidence interval of the mIoU: 1000; 0: none."),
    ] = 0,
    json_file: options.Json = "",
    confusion: Annotated[
        str,
        typer.Option(
            help="Draw the confusion matrix to this file (.png, .svg or .pdf).",
            callback=options.expand_path,
        ),
    ] = "",
) -> None:
    """Score a model on a data set: mIoU, the IoU of each class, and related metrics.

    The data set and its settings are those of the training, unless the options say otherwise.

    Examples:
      deeplab-jax evaluate runs/voc
      deeplab-jax evaluate runs/voc --output-stride 8 --scales 0.5,0.75,1,1.25,1.5,1.75 --flip
      deeplab-jax evaluate deeplabv3_resnet50_coco-cd0a2569.pth --data voc --protocol torchvision
      deeplab-jax evaluate runs/mine --data configs/folder.py --bootstrap 1000 --confusion c.png
    """
    from deeplab_jax.evaluation import report, setup
    from deeplab_jax.evaluation.confusion import bootstrap_miou
    from deeplab_jax.visualization import plots

    outputs.check_json(json_file)
    if confusion:
        outputs.check("--confusion", confusion, *plots.SUFFIXES)
    settings.protocol = protocol or settings.protocol
    ready = setup.prepare(
        checkpoint, data, settings, root=root, split=split, size=size, limit=limit
    )
    config, segmenter, evaluator = ready.config, ready.segmenter, ready.evaluator

    started = time.perf_counter()
    with outputs.progress_bar("evaluate", evaluator.num_batches) as advance:
        evaluation = evaluator.evaluate(
            segmenter.variables, boundary=boundary, per_image=bootstrap > 0, progress=advance
        )
    assert evaluation is not None  # without `should_stop` it is complete
    if not evaluation.matrix.any():
        raise UserError(
            f"every pixel of the {evaluation.num_images} images in {config.data.eval_split!r} has "
            "the ignore label, so there is nothing to score. Look at the masks with deeplab-jax "
            "data check"
        )
    seconds = time.perf_counter() - started
    interval = None
    if evaluation.matrices is not None:
        interval = bootstrap_miou(evaluation.matrices, num_resamples=bootstrap)
    facts = {
        "checkpoint": str(segmenter.path),
        "data": config.data.name,
        "root": config.data.root,
        "split": config.data.eval_split,
        "protocol": config.eval.protocol,
        "size": config.eval.size if config.eval.protocol == "paper" else None,
        "output_stride": segmenter.architecture.output_stride,
        "scales": list(config.eval.scales),
        "flip": config.eval.flip,
        "window": config.eval.window,
        "overlap": config.eval.overlap if config.eval.window else None,
        "bootstrap": bootstrap,
        "seconds": round(seconds, 3),
        "images_per_second": round(evaluation.num_images / seconds, 3),
        "num_compilations": evaluator.num_compilations,
    }
    console = outputs.console(json_file)
    columns = _class_columns(evaluation)
    rows = zip(evaluation.labels.names, *columns.values(), strict=True)
    console.print(outputs.table(("class", *columns), rows))
    console.print("", *_summary(evaluation, interval, facts), sep="\n", markup=False)
    if confusion:
        figure = plots.confusion_plot(evaluation.matrix, evaluation.labels)
        plots.save(pathlib.Path(confusion), figure)
    outputs.write_json(json_file, facts | report.to_json(evaluation, interval))
    for warning in ready.warnings + report.warnings(evaluation):
        print_warning(warning)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _class_columns(evaluation: Evaluation) -> dict[str, list[str]]:
    """Returns the scores of each class in percent, by the title of their column."""
    scores = evaluation.scores
    columns = {
        "IoU %": scores.per_class_iou,
        "accuracy %": scores.per_class_accuracy,
        "of labels %": scores.per_class_true_share,
        "of predictions %": scores.per_class_predicted_share,
    }
    if evaluation.per_class_boundary_iou is not None:
        columns["boundary IoU %"] = evaluation.per_class_boundary_iou
    return {title: list(map(_percent, values)) for title, values in columns.items()}


def _summary(
    evaluation: Evaluation, interval: tuple[float, float] | None, facts: dict[str, Any]
) -> list[str]:
    """Returns the scores over all classes, and how they were computed, one per line."""
    scores, rows = evaluation.scores, {}
    rows["mIoU %"] = _percent(scores.miou)
    if interval is not None:
        low, high = map(_percent, interval)
        rows["mIoU %"] += (
            f"  ({low} to {high}: 95 % of {facts['bootstrap']} resamples of the images)"
        )
    if not math.isnan(scores.miou_without_background):
        rows["without background"] = _percent(scores.miou_without_background)
    if evaluation.boundary_miou is not None:
        rows["boundary mIoU"] = _percent(evaluation.boundary_miou)
    rows["pixel accuracy"] = _percent(scores.pixel_accuracy)
    rows["mean accuracy"] = _percent(scores.mean_accuracy)
    rows["frequency-weighted IoU"] = _percent(scores.frequency_weighted_iou)
    rows["images"] = f"{evaluation.num_images} of {facts['data']}, {facts['split']}"
    rows["protocol"] = facts["protocol"] + (f", padded to {facts['size']}" if facts["size"] else "")
    rows["model"] = f"{facts['checkpoint']}, output stride {facts['output_stride']}"
    rows["scales"] = ", ".join(f"{scale:g}" for scale in facts["scales"]) + (
        ", and mirrored" if facts["flip"] else ""
    )
    if facts["window"]:
        rows["window"] = f"{facts['window']} pixels, overlap {facts['overlap']:g}"
    programs = facts["num_compilations"]
    rows["time"] = (
        f"{facts['seconds']:.1f} s, {facts['images_per_second']:.2f} images/s, "
        f"{programs} program{'' if programs == 1 else 's'} compiled in it"
    )
    return [f"{name:<24}{value}" for name, value in rows.items()]
