"""`export`: writes a model's program to a file, if that gives the same results as the model."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import numpy as np

from deeplab_jax.export import onnx, quantise, stablehlo
from deeplab_jax.export.compare import Comparison, compare
from deeplab_jax.export.program import OUTPUTS, Dimensions, Program
from deeplab_jax.models.ops.resize import MAX_SIDE
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import atomic_path, require_writable, write_bytes
from deeplab_jax.utils.paths import is_bucket, required_path
from deeplab_jax.weights.convert import read_model

# Largest allowed difference from the model, relative to its largest logit.
LIMITS = {".stablehlo": 1e-5, ".onnx": 1e-4}


@dataclasses.dataclass(frozen=True)
class Export:
    """The result of an export."""

    path: pathlib.Path | str  # the file, or its address in a bucket
    num_bytes: int
    description: dict[str, Any]  # of the model, see `Program.description`
    comparisons: tuple[Comparison, ...]  # with the model
    limit: float  # largest allowed difference
    nodes: dict[str, int]  # for ONNX, their number by type in float32, the most frequent first
    change: quantise.Change | None = None  # from float32 to a lower precision


def export(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    output: str = "ids",
    platforms: Sequence[str] = stablehlo.PLATFORMS,
    layout: str = "nhwc",
    quantisation: quantise.Quantisation | None = None,
) -> Export:
    """Writes a model with its pre- and post-processing as StableHLO or ONNX.

    The program takes uint8 images and returns class ids (uint8), probabilities or logits (float32)
    at their size. It is loaded from a temporary file and compared with the model; only then the
    file is renamed to its destination, where it replaces an older file.

    Args:
      checkpoint: a model in any form that `deeplab_jax.load` takes.
      destination: a file, also in a bucket, whose name ends in `.stablehlo` or `.onnx`.
      height, width: size of the images, pixels; None means any.
      batch: number of images; None means any.
      output: a name in `program.OUTPUTS`.
      platforms: for StableHLO, names in `stablehlo.PLATFORMS`.
      layout: for ONNX, the layout of images, probabilities and logits: "nhwc" or "nchw".
      quantisation: for ONNX, a lower precision; None: float32.

    Raises:
      UserError: an argument is invalid; there is no model, or it cannot be exported; a package of
        the extra `onnx` is missing; the file cannot be written; calibration images are missing or
        cannot be read; the program differs from the model; or a lower precision changes the class
        of too many pixels.
    """
    from deeplab_jax.buckets import outputs

    if is_bucket(destination):
        outputs.check(str(destination), str(destination))
    else:
        destination = required_path(destination, "the destination")
    dimensions = Dimensions(batch, height, width)
    with outputs.local_output(destination) as (path, _):
        _check(path, dimensions, output)
        if quantisation:
            quantise.check(quantisation, path)
        if path.suffix == ".onnx":
            onnx.check(layout)
        # Always on CPU, because accelerators round products to fewer digits, each in its own way.
        if jax.default_backend() != "cpu" and "cpu" not in jax.extend.backend.backends():
            raise UserError(
                "an export is compared with the model on the CPU: set JAX_PLATFORMS to "
                f"{jax.config.values['jax_platforms']},cpu, or unset it"
            )
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            program = Program(read_model(checkpoint), output, dimensions)
            images = quantise.read_images(quantisation, checkpoint, program) if quantisation else ()
            load: Callable[[pathlib.Path], Callable[[np.ndarray], np.ndarray]]
            nodes: dict[str, int] = {}
            if path.suffix == ".onnx":
                graph = onnx.to_onnx(program, layout)
                content, nodes, load = graph.SerializeToString(), onnx.count_nodes(graph), onnx.load
            else:
                content, load = stablehlo.serialize(program, platforms), stablehlo.load
            change = None
            try:
                with atomic_path(path) as partial:
                    partial.write_bytes(content)
                    comparisons = compare(program, load(partial))
                    _require_equal(path, comparisons, output)
                    if quantisation:
                        change = quantise.quantise(partial, quantisation.precision, *images)
                        _require_few_changes(path, quantisation, change)
                    num_bytes = partial.stat().st_size
                    if path.suffix == ".stablehlo":
                        text = json.dumps(program.description, indent=2) + "\n"
                        write_bytes(path.with_name(path.name + ".json"), text.encode())
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return Export(
        path=str(destination) if is_bucket(destination) else path,
        num_bytes=num_bytes,
        description=program.description,
        comparisons=tuple(comparisons),
        limit=LIMITS[path.suffix],
        nodes=nodes,
        change=change,
    )


def _check(path: pathlib.Path, dimensions: Dimensions, output: str) -> None:
    """Checks arguments before the model is read."""
    if path.suffix not in LIMITS:
        raise UserError(
            f"{path} must end in {' or '.join(LIMITS)}, which selects the format, not in "
            f"{path.suffix or 'nothing'!r}"
        )
    if output not in OUTPUTS:
        raise UserError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    for name, size in dimensions._asdict().items():
        if size is not None and not 1 <= size <= MAX_SIDE:
            raise UserError(f"{name} must be 1 to {MAX_SIDE}, or omitted for any, got {size}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, but must be a file")
    require_writable(path.parent, create=True)


def _require_equal(path: pathlib.Path, comparisons: Sequence[Comparison], output: str) -> None:
    limit = LIMITS[path.suffix]
    wrong = [
        f"  {'x'.join(map(str, each.shape))}, {each.images}: {each.difference:.1e}"
        for each in comparisons
        if not each.difference <= limit  # also for NaN
    ]
    if wrong:
        raise UserError(
            f"{path} was not written: its {output} differ from the model's by more than "
            f"{limit:g} of the largest logit:\n" + "\n".join(wrong)
        )


def _require_few_changes(
    path: pathlib.Path, wanted: quantise.Quantisation, change: quantise.Change
) -> None:
    if change.changed > wanted.max_changed:
        raise UserError(
            f"{path} was not written: in {wanted.precision}, {change.changed:.2%} of the pixels of "
            f"{change.num_images} images change class, and max_changed allows "
            f"{wanted.max_changed:.2%}. Calibrate int8 with more images like those that the model "
            "will see (num_calibration), take a higher precision, or raise max_changed"
        )
