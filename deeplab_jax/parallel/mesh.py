"""Devices as a mesh, and where arrays lie on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deeplab_jax.config import MeshConfig
from deeplab_jax.errors import UserError


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with the axis `data`, over which batches are divided.

    Raises:
      UserError: if more devices are asked for than there are.
    """
    devices = jax.devices()
    count = len(devices) if config.data == -1 else config.data
    if count > len(devices):
        raise UserError(
            f"config.mesh.data = {count}, but there are {len(devices)} devices "
            f"({devices[0].platform}); use -1 for all of them"
        )
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch divided over the axis `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(name: str, batch_size: int, parts: int) -> None:
    """Raises UserError, with the nearest sizes that work, unless `parts` divides the batch."""
    if batch_size % parts:
        lower = batch_size // parts * parts
        nearest = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise UserError(
            f"{name} = {batch_size} is not divisible by {parts} (devices x parts of the batch); "
            f"nearest that works: {nearest}"
        )


def host_rows(batch_size: int) -> slice:
    """Rows of the global batch that this process loads."""
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def to_global(batch: Mapping[str, object], sharding: NamedSharding) -> dict[str, Any]:
    """Puts this process's rows on its devices; the result is the global batch."""
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }
