"""Compares exported models with the original model, torchvision's model, and PyTorch's export.

Each model has torchvision's architecture and random weights, batch norm statistics and affine
parameters, saved by PyTorch. The file is converted and exported with the user's commands, with
symbolic sizes. The logits of each export are compared with those of the model (whose batch norm is
not fused) and with torchvision's: the largest difference relative to the largest logit, and the
fraction of pixels with the same class.

The ONNX graph of ResNet-50 for 1x3x512x1024 is also compared with the one that `torch.onnx.export`
writes for torchvision's model: nodes, bytes, and onnxruntime's time in alternating runs. This
package's graph takes uint8 pixels and normalizes them; the other takes normalized images.

    pip install onnxscript                                # torch.onnx.export needs it
    python benchmarks/export.py --json export.json        # all: a quarter of an hour on two cores
    python benchmarks/export.py --markdown export.json    # prints the recorded tables

Needs the `test` extra. Exits with 1 if a difference exceeds its limit.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime

import deeplab_jax
from deeplab_jax.export import onnx as onnx_export
from deeplab_jax.export import stablehlo
from deeplab_jax.export.compare import difference
from deeplab_jax.export.export import LIMITS, export
from deeplab_jax.export.program import Dimensions, Program
from deeplab_jax.weights import saved_model

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import torch_reference
from torch_reference import torch

MODELS = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101")
SHAPES = ((1, 129, 257), (2, 131, 203), (5, 65, 97), (1, 512, 1024))  # images, height, width
TIMED = ("deeplabv3_resnet50", (1, 512, 1024))
ROUNDS = 15
PACKAGES = ("flax", "jax", "jaxlib", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")
LOADERS = {".stablehlo": stablehlo.load, ".onnx": onnx_export.load}
AGREEMENT = 0.9999

Row = dict[str, Any]


def save_and_convert(name: str, folder: pathlib.Path) -> tuple[Any, pathlib.Path]:
    """Returns torchvision's model, and the path of a checkpoint converted from its file."""
    reference = torch_reference.segmentation_model(name, aux=True)
    torch.save(reference.state_dict(), folder / f"{name}.pth")
    deeplab_jax.convert(folder / f"{name}.pth", folder / name)
    return reference, folder / name


def photo_like(shape: tuple[int, int, int]) -> np.ndarray:
    """Returns uint8 images `[n, h, w, 3]` of noise at several scales, similar to photos."""
    count, height, width = shape
    rng = np.random.default_rng(sum(shape))
    total = np.zeros((count, height, width, 3))
    for cell in (1, 4, 16, 64):
        coarse = rng.normal(size=(count, -(-height // cell), -(-width // cell), 3))
        total += coarse.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    return np.clip(127.5 + 40 * total, 0, 255).astype(np.uint8)


def normalized(program: Program, images: np.ndarray) -> Any:
    """Returns the images as input of torchvision's model."""
    info = program.saved.info
    pixels = (images / 255 - np.array(info["mean"])) / np.array(info["std"])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32).copy())


def differences(name: str, folder: pathlib.Path, keep: Callable[[Row], None]) -> None:
    """Measures a model's exports at each shape."""
    reference, saved = save_and_convert(name, folder)
    program = Program(saved_model.read(saved), "logits", Dimensions())
    exports = {}
    for suffix, load in LOADERS.items():
        done = export(saved, folder / f"{name}{suffix}", output="logits")
        exports[suffix] = load(done.path)
    model = jax.jit(program.reference)
    for shape in SHAPES:
        images = photo_like(shape)
        with torch.no_grad():
            theirs = reference(normalized(program, images))["out"].numpy().transpose(0, 2, 3, 1)
        logits = np.asarray(model(program.saved.variables, images))
        for suffix, run in exports.items():
            result = run(images)
            to_model, agreement = difference("logits", logits, result)
            to_theirs, their_agreement = difference("logits", theirs, result)
            keep(
                {
                    "model": name, "format": suffix.lstrip("."), "shape": list(shape),
                    "to_model": to_model, "same_class_as_model": agreement,
                    "to_torchvision": to_theirs, "same_class_as_torchvision": their_agreement,
                }
            )  # fmt: skip
    jax.clear_caches()


class LogitsOnly(torch.nn.Module):
    """A segmentation model that returns only the logits, not a dictionary."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> Any:
        return self.model(images)["out"]


def graphs(folder: pathlib.Path) -> Row:
    """Compares this package's graph with PyTorch's, for the same weights, size and output."""
    name, (count, height, width) = TIMED
    reference, saved = save_and_convert(name, folder)
    program = Program(saved_model.read(saved), "logits", Dimensions())
    images = photo_like(TIMED[1])
    theirs_path, ours_path = folder / "theirs.onnx", folder / "ours.onnx"
    inputs = normalized(program, images)
    torch.onnx.export(LogitsOnly(reference).eval(), (inputs,), theirs_path, external_data=False)
    sizes = {"batch": count, "height": height, "width": width}
    export(saved, ours_path, output="logits", layout="nchw", **sizes)
    ours = session(ours_path, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    theirs = session(theirs_path, inputs.numpy())
    expected, given = theirs(), ours()
    seconds = []
    for turn in range(ROUNDS):  # the order alternates too
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        taken = {run: timed(run) for run in order}
        seconds.append((taken[ours], taken[theirs]))
    return {
        "model": name,
        "shape": list(TIMED[1]),
        "difference": float(np.abs(expected - given).max() / np.abs(expected).max()),
        "same_class": float(np.mean(expected.argmax(1) == given.argmax(1))),
        "ours": graph_of(ours_path) | {"seconds": statistics.median(one for one, _ in seconds)},
        "theirs": graph_of(theirs_path) | {"seconds": statistics.median(one for _, one in seconds)},
        "ratio": statistics.median(theirs / ours for ours, theirs in seconds),
        "ratios": sorted(theirs / ours for ours, theirs in seconds),
    }


def session(path: pathlib.Path, images: np.ndarray) -> Callable[[], np.ndarray]:
    loaded = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {loaded.get_inputs()[0].name: images}
    return lambda: loaded.run(None, feed)[0]


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def graph_of(path: pathlib.Path) -> Row:
    model = onnx.load(path)
    nodes = collections.Counter(node.op_type for node in model.graph.node)
    return {"nodes": dict(nodes.most_common()), "bytes": path.stat().st_size}


def violations(result: Row) -> list[str]:
    """Returns a sentence for each difference that exceeds its limit."""
    problems = []
    for row in result["rows"]:
        limit = LIMITS[f".{row['format']}"]
        if not (row["to_model"] <= limit and row["same_class_as_model"] >= AGREEMENT):
            problems.append(
                f"exceeds the limit {limit:g}, or agreement is below {AGREEMENT:.2%}: {row}"
            )
    return problems


def markdown(result: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"Measured on {result['date']}: {result['machine']}, {versions}.",
        "",
        "| model | format | images x height x width | from the model | same class "
        "| from torchvision's | same class |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['model'].removeprefix('deeplabv3_')} | {row['format']} "
            f"| {'x'.join(map(str, row['shape']))} "
            f"| {row['to_model']:.1e} | {row['same_class_as_model']:.4%} "
            f"| {row['to_torchvision']:.1e} | {row['same_class_as_torchvision']:.4%} |"
        )
    if graph := result.get("graphs"):
        ours, theirs, turns = graph["ours"], graph["theirs"], graph["ratios"]
        types = sorted({*ours["nodes"], *theirs["nodes"]})
        lines += ["", "| | this package | `torch.onnx.export` |", "|---|---|---|"]
        lines += [
            f"| {kind} | {ours['nodes'].get(kind, 0)} | {theirs['nodes'].get(kind, 0)} |"
            for kind in types
        ]
        lines += [
            f"| all nodes | {sum(ours['nodes'].values())} | {sum(theirs['nodes'].values())} |",
            f"| file, MB | {ours['bytes'] / 1e6:.1f} | {theirs['bytes'] / 1e6:.1f} |",
            f"| onnxruntime, s | {ours['seconds']:.2f} | {theirs['seconds']:.2f} |",
            "",
            f"The logits differ by {graph['difference']:.1e}; {graph['same_class']:.4%} of pixels "
            f"have the same class. The graph of `torch.onnx.export` takes {graph['ratio']:.2f} "
            f"times as long as this package's (median of {len(turns)} alternating runs, "
            f"{turns[0]:.2f} to {turns[-1]:.2f}).",
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=pathlib.Path, help="file to write the results to, one by one"
    )
    parser.add_argument(
        "--markdown", type=pathlib.Path, help="print the tables of this file, measure nothing"
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="measure only the graphs, and keep the rows of the file",
    )
    parser.add_argument(
        "--machine", default=f"{os.cpu_count()} cores", help="description of this machine"
    )
    args = parser.parse_args()
    if args.markdown:
        print(markdown(json.loads(args.markdown.read_text())))
        return 0
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    result: Row = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": args.machine,
        "versions": {"python": platform.python_version()} | versions,
        "rows": [],
    }

    def keep(row: Row) -> None:
        result["rows"].append(row)
        print(row, flush=True)
        write()

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    if args.graphs and args.json and args.json.exists():
        result["rows"] = json.loads(args.json.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        for name in () if args.graphs else MODELS:
            differences(name, pathlib.Path(folder), keep)
    with tempfile.TemporaryDirectory() as folder:
        result["graphs"] = graphs(pathlib.Path(folder))
    write()
    print(markdown(result))
    problems = violations(result)
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
