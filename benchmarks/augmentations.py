"""Measures the CPU time that each augmentation adds to a crop of 513 x 513, in milliseconds.

    python benchmarks/augmentations.py

The image is of generated shapes and VOC's size, 500 x 375. Times are means over random draws; that
of `max_class_share` depends on the labels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np

from deeplab_jax.config import ShapesConfig
from deeplab_jax.data import color, mixing, randomness
from deeplab_jax.data.augment import augment
from deeplab_jax.data.datasets import shapes

_CROP = (513, 513)
_FILL = np.array([124, 116, 104], np.uint8)


def operations() -> dict[str, Callable[[np.random.Generator], object]]:
    """Returns each operation as a function of a generator; "warp" is the crop without any."""
    drawn = shapes.draw(randomness.generator(0, randomness.SHAPES_TRAIN, 1), ShapesConfig(size=500))
    image, label = (array[:375] for array in drawn)

    out = np.empty((*_CROP, 3), np.uint8), np.empty(_CROP, np.uint8)

    def warp(rng: np.random.Generator, **options: float) -> mixing.Crop:
        ranges = {"scale_range": (0.5, 2.0), "flip": True, "fill": _FILL}
        return augment(image, label, rng, crop=_CROP, **ranges, **options, out=out)

    first, second = (
        tuple(array.copy() for array in warp(np.random.default_rng(seed))) for seed in (0, 1)
    )
    pixels = first[0].copy()
    return {
        "warp": warp,
        "photometric": lambda rng: color.photometric(_copy(first[0], pixels), rng.random(9)),
        "color_jitter": lambda rng: color.color_jitter(_copy(first[0], pixels), 0.5, rng.random(8)),
        "gray": lambda rng: color.gray(_copy(first[0], pixels)),
        "blur": lambda rng: color.blur(_copy(first[0], pixels), rng.random()),
        "rotation": lambda rng: warp(rng, rotation=10.0),
        "max_class_share": lambda rng: warp(rng, max_class_share=0.75),
    } | {
        name: lambda rng, mask=mask: mixing.paste(
            first, second, mask(second[1], rng, shapes.LABELS)
        )
        for name, mask in mixing.MASKS.items()
    }


def _copy(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    np.copyto(out, image)
    return out


def measure(repeats: int) -> dict[str, float]:
    """Returns the mean milliseconds of each operation, which take turns."""
    cv2.setNumThreads(0)
    functions = operations()
    totals = dict.fromkeys(functions, 0.0)
    for repeat in range(repeats):
        for name, function in functions.items():
            rng = np.random.default_rng(repeat)
            start = time.thread_time()
            function(rng)
            totals[name] += time.thread_time() - start
    return {name: 1000 * total / repeats for name, total in totals.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    times = measure(parser.parse_args().repeats)
    for name, milliseconds in times.items():
        extra = milliseconds - (times["warp"] if name in ("rotation", "max_class_share") else 0)
        print(f"{name:<16}{extra:5.2f} ms")
