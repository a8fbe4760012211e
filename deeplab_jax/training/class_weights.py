"""Class weights from the frequencies of the classes in the training split."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from deeplab_jax.config import LossConfig
from deeplab_jax.data import statistics
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.utils.errors import UserError


def resolve(config: LossConfig, dataset: Dataset, *, quiet: bool = False) -> LossConfig:
    """Returns the config with `class_weights="auto"` replaced by numbers.

    The weights depend on the data only, so all hosts and a resumed run compute the same ones.

    Args:
      config: loss branch of the config.
      dataset: training split.
      quiet: neither show progress nor print the weights.

    Raises:
      UserError: the number of weights is not the number of classes, or an example is damaged.
    """
    if config.class_weights is None:
        return config
    names = dataset.labels.names
    if config.class_weights == "auto":
        pixels, image_pixels = count_pixels(dataset, quiet=quiet)
        weights = median_frequency_weights(pixels, image_pixels)
        if not quiet:
            _print(weights, pixels, names)
        return dataclasses.replace(config, class_weights=tuple(weights.tolist()))
    given = len(config.class_weights)  # type: ignore[arg-type]  # `validate` saw that it is numbers
    if given != len(names):
        raise UserError(
            f"config.loss.class_weights has {given} numbers, but the data set has "
            f"{len(names)} classes: {', '.join(names)}"
        )
    return config


def count_pixels(
    dataset: Dataset, *, quiet: bool = False
) -> tuple[Int[np.ndarray, " classes"], Int[np.ndarray, " classes"]]:
    """Returns the pixels of each class, and the valid pixels of the images that contain it."""
    pixels, image_pixels = np.zeros((2, dataset.labels.num_classes), np.int64)
    for counts in statistics.class_pixels(dataset, "class frequencies", quiet=quiet):
        pixels += counts
        image_pixels += np.where(counts > 0, counts.sum(), 0)
    return pixels, image_pixels


def median_frequency_weights(
    pixels: Int[np.ndarray, " classes"], image_pixels: Int[np.ndarray, " classes"]
) -> Float[np.ndarray, " classes"]:
    """Returns `median(f) / f_c`, with `f_c` the frequency of class c in images that contain it.

    A class without pixels has no frequency: it gets weight 1 and does not count in the median.

    Args:
      pixels: number of pixels of each class.
      image_pixels: for each class, number of valid pixels of the images that contain it.

    Source: Eigen and Fergus 2015, arXiv 1411.4734, section on semantic labels.
    """
    present = pixels > 0
    frequency = pixels[present] / image_pixels[present]
    weights = np.ones(len(pixels))
    if present.any():
        weights[present] = np.median(frequency) / frequency
    return weights


def _print(weights: np.ndarray, pixels: np.ndarray, names: tuple[str, ...]) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    text = ", ".join(
        f"{name} {weight:.3g}" + ("" if count else " (no pixels)")
        for name, weight, count in zip(names, weights, pixels, strict=True)
    )
    console.print(f"class weights: {text}", markup=False)
