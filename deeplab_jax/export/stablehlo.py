"""StableHLO export, for CPU, CUDA and TPU. `jax.export` reads the file without this package."""

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
    """Returns one program, with its arrays, for several platforms.

    Raises:
      UserError: a platform is not in `PLATFORMS`, or "cpu" is missing.
    """
    if not {"cpu"} <= set(platforms) <= set(PLATFORMS):
        raise UserError(
            f"platforms must be some of {', '.join(PLATFORMS)} and include cpu, where the file is "
            f"compared with the model; got {','.join(platforms)}"
        )
    variables = jax.tree.map(jnp.asarray, program.variables)

    def segment(images: jax.Array) -> jax.Array:
        return program(variables, images)

    exported = export.export(jax.jit(segment), platforms=platforms)(program.images)
    return bytes(exported.serialize())


def load(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a file as a function of uint8 `[n, h, w, c]`."""
    exported = export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(exported.call(images))
