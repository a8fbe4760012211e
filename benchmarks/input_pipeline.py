"""Images a second that the host prepares for training, by number of worker processes.

Each image is decoded from JPEG (its mask from PNG), scaled, cropped to 513 x 513, flipped, and
stacked into batches of 16, as in `configs/voc_os16.py`.

    python benchmarks/input_pipeline.py                      # on generated images of VOC's size
    python benchmarks/input_pipeline.py --root ~/data/voc    # on VOC 2012 itself
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from deeplab_jax import data
from deeplab_jax.config import DataConfig, ShapesConfig, crop_shape
from deeplab_jax.data import pipeline, randomness, shapes
from deeplab_jax.data.augment import augment
from deeplab_jax.data.dataset import Dataset, Example

_SIZE = (375, 500)  # height and width of most images of VOC, pixels
_SHAPES = ShapesConfig(size=_SIZE[1])
_NUM_IMAGES = 64
_JPEG_QUALITY = 92  # makes files of about 100 kB, as VOC's


class Files:
    """Pairs of `NNN.jpg` and `NNN.png`, which hold the images and the ids of shapes."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        for index in range(_NUM_IMAGES):
            rng = randomness.generator(0, randomness.SHAPES_TRAIN, index)
            image, label = (array[: _SIZE[0], : _SIZE[1]] for array in shapes.draw(rng, _SHAPES))
            quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
            cv2.imwrite(str(folder / f"{index:03d}.jpg"), image[:, :, ::-1], quality)
            cv2.imwrite(str(folder / f"{index:03d}.png"), label)

    def __len__(self) -> int:
        return _NUM_IMAGES

    def __getitem__(self, index: int) -> Example:
        name = f"{index:03d}"
        image = cv2.imread(str(self._folder / f"{name}.jpg"), cv2.IMREAD_COLOR_RGB)
        label = cv2.imread(str(self._folder / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        return {"image": image, "label": label, "name": name}


def median_cpu_seconds(function: Callable[[int], object], count: int) -> float:
    seconds = []
    for index in range(count):
        start = time.thread_time()
        function(index)
        seconds.append(time.thread_time() - start)
    return float(np.median(seconds))


def stage_milliseconds(dataset: Dataset, config: DataConfig) -> dict[str, float]:
    """CPU time of each stage for one image, whatever else the machine does."""
    cv2.setNumThreads(0)
    count = min(len(dataset.source), _NUM_IMAGES)
    examples = [dataset.source[index] for index in range(count)]

    def warp(index: int) -> None:
        augment(
            examples[index]["image"],
            examples[index]["label"],
            randomness.generator(0, randomness.AUGMENT, index),
            crop=crop_shape(config),
            scale_range=(config.scale_range[0], config.scale_range[1]),
            flip=config.flip,
            fill=pipeline.mean_pixel(config),
        )

    decode = median_cpu_seconds(lambda index: dataset.source[index], count)
    checked = median_cpu_seconds(lambda index: pipeline.read(dataset, index), count)
    return {
        "decode": 1e3 * decode,
        "check": 1e3 * max(checked - decode, 0),
        "augment": 1e3 * median_cpu_seconds(warp, count),
    }


def throughput(
    dataset: Dataset, config: DataConfig, num_workers: int, batch_size: int, steps: int
) -> dict[str, float]:
    """Images a second once all buffers have been emptied, and the wait for the first batch."""
    config = dataclasses.replace(config, num_workers=num_workers)
    warmup = 4 * max(num_workers, 1)
    start = time.perf_counter()
    with pipeline.train_batches(
        dataset, config, batch_size=batch_size, seed=0, start_step=0
    ) as batches:
        next(batches)
        first = time.perf_counter() - start
        for _ in range(warmup):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        seconds = time.perf_counter() - start
    return {
        "workers": num_workers,
        "images_per_second": batch_size * steps / seconds,
        "first_batch_seconds": first,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="folder of VOC; without it, images are generated")
    parser.add_argument("--split", default="train", help="of VOC (default: train)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="batches timed (default: 20)")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="as it is to be named")
    parser.add_argument("--json", type=pathlib.Path, help="file that the results are written to")
    return parser.parse_args()


def main() -> None:
    args = parse()
    load_before = os.getloadavg()[0]
    config = DataConfig(root=args.root or "")
    with tempfile.TemporaryDirectory() as folder:
        if args.root:
            dataset = data.load(config, args.split)
        else:
            dataset = Dataset(Files(pathlib.Path(folder)), shapes.LABELS)
        stages = stage_milliseconds(dataset, config)
        rows = [
            throughput(dataset, config, workers, args.batch_size, args.steps)
            for workers in args.workers
        ]
    console = Console()
    table = Table("stage", "CPU ms an image")
    for stage, milliseconds in stages.items():
        table.add_row(stage, f"{milliseconds:.2f}")
    console.print(table)
    table = Table("workers", "images/s", "first batch, s")
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    console.print(table)
    if args.json:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": args.machine,
            "load_average_before": load_before,  # of other programs: they share the cores
            "versions": {"python": platform.python_version()}
            | {
                package: importlib.metadata.version(package)
                for package in ("grain", "numpy", "opencv-python-headless")
            },
            "images": f"VOC {args.split}" if args.root else "generated, 500 x 375, JPEG",
            "crop": list(crop_shape(config)),
            "batch_size": args.batch_size,
            "cpu_milliseconds_an_image": stages,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
