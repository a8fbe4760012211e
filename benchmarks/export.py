"""Exported models against the model they come from, torchvision's, and PyTorch's own export.

Each model has torchvision's architecture and random weights, batch norm statistics and affine
parameters, saved by PyTorch. The file is converted and exported as a user does it; all sizes are
left open. Each export gives logits, of which the largest difference, relative to the largest
logit, and the share of pixels of the same class are taken: from the model (which keeps batch norm
by itself) and from torchvision's.

Then the ONNX graph of ResNet-50 for 1x3x512x1024 is put beside the one that `torch.onnx.export`
writes of torchvision's model: nodes, bytes, and onnxruntime's seconds in turns. Ours takes uint8
pixels and normalises them; theirs is given normalised ones.

    pip install onnxscript                                # what torch.onnx.export needs
    python benchmarks/export.py --json export.json        # all: a quarter of an hour on two cores
    python benchmarks/export.py --markdown export.json    # print what the file holds

Needs the `test` extra. Exit code 1: a limit is broken.
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
from deeplab_jax.weights import saved_model as checkpoint

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
    """torchvision's model, and our checkpoint of the file that PyTorch saved."""
    reference = torch_reference.segmentation_model(name, aux=True)
    torch.save(reference.state_dict(), folder / f"{name}.pth")
    deeplab_jax.convert(folder / f"{name}.pth", folder / name)
    return reference, folder / name


def photo_like(shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 `[n, h, w, 3]`: noise of all scales, as edges and surfaces of photos have."""
    count, height, width = shape
    rng = np.random.default_rng(sum(shape))
    total = np.zeros((count, height, width, 3))
    for cell in (1, 4, 16, 64):
        coarse = rng.normal(size=(count, -(-height // cell), -(-width // cell), 3))
        total += coarse.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    return np.clip(127.5 + 40 * total, 0, 255).astype(np.uint8)


def normalized(program: Program, images: np.ndarray) -> Any:
    """The images as torchvision's model takes them."""
    info = program.saved.info
    pixels = (images / 255 - np.array(info["mean"])) / np.array(info["std"])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32).copy())


def differences(name: str, folder: pathlib.Path, keep: Callable[[Row], None]) -> None:
    """Measures a model's exports at each shape."""
    reference, saved = save_and_convert(name, folder)
    program = Program(checkpoint.read(saved), "logits", Dimensions())
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


class OutAlone(torch.nn.Module):
    """A segmentation model that gives the logits alone, not a dictionary."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> Any:
        return self.model(images)["out"]


def graphs(folder: pathlib.Path) -> Row:
    """Our graph beside PyTorch's, of the same weights, size and output."""
    name, (count, height, width) = TIMED
    reference, saved = save_and_convert(name, folder)
    program = Program(checkpoint.read(saved), "logits", Dimensions())
    images = photo_like(TIMED[1])
    theirs_path, ours_path = folder / "theirs.onnx", folder / "ours.onnx"
    inputs = normalized(program, images)
    torch.onnx.export(OutAlone(reference).eval(), (inputs,), theirs_path, external_data=False)
    sizes = {"batch": count, "height": height, "width": width}
    export(saved, ours_path, output="logits", layout="nchw", **sizes)
    ours = session(ours_path, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    theirs = session(theirs_path, inputs.numpy())
    expected, given = theirs(), ours()
    seconds = []
    for turn in range(ROUNDS):  # who comes first changes too
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


def broken(result: Row) -> list[str]:
    """What is beyond a limit, a sentence each."""
    problems = []
    for row in result["rows"]:
        limit = LIMITS[f".{row['format']}"]
        if not (row["to_model"] <= limit and row["same_class_as_model"] >= AGREEMENT):
            problems.append(f"beyond {limit:g} or {AGREEMENT:.2%}: {row}")
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
            f"Logits differ by {graph['difference']:.1e}; {graph['same_class']:.4%} of pixels have "
            f"the same class. Theirs takes {graph['ratio']:.2f} times our time (the median of "
            f"{len(turns)} turns, {turns[0]:.2f} to {turns[-1]:.2f}).",
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file of results, written as they come")
    parser.add_argument("--markdown", type=pathlib.Path, help="print this file's tables and end")
    parser.add_argument(
        "--graphs", action="store_true", help="measure the graphs alone, and keep the file's rows"
    )
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="as it is to be named")
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
    problems = broken(result)
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
