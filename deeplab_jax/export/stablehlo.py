"""StableHLO: a program for CPU, CUDA and TPU that `jax.export` reads, without this package."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from deeplab_jax.export.program import Program
from deeplab_jax.utils.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")


def serialize(program: Program, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """The program as `jax.export.deserialize` reads it, for all these platforms at once.

    Args:
      program: to export; its arrays become part of the file.
      platforms: names in `PLATFORMS`, with "cpu" among them, where the file is tried.

    Raises:
      UserError: a platform that there is not, or no "cpu".
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or "cpu" not in platforms:
        raise UserError(
            f"platforms must be of {', '.join(PLATFORMS)}, and have cpu, where the file is tried; "
            f"got {','.join(platforms)}"
        )
    variables = jax.tree.map(jnp.asarray, program.variables)

    def segment(images: jax.Array) -> jax.Array:
        return program(variables, images)

    exported = export.export(jax.jit(segment), platforms=platforms)(program.images)
    return bytes(exported.serialize())


def load(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """The program of a file, as a function of uint8 `[n, h, w, c]`."""
    exported = export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(exported.call(images))
