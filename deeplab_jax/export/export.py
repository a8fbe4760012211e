"""`export`: writes a model's program, and keeps the file only if it gives what the model gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from deeplab_jax.export import onnx, stablehlo
from deeplab_jax.export.compare import Comparison, compare
from deeplab_jax.export.program import OUTPUTS, Dimensions, Program
from deeplab_jax.models.ops.resize import MAX_SIDE
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.weights.convert import read_model

# Largest difference from the model that a file may have, relative to its largest logit.
LIMITS = {".stablehlo": 1e-5, ".onnx": 1e-4}


@dataclasses.dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
      path: of the file.
      num_bytes: its size.
      comparisons: with the model.
      limit: largest difference that was allowed.
      nodes: of an ONNX graph, how many there are of each type, the most frequent first.
    """

    path: pathlib.Path
    num_bytes: int
    comparisons: tuple[Comparison, ...]
    limit: float
    nodes: dict[str, int]


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
) -> Export:
    """Writes a model with its pre- and post-processing as StableHLO or ONNX.

    The program takes uint8 images and gives class ids (uint8), probabilities or logits (float32)
    at their size. It is loaded from the file and compared with the model before the file gets its
    name; one that was there before is replaced.

    Args:
      checkpoint: what `deeplab_jax.load` takes.
      destination: a file that ends in `.stablehlo` or `.onnx`.
      height, width: of the images, pixels; None: any.
      batch: number of images; None: any.
      output: a name in `program.OUTPUTS`.
      platforms: of StableHLO, names in `stablehlo.PLATFORMS`.
      layout: of an ONNX graph's images, probabilities and logits: "nhwc" or "nchw".

    Raises:
      UserError: a setting that cannot be, no model, a model that cannot be exported, a package of
        the extra `onnx` is missing, the file cannot be written, or its program differs from the
        model.
    """
    path = pathlib.Path(destination)
    dimensions = Dimensions(batch, height, width)
    _check(path, dimensions, output)
    if path.suffix == ".onnx":
        onnx.require()
        onnx.check_layout(layout)
    # On CPU wherever this runs: accelerators round products to fewer digits, each in its way.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        program = Program(read_model(checkpoint), output, dimensions)
        nodes: dict[str, int] = {}
        load: Callable[[pathlib.Path], Callable[[np.ndarray], np.ndarray]]
        if path.suffix == ".onnx":
            graph = onnx.to_onnx(program, layout)
            content, nodes, load = graph.SerializeToString(), onnx.count_nodes(graph), onnx.load
        else:
            content, load = stablehlo.serialize(program, platforms), stablehlo.load
        with _aside(path) as aside:
            aside.write_bytes(content)
            comparisons = compare(program, load(aside))
            _require_equal(path, comparisons, output, LIMITS[path.suffix])
            if path.suffix == ".stablehlo":
                text = json.dumps(program.description, indent=2) + "\n"
                write_bytes(path.with_name(path.name + ".json"), text.encode())
            os.replace(aside, path)
    return Export(path, len(content), tuple(comparisons), LIMITS[path.suffix], nodes)


def _check(path: pathlib.Path, dimensions: Dimensions, output: str) -> None:
    """What can be said before the model is read."""
    if path.suffix not in LIMITS:
        raise UserError(
            f"{path} must end in {' or '.join(LIMITS)}, which says what to export to, not in "
            f"{path.suffix or 'nothing'!r}"
        )
    if output not in OUTPUTS:
        raise UserError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    for name, size in dimensions._asdict().items():
        if size is not None and not 1 <= size <= MAX_SIDE:
            raise UserError(f"{name} must be 1 to {MAX_SIDE}, or left out for any, got {size}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, and would have to be a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written to: {error.strerror}") from None


@contextlib.contextmanager
def _aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where a file is written before it gets its name; nothing stays there."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _require_equal(
    path: pathlib.Path, comparisons: Sequence[Comparison], output: str, limit: float
) -> None:
    # Not a number is above each limit.
    wrong = [one for one in comparisons if not one.difference <= limit]
    if wrong:
        lines = (
            f"  {'x'.join(map(str, one.shape))}, {one.images}: {one.difference:.1e}"
            for one in wrong
        )
        raise UserError(
            f"{path} was not written: its {output} differ from the model's by more than "
            f"{limit:g} of the largest logit:\n" + "\n".join(lines)
        )
