"""The device mesh, the shardings of arrays over it, and spatial partitioning.

The mesh has two axes: `data` shards the rows of a batch, `space` the height of each image. For
`space`, XLA's partitioner exchanges the rows of pixels that a convolution needs from neighbouring
devices. Results do not depend on the mesh, except for the order of floating-point sums.

If `space` does not divide the height of images, they are padded on their way to the devices, and
`unpad_height` removes the padding before the model sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from deeplab_jax.config import MeshConfig
from deeplab_jax.models.deeplab import DeepLabV3
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.ops.convolution import XLA, use_implementation
from deeplab_jax.utils.errors import UserError

DATA, SPACE = "data", "space"

Tree = TypeVar("Tree")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of the first of these devices; None: of all devices.

    Raises:
      UserError: there are too few devices, `space` or TPU slices do not divide them, or a process
        would have none.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = config.data * config.space
    if config.data == -1:
        count = len(devices) // config.space * config.space
        if count != len(devices):
            raise UserError(
                f"config.mesh.space = {config.space} does not divide the {len(devices)} devices"
            )
    if not 0 < count <= len(devices):
        raise UserError(
            f"config.mesh.data = {config.data} with mesh.space = {config.space} needs {count} "
            f"devices, but there are {len(devices)} ({devices[0].platform}); "
            "mesh.data = -1 takes all of them"
        )
    used = {device.process_index for device in devices[:count]}
    idle = {device.process_index for device in devices} - used
    if idle:
        raise UserError(
            f"config.mesh.data = {config.data} with mesh.space = {config.space} takes {count} of "
            f"{len(devices)} devices and leaves process {min(idle)} none; mesh.data = -1 takes all"
        )
    shape = (count // config.space, config.space)
    types = (AxisType.Auto, AxisType.Auto)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(shape, (DATA, SPACE), axis_types=types, devices=devices[:count])
    if count < len(devices) or shape[0] % num_slices:
        raise UserError(
            f"config.mesh.data = {config.data} with mesh.space = {config.space} does not divide "
            f"{len(devices)} devices into {num_slices} slices; mesh.data = -1 takes all of them"
        )
    # The network between TPU slices is slow: they lie along `data`, which a step sums over once.
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_hybrid_device_mesh(
        (shape[0] // num_slices, shape[1]), (num_slices, 1), devices
    )
    return Mesh(grid, (DATA, SPACE), axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Shards the rows of a batch over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def image_sharding(mesh: Mesh) -> NamedSharding:
    """Shards the rows of a batch over `data` and the height of its images over `space`."""
    return NamedSharding(mesh, PartitionSpec(DATA, SPACE))


def shardings(tree: Tree, mesh: Mesh, *, fully_sharded: bool) -> Tree:
    """Returns the sharding of each array of a training state.

    With `fully_sharded`, arrays of two or more axes are sharded over `data`, along the largest axis
    that `data` divides. All other arrays are replicated: vectors are many and small.
    """
    parts = mesh.shape[DATA]

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, side in enumerate(leaf.shape) if side % parts == 0 and side]
        if not fully_sharded or leaf.ndim < 2 or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))

    return jax.tree.map(sharding, tree)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Replicates arrays on all devices; arrays that are replicated already are not copied."""
    sharding, leaves = replicated(mesh), jax.tree.leaves(tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return device_put(tree, jax.tree.map(lambda _: sharding, tree))
    if all(getattr(leaf, "is_fully_replicated", False) for leaf in leaves):
        return tree
    return jax.jit(lambda arrays: arrays, out_shardings=sharding)(tree)


def device_put(tree: Tree, shardings: Any) -> Tree:
    """Puts arrays that each process has in full on the devices of a mesh.

    `jax.device_put` would first gather the arrays of all processes to compare them.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def check_batch(name: str, batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError with the nearest valid sizes if `data` x `accumulate` does not divide it."""
    parts = mesh.shape[DATA] * accumulate
    if batch_size % parts:
        lower = batch_size // parts * parts
        nearest = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise UserError(
            f"{name} = {batch_size} is not divisible by {parts} (devices along mesh.data x "
            f"optimizer.accumulate); nearest that works: {nearest}"
        )


def check_height(name: str, height: int, output_stride: int, mesh: Mesh) -> None:
    """Raises UserError if the features have fewer rows than there are devices along `space`.

    XLA's partitioner then computes wrong gradients of strided convolutions (jaxlib 0.10).
    """
    space, num_rows = mesh.shape[SPACE], -(-height // output_stride)
    if num_rows < space:
        raise UserError(
            f"{name}: images of {height} rows have {num_rows} rows of features "
            f"at output stride {output_stride}, fewer than config.mesh.space = {space}: use images "
            f"of {(space - 1) * output_stride + 1} rows or more, or a smaller mesh.space"
        )


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the indices of the global batch's rows on this process's devices, in order."""
    indices = row_sharding(mesh).addressable_devices_indices_map((batch_size,))
    slices = [index[0] for index in indices.values() if index is not None]
    return sorted({row for rows in slices for row in range(*rows.indices(batch_size))})


def to_global(batch: Mapping[str, Any], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Makes the global batch of `batch_size` rows from each process's, see `local_rows`.

    Arrays with three or more axes are images, whose height is padded to `padded_height`.
    """

    def put(rows: np.ndarray) -> jax.Array:
        sharding = row_sharding(mesh)
        if rows.ndim >= 3:
            sharding = image_sharding(mesh)
            padding = padded_height(rows.shape[1], mesh) - rows.shape[1]
            if padding:  # `np.pad` always copies
                rows = np.pad(rows, ((0, 0), (0, padding), *((0, 0),) * (rows.ndim - 2)))
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: put(rows) for name, rows in batch.items()}


def padded_height(height: int, mesh: Mesh) -> int:
    """Returns the height after padding to a multiple of the devices along `space`, pixels."""
    return height + -height % mesh.shape[SPACE]


def unpad_height(
    images: Shaped[Array, "n h ..."], height: int, mesh: Mesh
) -> Shaped[Array, "n {height} ..."]:
    """Removes the padding of `to_global` and keeps the image sharding; must be traced."""
    return constrain_image_sharding(images[:, :height], mesh)


def constrain_image_sharding(maps: Tree, mesh: Mesh) -> Tree:
    """Constrains maps `[n, h, ...]` of any height to the image sharding; must be traced."""
    if mesh.shape[SPACE] == 1:
        return maps
    return lax.with_sharding_constraint(maps, image_sharding(mesh))


def constrain_replicated(tree: Tree, mesh: Mesh) -> Tree:
    """Constrains arrays to be replicated: gathers fully sharded parameters; must be traced."""
    return lax.with_sharding_constraint(tree, replicated(mesh)) if mesh.size > 1 else tree


def addressable_rows(array: jax.Array) -> np.ndarray:
    """Returns the rows on this process's devices, in order, of an array with `row_sharding`."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def spatially_partitioned(model: FunctionalModel, mesh: Mesh) -> FunctionalModel:
    """Returns the model to trace on a mesh; if `space` is 1, the model unchanged.

    With spatial partitioning all convolutions are XLA's own, because XLA's partitioner knows which
    of their rows to exchange. The slices and matrix products that are faster on one device would
    move whole feature maps. The logits that a transposed decoder reads are replicated in height.
    """
    if mesh.shape[SPACE] == 1:
        return model

    return model.edited(_partition, mesh)


def _partition(module: DeepLabV3, mesh: Mesh) -> None:
    use_implementation(module, XLA)
    if module.decoder is not None:
        module.decoder.replicate = lambda x: lax.with_sharding_constraint(x, row_sharding(mesh))
