"""Weights of classes by how often they occur in the training split."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from deeplab_jax.config import LossConfig
from deeplab_jax.data import statistics as passes
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.utils.errors import UserError


def resolve(config: LossConfig, dataset: Dataset, *, quiet: bool = False) -> LossConfig:
    """The config with `class_weights` as numbers, where it says "auto"; otherwise as it is.

    What is computed is a function of the data alone, so that a run that resumes and all its hosts
    have the same weights.

    Args:
      config: of the loss.
      dataset: the training split.
      quiet: show no progress, and do not print the weights.

    Raises:
      UserError: if there is another number of weights than of classes, or an example is damaged.
    """
    if config.class_weights is None:
        return config
    names = dataset.labels.names
    if config.class_weights == "auto":
        pixels, held = count_pixels(dataset, quiet=quiet)
        weights = median_frequency_weights(pixels, held)
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
    """Pixels of each class, and valid pixels of the images that hold it."""
    pixels, held = np.zeros((2, dataset.labels.num_classes), np.int64)
    for one in passes.class_pixels(dataset, "class frequencies", quiet=quiet):
        pixels += one
        held += np.where(one > 0, one.sum(), 0)
    return pixels, held


def median_frequency_weights(
    pixels: Int[np.ndarray, " classes"], held: Int[np.ndarray, " classes"]
) -> Float[np.ndarray, " classes"]:
    """`median(f) / f_c`, where `f_c` is the share of class c in the images that hold it.

    A class without pixels has no frequency: its weight is 1, and the median is of the others.

    Args:
      pixels: of each class.
      held: valid pixels of the images that hold the class.

    Source: Eigen and Fergus 2015, arXiv 1411.4734, on semantic labels.
    """
    present = pixels > 0
    frequency = pixels[present] / held[present]
    weights = np.ones(len(pixels))
    if present.any():
        weights[present] = np.median(frequency) / frequency
    return weights


def _print(weights: np.ndarray, pixels: np.ndarray, names: tuple[str, ...]) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    told = ", ".join(
        f"{name} {weight:.3g}" + ("" if count else " (no pixels)")
        for name, weight, count in zip(names, weights, pixels, strict=True)
    )
    console.print(f"class weights: {told}", markup=False)
