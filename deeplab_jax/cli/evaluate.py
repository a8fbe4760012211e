"""`deeplab-jax evaluate`."""

from __future__ import annotations

import math
import pathlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError, print_warning

if TYPE_CHECKING:
    from deeplab_jax.evaluation.tally import Evaluation


@options.evaluation_options
def evaluate(
    settings: dict[str, Any],
    checkpoint: options.Checkpoint,
    data: options.Data = "",
    root: options.Root = "",
    split: options.Split = "",
    limit: options.Limit = 0,
    boundary: Annotated[
        bool, typer.Option("--boundary", help="Also compute the boundary IoU.")
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamples for an interval of the mIoU: 1000; 0: none.")
    ] = 0,
    json_file: options.Json = "",
    confusion: Annotated[str, options.figure_option("Draw the confusion matrix here")] = "",
    positive: options.Positive = "",
    threshold: options.Threshold = None,
    unsure: Annotated[
        bool,
        typer.Option(
            "--unsure",
            help="Also measure the rule for unsure pixels, see calibrate: predicts once more.",
        ),
    ] = False,
    calibration: options.Calibration = "",
    curves: Annotated[
        str,
        options.output_option(
            "Draw the ROC and precision-recall curves of the class --positive here (.png, .svg or "
            ".pdf), or write their points (.json).",
            *(".png", ".svg", ".pdf", ".json"),
        ),
    ] = "",
) -> None:
    """Score a model on a data set: mIoU, the IoU of each class, and related metrics.

    The data set and the settings are those with which the run was evaluated during its training,
    unless the options say otherwise.

    Examples:
      deeplab-jax evaluate runs/voc
      deeplab-jax evaluate runs/voc --output-stride 8 --scales 0.5,0.75,1,1.25,1.5,1.75 --flip
      deeplab-jax evaluate deeplabv3_resnet50_coco-cd0a2569.pth --data voc --protocol torchvision
      deeplab-jax evaluate runs/mine --data configs/folder.py --bootstrap 1000 --confusion c.png
      deeplab-jax evaluate runs/cracks --curves curves.png --threshold 0.35
      deeplab-jax evaluate runs/voc --unsure --json scores.json
    """
    from deeplab_jax.buckets.outputs import shown
    from deeplab_jax.evaluation import report, setup
    from deeplab_jax.evaluation.calibration import measure
    from deeplab_jax.evaluation.confusion import bootstrap_miou
    from deeplab_jax.inference.calibration import require_calibration
    from deeplab_jax.inference.positive import missing
    from deeplab_jax.visualization import plots

    if curves and curves in (confusion, json_file):
        raise UserError(f"--curves needs a file of its own, got {curves}")
    options.check_unsure(unsure, threshold, calibration)
    config, segmenter, evaluator, warnings = setup.prepare(
        *(checkpoint, data, settings),
        root=root,
        split=split,
        limit=limit,
        positive=positive,
        threshold=threshold,
        calibration=calibration,
    )
    rule = require_calibration(segmenter) if unsure else None
    if curves and evaluator.positive is None:
        raise missing("--curves", evaluator.dataset.labels)

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
    curve = None
    if rule:
        with outputs.progress_bar("unsure pixels", evaluation.num_images) as advance:
            curve = measure(segmenter, evaluator.dataset, rule, advance)
    interval = None
    if evaluation.matrices is not None:
        interval = bootstrap_miou(evaluation.matrices, num_resamples=bootstrap)
    facts = {
        "checkpoint": shown(str(segmenter.path)),
        "data": config.data.name,
        "root": config.data.root,
        "split": config.data.eval_split,
        "protocol": config.eval.protocol,
        "size": config.eval.size if config.eval.protocol == "paper" else None,
        "output_stride": segmenter.architecture.output_stride,
        "scales": list(config.eval.scales),
        "flip": config.eval.flip,
        "window": config.eval.window,
        "overlap": None if config.eval.window == 0 else config.eval.overlap,
        "bootstrap": bootstrap,
        "seconds": round(seconds, 3),
        "images_per_second": round(evaluation.num_images / seconds, 3),
        "num_compilations": evaluator.num_compilations,
    }
    console = outputs.console(json_file)
    columns = _class_columns(evaluation)
    rows = zip(evaluation.labels.names, *columns.values(), strict=True)
    console.print(outputs.table(("class", *columns), rows))
    binary = report.binary(evaluation)
    lines = outputs.facts(_summary(evaluation, interval, facts))
    if binary:
        lines += ["", *outputs.facts(_binary_summary(binary))]
    scores = report.to_json(evaluation, interval)
    if rule and curve:
        found: dict[str, Any] = curve.at(rule.threshold)
        risk = {
            "unsure": f"{_percent(1 - found['coverage'])} % of the pixels, {rule.rule()}",
            "risk %": f"{_percent(found['risk'])}  ({rule.promise()})",
            "wrong of the others %": _percent(found["wrong_of_sure"]),
        }
        lines += ["", *outputs.facts(risk)]
        scores["unsure"] = found | {"stated_risk": rule.risk, "points": curve.points()}
    console.print("", *lines, sep="\n")
    outputs.write_json(json_file, facts | scores)
    if confusion:
        figure = plots.confusion_plot(evaluation.matrix, evaluation.labels)
        outputs.save_figure(confusion, figure)
    if curves and evaluation.curves and binary:
        if pathlib.Path(curves).suffix.lower() == ".json":
            points = report.curve_points(evaluation.curves)
            outputs.write_json(curves, facts | binary | {"points": points})
        else:
            figure = plots.binary_curves(evaluation.curves.points(), binary)
            outputs.save_figure(curves, figure)
    for warning in warnings + report.warnings(evaluation):
        print_warning(warning)


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


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
) -> dict[str, str]:
    """Returns the scores over all classes, and how they were computed."""
    scores = evaluation.scores
    rows = {"mIoU %": _percent(scores.miou)}
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
    rows["scales"] = options.spell_views(facts["scales"], facts["flip"])
    if facts["window"]:
        rows["window"] = f"{facts['window']} pixels, overlap {facts['overlap']:g}"
    elif facts["window"] is None:
        rows["window"] = "1025 pixels for images of more than 4 million pixels, none for others"
    programs = facts["num_compilations"]
    rows["time"] = (
        f"{facts['seconds']:.1f} s, {facts['images_per_second']:.2f} images/s, "
        f"{programs} program{'' if programs == 1 else 's'} compiled in it"
    )
    return rows


def _binary_summary(binary: dict[str, Any]) -> dict[str, str]:
    """Returns the numbers of `report.binary` as texts."""
    import numpy as np

    def area(name: str) -> str:
        value, error = binary[name], binary[f"{name}_error"]
        if value is None:
            return "-"
        return f"{value:.5f}  " + (f"± {error:.0e}" if error else "(exact)")

    threshold, num_positives = binary["threshold"], binary["positive_pixels"]
    share = num_positives / (num_positives + binary["negative_pixels"])
    rule = (
        "where it is most probable" if threshold is None else f"from probability {threshold:g} on"
    )
    rows = {
        "positive class": f"{binary['positive']}, {_percent(share)} % of the pixels",
        "predicted": rule,
        "precision %": _percent(binary["precision"]),
        "recall %": _percent(binary["recall"]),
        "F1 (Dice) %": _percent(binary["f1"]),
        "IoU %": _percent(binary["iou"]),
        "AUROC": area("auroc"),
        "average precision": area("average_precision"),
        "best F1 %": _percent(binary["best_f1"]),
    }
    if binary["best_threshold"] is not None:
        rows["best F1 %"] += f"  with --threshold {np.float32(binary['best_threshold'])!s}"
    return rows
