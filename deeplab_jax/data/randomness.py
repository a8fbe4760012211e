"""Random numbers as a function of (seed, stream, index), without any state."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int

# Independent streams of random numbers from one seed.
ORDER, AUGMENT, SHAPES_TRAIN, SHAPES_VAL, MIX = range(5)


def _philox(seed: int, stream: int, index: int) -> np.random.Philox:
    """Returns a counter-based bit generator (Salmon et al. 2011).

    The index is the highest word of the counter, so the draws of two indices do not overlap.
    """
    counter = np.array([0, 0, 0, index], np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed % 2**64, stream], np.uint64))


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Returns the random generator of one item, for a purpose such as `AUGMENT`; index >= 0."""
    return np.random.Generator(_philox(seed, stream, index))


@functools.lru_cache(maxsize=4)  # few epochs share a batch
def permutation(size: int, seed: int, epoch: int) -> Int[np.ndarray, " size"]:
    """Returns the order of `size` examples in an epoch; read-only.

    Sorts raw draws, which NumPy promises never to change. `Generator.permutation` may change
    between versions.
    """
    order = np.argsort(_philox(seed, ORDER, epoch).random_raw(size), kind="stable")
    order.flags.writeable = False
    return order
