"""Compares exports in float32, float16 and int8: mIoU, pixels that change class, size and time.

The models: a trained MobileNetV2 (TensorFlow's, from a TFLite file) on PASCAL VOC val, a trained
ResNet-50 of a quarter of the width (`configs/shapes.py`) on generated shapes, and torchvision's
ResNet-50 with random weights on VOC's photos, which shows size and time but has no mIoU. The files
are calibrated on images of train, and run alternately in onnxruntime on the CPU.

    python train.py --config configs/shapes.py --workdir runs/shapes
    python -m benchmarks.quantisation deeplabv3_mnv2_pascal_quant.tflite VOCdevkit/VOC2012 \
        runs/shapes --json benchmarks/results/quantisation_cpu.json
    python -m benchmarks.quantisation --markdown benchmarks/results/quantisation_cpu.json

Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich import progress
from rich.console import Console

import deeplab_jax as dl
from benchmarks.trained import SCORED
from deeplab_jax import data as data_lib
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.config import io as config_io
from deeplab_jax.data.labels import VOC
from deeplab_jax.evaluation.confusion import confusion_matrix, scores
from deeplab_jax.export import onnx
from deeplab_jax.export.export import export
from deeplab_jax.export.program import Dimensions, Program
from deeplab_jax.export.quantise import Quantisation, quantise, read_images
from deeplab_jax.weights.convert import read_model

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

PRECISIONS = ("float32", "float16", "int8")
PACKAGES = ("jax", "numpy", "onnx", "onnxruntime")
Pair = tuple[np.ndarray, np.ndarray]  # uint8 image [h, w, 3], ids [h, w]


def measure(
    checkpoint: str | pathlib.Path,
    images: str,
    pairs: Sequence[Pair],
    scored: Iterable[int] | None,
    num_calibration: int,
) -> list[dict[str, Any]]:
    """Returns a row for each precision.

    Args:
      checkpoint: the model.
      images: see `Quantisation.images`.
      pairs: images to compare, and their labels.
      scored: classes whose IoU is averaged; None: the model has random weights.
      num_calibration: number of images to calibrate with.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder, f"{precision}.onnx") for precision in PRECISIONS]
        export(checkpoint, paths[0])
        program = Program(read_model(checkpoint), "ids", Dimensions())
        for precision, path in zip(PRECISIONS[1:], paths[1:], strict=True):
            shutil.copy(paths[0], path)
            wanted = Quantisation(precision, images, num_calibration)
            quantise(path, precision, read_images(wanted, checkpoint, program)[0], [])
        runs = [onnx.load(path) for path in paths]
        sizes = [path.stat().st_size for path in paths]
    seconds, changed = np.empty((len(pairs), 3)), np.zeros(3, np.int64)
    # 255 marks pixels that do not count.
    matrices = np.zeros((3, 255, 255), np.int64)
    for run in runs:
        run(pairs[0][0][None])  # the first run allocates memory
    for row, (image, labels) in enumerate(progress.track(pairs, console=Console(stderr=True))):
        found = []
        for column, run in enumerate(runs):
            start = time.perf_counter()
            found.append(run(image[None])[0])
            seconds[row, column] = time.perf_counter() - start
            changed[column] += (found[column] != found[0]).sum()
            if scored is not None:
                matrices[column] += confusion_matrix(labels, found[column].astype(np.int32), 255)
    num_pixels = sum(labels.size for _, labels in pairs)
    rows = []
    for column, precision in enumerate(PRECISIONS):
        miou = None
        if scored is not None:
            miou = float(scores(matrices[column]).per_class_iou[list(scored)].mean())
        rows.append(
            {
                "precision": precision, "images": len(pairs), "miou": miou,
                "changed": changed[column] / num_pixels, "num_bytes": sizes[column],
                "ms_per_image": 1000 * float(np.median(seconds[:, column])),
            }
        )  # fmt: skip
    return rows


def all_models(weights: str, voc: pathlib.Path, run: str, limit: int) -> dict[str, Any]:
    """Measures the three models, see the module."""
    import torch_reference

    def names(split: str) -> list[str]:
        return (voc / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()

    val = names("val")
    pairs = [
        (
            np.asarray(Image.open(voc / "JPEGImages" / f"{name}.jpg").convert("RGB")),
            np.asarray(Image.open(voc / "SegmentationClass" / f"{name}.png")),
        )
        for name in val[:: max(1, len(val) // limit)]
    ]
    with tempfile.TemporaryDirectory() as folder:
        photos = pathlib.Path(folder, "train")
        photos.mkdir()
        for name in names("train"):
            os.symlink((voc / "JPEGImages" / f"{name}.jpg").resolve(), photos / f"{name}.jpg")
        animals = [VOC.names.index(name) for name in SCORED]
        results = {
            "MobileNetV2, VOC": measure(weights, str(photos), pairs, animals, 32),
        }
        config = config_io.from_run(run)
        assert config is not None, f"{run} is no run of configs/shapes.py"
        shapes = data_lib.load(config.data, "val")
        drawn = [shapes.source[i] for i in range(len(shapes.source))]
        results["ResNet-50, quarter width, shapes"] = measure(
            run,
            "train",
            [(one["image"], one["label"]) for one in drawn],
            range(shapes.labels.num_classes),
            32,
        )
        reference = torch_reference.segmentation_model("deeplabv3_resnet50", aux=True)
        file = pathlib.Path(folder, "resnet50.pth")
        torch_reference.torch.save(reference.state_dict(), file)
        dl.convert(file, pathlib.Path(folder, "resnet50"))
        results["ResNet-50, random weights"] = measure(
            pathlib.Path(folder, "resnet50"), str(photos), pairs[:8], None, 8
        )
    return results


def markdown(result: dict[str, Any]) -> str:
    """Returns the table of the documentation."""
    lines = [
        "| model | precision | images | mIoU % | pixels changed % | MB | ms per image |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, rows in result["models"].items():
        for row in rows:
            miou = "" if row["miou"] is None else f"{100 * row['miou']:.2f}"
            lines.append(
                f"| {model} | {row['precision']} | {row['images']} | {miou} "
                f"| {100 * row['changed']:.2f} | {row['num_bytes'] / 1e6:.1f} "
                f"| {row['ms_per_image']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", nargs="?", help=".tflite file")
    parser.add_argument("voc", nargs="?", type=pathlib.Path, help="folder VOC2012")
    parser.add_argument("run", nargs="?", help="workdir of a run of configs/shapes.py")
    parser.add_argument("--limit", type=int, default=77, help="number of VOC's images")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    parser.add_argument("--markdown", type=pathlib.Path, help="print the table of this file")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return
    if arguments.run is None:
        parser.error("give the .tflite file, the folder VOC2012 and the run, or --markdown")
    result = {
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "models": all_models(arguments.weights, arguments.voc, arguments.run, arguments.limit),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
