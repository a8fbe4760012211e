"""`deeplab-jax evaluate`."""

from __future__ import annotations

import math
import pathlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deeplab_jax.cli import options, outputs

if TYPE_CHECKING:
    from deeplab_jax.evaluation.report import Report


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Workdir, checkpoint or torchvision's file.")],
    data: Annotated[
        str,
        typer.Option(
            help="Name of a data set (voc, coco, cityscapes, ade20k, folder, shapes) or a config "
            "file, whose data section is taken. Default: what the run was trained on."
        ),
    ] = "",
    root: Annotated[str, typer.Option(help="Folder of the data.")] = "",
    split: Annotated[str, typer.Option(help="Default: the config's eval_split, val.")] = "",
    protocol: Annotated[
        str,
        typer.Option(help="paper, native or torchvision. Default: paper, native with --window."),
    ] = "",
    size: options.Size = None,
    output_stride: options.OutputStride = None,
    scales: options.Scales = "1",
    flip: options.Flip = False,
    window: options.Window = 0,
    overlap: options.Overlap = 0.5,
    batch_size: options.BatchSize = 8,
    limit: Annotated[int, typer.Option(min=0, help="Only the first N images; 0: all.")] = 0,
    boundary: Annotated[bool, typer.Option("--boundary", help="Boundary IoU too.")] = False,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamples for an interval of the mIoU, such as 1000.")
    ] = 0,
    json_file: Annotated[
        str, typer.Option("--json", help="Write all numbers here; -: to stdout, alone.")
    ] = "",
    confusion: Annotated[str, typer.Option(help="Draw the confusion matrix here (.png).")] = "",
) -> None:
    """Score a model on a data set: IoU of each class, mIoU and what goes with it.

    Examples:

      deeplab-jax evaluate runs/voc

      deeplab-jax evaluate runs/voc --output-stride 8 --scales 0.5,0.75,1,1.25,1.5,1.75 --flip

      deeplab-jax evaluate deeplabv3_resnet50_coco-cd0a2569.pth --data voc --protocol torchvision

      deeplab-jax evaluate runs/mine --data configs/folder.py --bootstrap 1000 --confusion c.png
    """
    from deeplab_jax.evaluation import setup
    from deeplab_jax.evaluation.report import make_report
    from deeplab_jax.utils.files import write_png
    from deeplab_jax.visualization.image_grid import confusion_plot

    outputs.check_json(json_file)
    if confusion:
        outputs.check("--confusion", confusion, ".png")
    settings = options.evaluation(
        protocol, output_stride, scales, flip, window, overlap, batch_size
    )
    ready = setup.prepare(
        checkpoint, data, settings, root=root, split=split, size=size, limit=limit
    )
    config, loaded, evaluator = ready.config, ready.loaded, ready.evaluator

    started = time.perf_counter()
    with outputs.bar("evaluate", evaluator.num_batches) as advance:
        evaluation = evaluator.evaluate(
            loaded.variables, boundary=boundary, per_image=bootstrap > 0, progress=advance
        )
    assert evaluation is not None  # nobody told it to stop
    seconds = time.perf_counter() - started
    report = make_report(evaluation, resamples=bootstrap)
    facts = {
        "checkpoint": str(loaded.path),
        "data": config.data.name,
        "root": config.data.root,
        "split": config.data.eval_split,
        "protocol": config.eval.protocol,
        "size": config.eval.size if config.eval.protocol == "paper" else None,
        "output_stride": loaded.architecture.output_stride,
        "scales": list(config.eval.scales),
        "flip": flip,
        "window": window,
        "overlap": overlap if window else None,
        "bootstrap": bootstrap,
        "seconds": round(seconds, 3),
        "images_per_second": round(report.images / seconds, 3),
        "num_compilations": evaluator.num_compilations,
    }
    console = outputs.console(json_file)
    console.print(_class_table(report))
    console.print("", *_summary(report, facts), sep="\n", markup=False)
    if confusion:
        write_png(pathlib.Path(confusion), confusion_plot(report.matrix, ready.dataset.labels))
    outputs.write_json(json_file, facts | report.to_json())
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for warning in ready.warnings + report.warnings():
        errors.print(f"warning: {warning}", markup=False)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _class_table(report: Report) -> Table:
    """A line a class; all numbers in percent."""
    scores, boundary = report.scores, report.per_class_boundary_iou
    columns = {
        "IoU %": scores.per_class_iou,
        "accuracy %": scores.per_class_accuracy,
        "of labels %": scores.true_share,
        "of predictions %": scores.predicted_share,
    }
    if boundary is not None:
        columns["boundary IoU %"] = boundary
    table = Table(box=None, pad_edge=False)
    table.add_column("class", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right")
    for index, name in enumerate(report.names):
        table.add_row(Text(name), *(_percent(values[index]) for values in columns.values()))
    return table


def _summary(report: Report, facts: dict[str, Any]) -> list[str]:
    """What holds of all classes together, and how it was come by."""
    scores, rows = report.scores, {}
    interval = ""
    if report.interval is not None:
        low, high = map(_percent, report.interval)
        interval = f"  ({low} to {high}: 95 % of {facts['bootstrap']} resamples of the images)"
    rows["mIoU %"] = _percent(scores.miou) + interval
    if not math.isnan(scores.miou_without_background):
        rows["without background"] = _percent(scores.miou_without_background)
    if report.boundary_miou is not None:
        rows["boundary mIoU"] = _percent(report.boundary_miou)
    rows["pixel accuracy"] = _percent(scores.pixel_accuracy)
    rows["mean accuracy"] = _percent(scores.mean_accuracy)
    rows["frequency-weighted IoU"] = _percent(scores.frequency_weighted_iou)
    rows["images"] = f"{report.images} of {facts['data']}, {facts['split']}"
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
