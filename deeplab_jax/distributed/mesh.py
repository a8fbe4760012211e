"""Devices as a mesh, and where arrays lie on it.

The mesh has two axes. The rows of a batch are divided over `data`, the height of each image over
`space`: XLA's partitioner then has devices exchange the few lines of pixels that a convolution sees
beyond its own. What is computed does not depend on either, but for the order of sums.

A height that `space` does not divide is filled up on its way to the devices, and `fit_height` cuts
the filling off again before the model sees it. So every height works, and none is padded.
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
    """A mesh with the axes `data` and `space`.

    Args:
      config: how many devices each axis has.
      devices: to build it of; None: all that there are.

    Raises:
      UserError: the devices are too few, are not divided evenly, or some process would have none.
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
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        return _mesh_of_slices(shape, slices, devices, types)
    return jax.make_mesh(shape, (DATA, SPACE), axis_types=types, devices=devices[:count])


def _mesh_of_slices(
    shape: tuple[int, int], slices: int, devices: Sequence[jax.Device], types: tuple[AxisType, ...]
) -> Mesh:
    """TPU slices, joined by a slower network, lie along `data`: a step sums over it once."""
    from jax.experimental import mesh_utils

    if shape[0] * shape[1] != len(devices) or shape[0] % slices:
        raise UserError(
            f"a mesh of {shape[0]} x {shape[1]} devices does not divide {len(devices)} devices "
            f"into {slices} slices: use mesh.data = -1, and a mesh.space within a slice"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, shape[1]), (slices, 1), devices
    )
    return Mesh(grid, (DATA, SPACE), axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch divided over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def image_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch divided over `data`, and the height of what they hold over `space`."""
    return NamedSharding(mesh, PartitionSpec(DATA, SPACE))


def shardings(tree: Tree, mesh: Mesh, *, fully_sharded: bool) -> Tree:
    """Where each array of a state lies: everywhere, or in parts over `data`.

    Args:
      tree: arrays, or their shapes.
      mesh: of the devices.
      fully_sharded: divide arrays of two axes or more along their largest axis that the devices
        divide, where there is one. Vectors stay whole: there are many, and they hold little.
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
    """Arrays whole on each device; those that are already are taken as they are."""
    whole = replicated(mesh)

    def lies_there(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(whole, leaf.ndim)

    if all(map(lies_there, jax.tree.leaves(tree))):
        return tree
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return place(jax.device_get(tree), jax.tree.map(lambda _: whole, tree))
    return jax.jit(lambda arrays: arrays, out_shardings=whole)(tree)


def place(tree: Tree, where: Any) -> Tree:
    """Lays arrays, of which each process holds all, onto the devices.

    Args:
      tree: of arrays on the host or on this process's devices.
      where: a tree of shardings like it.
    """

    def placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(placed, tree, where)


def check_batch(name: str, batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError, with the nearest sizes that work, unless devices and parts divide it."""
    parts = mesh.shape[DATA] * accumulate
    if batch_size % parts:
        lower = batch_size // parts * parts
        nearest = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise UserError(
            f"{name} = {batch_size} is not divisible by {parts} (devices x parts of the batch); "
            f"nearest that works: {nearest}"
        )


def check_height(name: str, height: int, output_stride: int, mesh: Mesh) -> None:
    """Raises UserError if there are fewer rows of features than devices along `space`.

    XLA's partitioner, as of jaxlib 0.10, gives wrong gradients of strided convolutions there.
    """
    space = mesh.shape[SPACE]
    if -(-height // output_stride) < space:
        raise UserError(
            f"{name}: images of {height} rows have {-(-height // output_stride)} rows of features "
            f"at output stride {output_stride}, fewer than config.mesh.space = {space}: use images "
            f"of {(space - 1) * output_stride + 1} rows or more, or a smaller mesh.space"
        )


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of the global batch that this process's devices hold, in order."""
    places = row_sharding(mesh).addressable_devices_indices_map((batch_size,))
    slices = [index[0] for index in places.values() if index is not None]
    return sorted({row for rows in slices for row in range(*rows.indices(batch_size))})


def to_global(batch: Mapping[str, Any], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Puts this process's rows on its devices; the result is the global batch.

    Args:
      batch: arrays whose first axis is `local_rows`. Those of three axes or more are images.
      mesh: of the devices.
      batch_size: of the global batch.

    Returns:
      Images may be higher than they were, see `fit_height`.
    """
    position = {row: place for place, row in enumerate(local_rows(mesh, batch_size))}
    return {name: _to_global(rows, mesh, batch_size, position) for name, rows in batch.items()}


def filled_height(height: int, mesh: Mesh) -> int:
    """Rows of pixels that images of a height have on the devices, which divide them evenly."""
    return height + -height % mesh.shape[SPACE]


def _to_global(
    rows: np.ndarray, mesh: Mesh, batch_size: int, position: dict[int, int]
) -> jax.Array:
    sharding = row_sharding(mesh)
    if rows.ndim >= 3:
        sharding = image_sharding(mesh)
        filling = filled_height(rows.shape[1], mesh) - rows.shape[1]
        rows = np.pad(rows, ((0, 0), (0, filling), *((0, 0),) * (rows.ndim - 2)))

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(batch_size)
        first = position[start]
        return rows[(slice(first, first + stop - start), *index[1:])]

    return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)


def fit_height(
    images: Shaped[Array, "n h ..."], height: int, mesh: Mesh
) -> Shaped[Array, "n {height} ..."]:
    """Cuts off what `to_global` filled up, and keeps images divided over `space`; to be traced."""
    return divide_height(images[:, :height], mesh)


def divide_height(maps: Shaped[Array, "n h ..."], mesh: Mesh) -> Shaped[Array, "n h ..."]:
    """Asks that maps lie divided as images do, also where devices do not divide their height."""
    if mesh.shape[SPACE] == 1:
        return maps
    return lax.with_sharding_constraint(maps, image_sharding(mesh))


def gathered(tree: Tree, mesh: Mesh) -> Tree:
    """Asks that arrays be whole on each device where they are used; to be traced."""
    return lax.with_sharding_constraint(tree, replicated(mesh)) if mesh.size > 1 else tree


def rows_of(array: jax.Array) -> np.ndarray:
    """The rows, in order, that this process's devices hold of an array divided by rows alone."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def partitioned(model: FunctionalModel, mesh: Mesh) -> FunctionalModel:
    """Returns the model to trace where image height is sharded over `space`.

    XLA's partitioner knows which rows of its own convolutions to exchange. The slices and products
    that are faster on one device would move whole maps.
    """
    if mesh.shape[SPACE] == 1:
        return model

    def edit(module: DeepLabV3) -> None:
        use_implementation(module, XLA)
        if module.decoder is not None:
            module.decoder.replicate = lambda x: lax.with_sharding_constraint(x, row_sharding(mesh))

    return model.edited(edit)
