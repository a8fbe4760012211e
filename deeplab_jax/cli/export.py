"""`deeplab-jax export`."""

from __future__ import annotations

from typing import Annotated

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError

ANY = "symbolic"


def export(
    checkpoint: options.Checkpoint,
    destination: Annotated[str, options.path_argument("File to write: OUT.stablehlo or OUT.onnx.")],
    height: Annotated[str, typer.Option(help="Height of images, pixels; symbolic: any.")] = ANY,
    width: Annotated[str, typer.Option(help="Width of images, pixels; symbolic: any.")] = ANY,
    batch: Annotated[str, typer.Option(help="Number of images; symbolic: any.")] = ANY,
    output: Annotated[str, typer.Option(help="ids, probabilities or logits.")] = "ids",
    platforms: Annotated[
        str, typer.Option(help="Platforms that a StableHLO file runs on; must include cpu.")
    ] = "cpu,cuda,tpu",
    layout: Annotated[
        str,
        typer.Option(help="Axes of images, probabilities and logits in ONNX: nhwc or nchw."),
    ] = "nhwc",
    precision: Annotated[
        str, typer.Option(help="Of an ONNX file: float32, float16 or int8.")
    ] = "float32",
    calibration_images: Annotated[
        str,
        options.path_option(
            "Folder of images like those that the model will see, or a split of the run's data, "
            "such as train: int8 needs them, float16 is checked on them."
        ),
    ] = "",
    num_calibration: Annotated[
        int, typer.Option(min=1, help="Images to calibrate with; as many others are compared.")
    ] = 32,
    max_changed: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of pixels whose class a lower precision may change."
        ),
    ] = 0.02,
) -> None:
    """Write a model as StableHLO or ONNX, to run without this package.

    The file includes pre- and postprocessing: it takes uint8 images and returns class ids (or
    probabilities, or logits) at their size. It is then loaded and compared with the model; if the
    results differ, it is deleted. So is a file in float16 or int8 in which too many pixels change
    class.

    Examples:
      deeplab-jax export runs/voc voc.stablehlo
      deeplab-jax export runs/voc voc.onnx --layout nchw --output probabilities
      deeplab-jax export runs/voc voc.onnx --height 512 --width 1024 --batch 1
      deeplab-jax export runs/voc voc.onnx --precision int8 --calibration-images train
    """
    from deeplab_jax.export.export import export
    from deeplab_jax.export.quantise import Quantisation

    quantisation: Quantisation | None
    quantisation = Quantisation(precision, calibration_images, num_calibration, max_changed)
    if precision == "float32":
        if quantisation != Quantisation(precision):
            raise UserError(
                "--calibration-images, --num-calibration and --max-changed are for --precision "
                "int8 or float16"
            )
        quantisation = None
    done = export(
        checkpoint,
        destination,
        height=_parse_size("--height", height),
        width=_parse_size("--width", width),
        batch=_parse_size("--batch", batch),
        output=output,
        platforms=[name.strip() for name in platforms.split(",")],
        layout=layout,
        quantisation=quantisation,
    )
    limit = f"difference from the model (limit {done.limit:g})"
    columns = ("compared on", "images x height x width", limit, "same class")
    rows = [
        (one.images, "x".join(map(str, one.shape)), f"{one.difference:.1e}", f"{one.agreement:.4%}")
        for one in done.comparisons
    ]
    console = outputs.console()
    console.print(outputs.table(columns, rows))
    if done.nodes:
        parts = ", ".join(f"{count} {name}" for name, count in done.nodes.items())
        console.print(f"{sum(done.nodes.values())} nodes: {parts}")
    if change := done.change:
        kind = "other images" if change.held_out else "images, those of the calibration,"
        before, after = (f"{1000 * seconds:.0f} ms" for seconds in change.seconds)
        console.print(
            f"{precision}: {change.changed:.2%} of the pixels of {change.num_images} {kind} change "
            f"class (limit {max_changed:.2%}); {after} per image in onnxruntime here. In float32: "
            f"{before}, {change.num_bytes[0] / 1e6:.1f} MB"
        )
    console.print(f"{done.path}: {done.num_bytes / 1e6:.1f} MB")


def _parse_size(option: str, text: str) -> int | None:
    if text == ANY:
        return None
    if not text.isdecimal():
        raise UserError(f"{option} must be a whole number or {ANY}, got {text!r}")
    return int(text)
