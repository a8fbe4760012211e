"""One pass over a split, for what must be known of all its images before something starts."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.io.reading import watch
from deeplab_jax.data.labels import IGNORE

_Result = TypeVar("_Result")


def over_examples(
    function: Callable[[Example], _Result], dataset: Dataset, title: str, *, quiet: bool = False
) -> Iterator[_Result]:
    """`function(example)` for each example, in order, on all cores.

    Args:
      function: runs in threads.
      dataset: whose examples are read and looked at as for a batch.
      title: of the progress bar on stderr.
      quiet: show no bar.

    Raises:
      UserError: an example is damaged.
    """
    total = len(dataset.source)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda index: function(pipeline.read(dataset, index)), range(total))
        yield from results if quiet else watch(results, title, total)


def class_pixels(
    dataset: Dataset, title: str, *, quiet: bool = False
) -> Iterator[Int[np.ndarray, " classes"]]:
    """Pixels of each class in each image, in order; see `over_examples`."""
    classes = dataset.labels.num_classes

    def count(example: Example) -> np.ndarray:
        return np.bincount(example["label"].ravel(), minlength=IGNORE + 1)[:classes]

    return over_examples(count, dataset, title, quiet=quiet)
