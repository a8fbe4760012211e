"""Measures how many training images the host prepares per second, by number of workers.

Each image is decoded from JPEG (its mask from PNG), scaled, cropped to 513 x 513, flipped, and
stacked into batches of 16, as in `configs/voc_os16.py`. torchvision's reference transforms process
the same files in PyTorch's DataLoader, alternating with this package. Of this package it also
measures the CPU time that a batch costs the main process, and the share of time that a training
loop waits for data whose steps take --step-ms on a device.

    python benchmarks/input_pipeline.py                      # on generated images of VOC's size
    python benchmarks/input_pipeline.py --root ~/data/voc    # on VOC 2012 itself
    python benchmarks/input_pipeline.py --alone --workers 1 4 8 12 14    # without torchvision

Needs the `test` extra, or torch and torchvision, except with --alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from deeplab_jax import data
from deeplab_jax.config import DataConfig, ShapesConfig, crop_shape
from deeplab_jax.data import pipeline, randomness
from deeplab_jax.data.augment import augment
from deeplab_jax.data.dataset import Dataset, Example, read_example
from deeplab_jax.data.datasets import shapes

_SIZE = (375, 500)  # height and width of most images of VOC, pixels
_SHAPES = ShapesConfig(size=_SIZE[1])
_NUM_IMAGES = 64
_PACKAGES = ("numpy", "opencv-python-headless", "pillow")
_JPEG_QUALITY = 92  # makes files of about 100 kB, as VOC's


class Files:
    """Generated shapes, written as pairs of an image `NNN.jpg` and a mask of ids `NNN.png`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        for index in range(_NUM_IMAGES):
            rng = randomness.generator(0, randomness.SHAPES_TRAIN, index)
            image, label = (array[: _SIZE[0], : _SIZE[1]] for array in shapes.draw(rng, _SHAPES))
            quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
            cv2.imwrite(str(folder / f"{index:03d}.jpg"), image[:, :, ::-1], quality)
            cv2.imwrite(str(folder / f"{index:03d}.png"), label)

    @property
    def pairs(self) -> list[tuple[pathlib.Path, pathlib.Path]]:
        names = [f"{index:03d}" for index in range(_NUM_IMAGES)]
        return [(self._folder / f"{name}.jpg", self._folder / f"{name}.png") for name in names]

    def __len__(self) -> int:
        return _NUM_IMAGES

    def __getitem__(self, index: int) -> Example:
        name = f"{index:03d}"
        image = cv2.imread(str(self._folder / f"{name}.jpg"), cv2.IMREAD_COLOR_RGB)
        label = cv2.imread(str(self._folder / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        return {"image": image, "label": label, "name": name}


def voc_pairs(root: str, split: str) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Returns the files of images and masks that torchvision's own data set would use."""
    (folder,) = pathlib.Path(root).glob("**/VOC2012")
    names = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    return [
        (folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png")
        for name in names
    ]


def median_cpu_seconds(function: Callable[[int], object], count: int) -> float:
    seconds = []
    for index in range(count):
        start = time.thread_time()
        function(index)
        seconds.append(time.thread_time() - start)
    return float(np.median(seconds))


def stage_milliseconds(dataset: Dataset, config: DataConfig) -> dict[str, float]:
    """Returns the CPU time of each stage for one image; other programs do not affect it."""
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
    checked = median_cpu_seconds(lambda index: read_example(dataset, index), count)
    return {
        "decode": 1e3 * decode,
        "check": 1e3 * max(checked - decode, 0),
        "augment": 1e3 * median_cpu_seconds(warp, count),
    }


def their_milliseconds(files: Any) -> float:
    """Returns the CPU time of torchvision's transforms for one image, on one core."""
    import torch

    torch.set_num_threads(1)
    return 1e3 * median_cpu_seconds(lambda index: files[index], _NUM_IMAGES)


def measure(
    batches: Iterator[object], warmup: int, batch_size: int, steps: int, step_seconds: float = 0
) -> tuple[float, float, float]:
    """Measures batches that come after those that were buffered before.

    Returns:
      Images per second, this process's CPU time per batch in ms, and the share of time that it
      waits for data.
    """
    for _ in range(warmup):
        next(batches)
    waiting, cpu, start = 0.0, time.process_time(), time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(batches)
        waiting += time.perf_counter() - before
        time.sleep(step_seconds)
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    return batch_size * steps / seconds, 1e3 * cpu / steps, waiting / seconds


def turns(
    dataset: Dataset, config: DataConfig, files: Any | None, num_workers: int, args: Any
) -> dict[str, Any]:
    """Measures both packages alternately; returns medians and the range of the ratio."""
    config = dataclasses.replace(config, num_workers=num_workers)
    warmup, size = 4 * max(num_workers, 1) + 5, args.batch_size
    steps, step_seconds = args.steps * max(num_workers, 1), args.step_ms / 1e3
    ours, theirs = [], []
    for _ in range(args.turns):
        with pipeline.train_batches(
            dataset, config, batch_size=size, seed=0, start_step=0
        ) as batches:
            ours.append(measure(batches, warmup, size, steps, step_seconds))
        if files is not None:
            from torchvision_input import batches as their_batches

            loader = their_batches(files, num_workers, size)
            theirs.append(measure(loader, warmup, size, steps, step_seconds)[0])
            del loader  # stops its processes
    ratios = [row[0] / other for row, other in zip(ours, theirs, strict=False)]
    throughput, cpu, waiting = map(statistics.median, zip(*ours, strict=True))
    return {
        "workers": num_workers,
        "images_per_second": throughput,
        "main_cpu_milliseconds_a_batch": cpu,
        "wait_share": waiting,
        "theirs_images_per_second": statistics.median(theirs) if theirs else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratio_low": min(ratios, default=None),
        "ratio_high": max(ratios, default=None),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="folder of VOC; default: generated images")
    parser.add_argument("--split", default="train", help="split of VOC (default: train)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--steps", type=int, default=20, help="number of batches per worker (default: 20)"
    )
    parser.add_argument(
        "--step-ms", type=float, default=0, help="time of a training step, ms (default: 0)"
    )
    parser.add_argument("--turns", type=int, default=3, help="runs of each package (default: 3)")
    parser.add_argument("--alone", action="store_true", help="without torchvision")
    parser.add_argument(
        "--machine", default=f"{os.cpu_count()} cores", help="description of this machine"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    return parser.parse_args()


def main() -> None:
    args = parse()
    load_before = os.getloadavg()[0]
    config = DataConfig(root=args.root or "")
    with tempfile.TemporaryDirectory() as folder:
        if args.root:
            dataset, pairs = data.load(config, args.split), voc_pairs(args.root, args.split)
        else:
            source = Files(pathlib.Path(folder))
            dataset, pairs = Dataset(source, shapes.LABELS), source.pairs
        files = None
        if not args.alone:
            import torchvision_input

            files = torchvision_input.Files(pairs, config, shorter_side=min(_SIZE))
        stages = stage_milliseconds(dataset, config)
        theirs = None if files is None else their_milliseconds(files)
        rows = [turns(dataset, config, files, workers, args) for workers in args.workers]
    console = Console()
    table = Table("stage", "CPU ms an image")
    for stage, milliseconds in stages.items():
        table.add_row(stage, f"{milliseconds:.2f}")
    table.add_row("all", f"{sum(stages.values()):.2f}")
    if theirs is not None:
        table.add_row("torchvision, all", f"{theirs:.2f}")
    console.print(table)
    titles = ("workers", "images/s", "main ms", "waits", "theirs", "ratio", "least", "largest")
    table = Table(*titles)
    for row in rows:
        table.add_row(*("-" if value is None else f"{value:.4g}" for value in row.values()))
    console.print(table)
    packages = _PACKAGES if args.alone else (*_PACKAGES, "torch", "torchvision")
    if args.json:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": args.machine,
            "load_average_before": load_before,  # of other programs: they share the cores
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in packages},
            "images": f"VOC {args.split}" if args.root else "generated, 500 x 375, JPEG",
            "crop": list(crop_shape(config)),
            "batch_size": args.batch_size,
            "step_milliseconds": args.step_ms,
            "cpu_milliseconds_an_image": stages,
            "theirs_cpu_milliseconds_an_image": theirs,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
