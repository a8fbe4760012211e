"""Random numbers as a function of (seed, stream, index): nothing is carried from draw to draw."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int

# Streams of one seed, each with its own numbers.
ORDER, AUGMENT, SHAPES_TRAIN, SHAPES_VAL = range(4)


def _philox(seed: int, stream: int, index: int) -> np.random.Philox:
    """A counter-based generator (Salmon et al. 2011): any index at once, no state to advance.

    The index is the counter's highest word, so the draws of two indices do not overlap.
    """
    counter = np.array([0, 0, 0, index], np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed % 2**64, stream], np.uint64))


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The generator of one item.

    Args:
      seed: any whole number.
      stream: what the numbers are for, as `AUGMENT`.
      index: of the item, 0 or more.
    """
    return np.random.Generator(_philox(seed, stream, index))


@functools.lru_cache(maxsize=4)  # a batch spans an epoch's end, and rarely more
def permutation(size: int, seed: int, epoch: int) -> Int[np.ndarray, " size"]:
    """The order in which `size` examples come in an epoch; read-only.

    It sorts raw draws, whose values NumPy promises never to change, where those of
    `Generator.permutation` may change with its version.
    """
    order = np.argsort(_philox(seed, ORDER, epoch).random_raw(size), kind="stable")
    order.flags.writeable = False
    return order
