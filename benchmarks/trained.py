"""Compares a trained network in a TFLite file with its conversion, image by image, on VOC.

The original runs in `ai-edge-litert` (extra `certify`), in 8 bits, on images padded to its input
with grey. The conversion computes in float32 from the dequantised weights: on the same padded
images, and as `predict` does, on images of their own size.

    python -m benchmarks.trained deeplabv3_mnv2_pascal_quant.tflite VOCdevkit/VOC2012
    python -m benchmarks.trained FILE.tflite VOC2012 --json trained.json --pictures out/
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import pathlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich import progress
from rich.console import Console

import deeplab_jax as dl
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.data.labels import VOC
from deeplab_jax.evaluation.confusion import confusion_matrix, scores

SCORED = ("background", "cat", "cow", "dog", "horse", "person", "sheep")
BOUNDARY = 8  # pixels
GREY = 128  # the value of a pixel that the network reads as 0


def original(path: str) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int]]:
    """Returns a function from uint8 `[h, w, 3]` to ids `[h, w]`, and the size of its input."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=2)
    interpreter.allocate_tensors()
    image, ids = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(pixels: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        return interpreter.get_tensor(ids["index"])[0]

    return run, tuple(image["shape"][1:3])


def compare(weights: str, voc: pathlib.Path, limit: int | None) -> dict[str, Any]:
    """Returns the scores of the original and of the conversion, and how far they agree."""
    run, (height, width) = original(weights)
    segmenter = dl.load(weights)
    names = (voc / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:limit]
    matrices = {who: np.zeros((21, 21), np.int64) for who in ("original", "padded", "own size")}
    images, num_different, num_near = [], 0, 0
    for name in progress.track(names, console=Console(stderr=True)):
        pixels = np.asarray(Image.open(voc / "JPEGImages" / f"{name}.jpg").convert("RGB"))
        labels = np.asarray(Image.open(voc / "SegmentationClass" / f"{name}.png"))
        rows, columns = labels.shape
        padded = np.full((height, width, 3), GREY, np.uint8)
        padded[:rows, :columns] = pixels
        ids = {
            "original": run(padded)[:rows, :columns],
            "padded": segmenter.predict(padded)[:rows, :columns],
            "own size": segmenter.predict(pixels),
        }
        for who, found in ids.items():
            matrices[who] += confusion_matrix(labels, found.astype(np.int32), 21)
        same = {who: float((ids[who] == ids["original"]).mean()) for who in ("padded", "own size")}
        images.append({"image": name, "pixels": labels.size, **same})
        different = ids["original"] != ids["padded"]
        num_different += int(different.sum())
        num_near += int((different & near_boundary(ids["original"])).sum())
    total = sum(each["pixels"] for each in images)
    return {
        "images": len(images),
        "same_class": {
            who: sum(each[who] * each["pixels"] for each in images) / total
            for who in ("padded", "own size")
        },
        "different_near_a_boundary": num_near / max(1, num_different),
        "scores": {who: _scores(matrix) for who, matrix in matrices.items()},
        "per_image": images,
    }


def near_boundary(ids: np.ndarray) -> np.ndarray:
    """Whether each pixel is within `BOUNDARY` pixels of another class."""
    kernel = np.ones((2 * BOUNDARY + 1,) * 2, np.uint8)
    ids = ids.astype(np.uint8)
    return cv2.dilate(ids, kernel) != cv2.erode(ids, kernel)


def _scores(matrix: np.ndarray) -> dict[str, Any]:
    found = scores(matrix)
    by_name = dict(zip(VOC.names, found.per_class_iou.tolist(), strict=True))
    return {
        "miou_background_and_animals": float(np.mean([by_name[name] for name in SCORED])),
        "miou": found.miou,
        "pixel_accuracy": found.pixel_accuracy,
        "iou": {name: by_name[name] for name in SCORED},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", help=".tflite file")
    parser.add_argument("voc", type=pathlib.Path, help="folder VOC2012")
    parser.add_argument("--limit", type=int, help="number of images; default: all of val")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    arguments = parser.parse_args()
    result = compare(arguments.weights, arguments.voc, arguments.limit)
    packages = ("ai-edge-litert", "jax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = {"date": datetime.date.today().isoformat(), "versions": versions} | result
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    worst = sorted(result.pop("per_image"), key=lambda each: each["padded"])[:5]
    print(json.dumps(result | {"least_alike": worst}, indent=2))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
