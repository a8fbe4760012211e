"""`deeplab-jax warm`."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError


@options.view_options
def warm(
    settings: dict[str, Any],
    checkpoint: options.Checkpoint,
    sizes: Annotated[
        str, typer.Option(help="Sides, or height x width, of the images, pixels: 375x500,513.")
    ],
    batch: Annotated[
        int, typer.Option(min=1, max=100_000, help="Number of images of each size.")
    ] = 1,
) -> None:
    """Compile the programs that `predict` will need, and keep them on disk.

    They are those of one call of `predict` for images of all these sizes, with the same options, on
    this kind of device. A program that compiles in less than a second is not kept.

    Examples:
      deeplab-jax warm runs/voc --sizes 375x500
      deeplab-jax warm deeplabv3_resnet50 --sizes 375x500,500x375 --batch 8 --scales 0.75,1 --flip
    """
    import jax
    import numpy as np

    from deeplab_jax.analysis.descriptions import parse_size
    from deeplab_jax.data.io.images import MAX_PIXELS
    from deeplab_jax.inference import compilation, segmenter

    parsed = [parse_size(text, "--sizes") for text in sizes.split(",")]
    if max(map(math.prod, parsed)) > MAX_PIXELS:
        raise UserError(f"--sizes {sizes}: an image may have at most {MAX_PIXELS} pixels")
    model = segmenter.load(checkpoint, **settings)
    predictor, console = model.predictor, outputs.console("")
    if jax.default_backend() == "cpu" and compilation.has_onednn():
        console.print("nothing to do: on this CPU, programs call oneDNN, and JAX cannot keep those")
        return
    start = time.perf_counter()
    predictor.plan(parsed * batch, "ids", None)
    for height, width in parsed:
        image = np.zeros((height, width, model.architecture.in_channels), np.uint8)
        shape = predictor.padded_shape(image)
        program = "x".join(map(str, shape)) if shape else "windows"
        predictor.ids(image)
        seconds = time.perf_counter() - start
        console.print(f"{height}x{width}: program for {program}, after {seconds:.1f} s")
    console.print(f"in {jax.config.values['jax_compilation_cache_dir']}")
