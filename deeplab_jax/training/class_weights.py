"""Class weights from the frequencies of the classes in the training split."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
from jaxtyping import Float, Int

from deeplab_jax.config import LossConfig
from deeplab_jax.data import statistics
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.utils.errors import UserError


def resolve(config: LossConfig, dataset: Dataset, *, quiet: bool = False) -> LossConfig:
    """Returns the config with `class_weights="auto"` replaced by numbers, which it prints.

    The weights depend on the training split only, so all hosts and a resumed run compute the same.

    Raises:
      UserError: the number of weights is not the number of classes, or an example is damaged.
    """
    names, given = dataset.labels.names, config.class_weights
    if isinstance(given, tuple | list) and len(given) != len(names):
        raise UserError(
            f"config.loss.class_weights has {len(given)} numbers, but the data set has "
            f"{len(names)} classes: {', '.join(names)}"
        )
    if given != "auto":
        return config
    # Of each class: its pixels, and the valid pixels of the images that contain it.
    pixels, image_pixels = np.zeros((2, len(names)), np.int64)
    for counts in statistics.class_pixels(dataset, "class frequencies", quiet=quiet):
        pixels += counts
        image_pixels += np.where(counts > 0, counts.sum(), 0)
    weights = median_frequency_weights(pixels, image_pixels)
    if not quiet:
        text = ", ".join(
            f"{name} {weight:.3g}" + ("" if count else " (no pixels)")
            for name, weight, count in zip(names, weights, pixels, strict=True)
        )
        print(f"class weights: {text}", file=sys.stderr, flush=True)
    return dataclasses.replace(config, class_weights=tuple(weights.tolist()))


def median_frequency_weights(
    pixels: Int[np.ndarray, " classes"], image_pixels: Int[np.ndarray, " classes"]
) -> Float[np.ndarray, " classes"]:
    """Returns `median(f) / f_c`, with `f_c` the frequency of class c in images that contain it.

    It is the number of its pixels, divided by that of all valid pixels of these images. A class
    without pixels gets weight 1 and does not count in the median.

    Source: Eigen and Fergus 2015, arXiv 1411.4734, section on semantic labels.
    """
    present = pixels > 0
    frequency = pixels[present] / image_pixels[present]
    weights = np.ones(len(pixels))
    if present.any():
        weights[present] = np.median(frequency) / frequency
    return weights
