"""Compiles a train step for TPUs that are not there, and says what it needs of them."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deeplab_jax import config as config_lib
from deeplab_jax.analysis.conv_trace import convolutions
from deeplab_jax.config import Config
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.plan.chips import Topology
from deeplab_jax.plan.collectives import Collective, inventory
from deeplab_jax.training.program import train_program
from deeplab_jax.utils.errors import UserError

# No chip is touched and nobody is asked over the network; libtpu looks for both unless told.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # of a cloud machine's metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another plan, or a training, may run beside it
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's memory that a train step takes.

    Attributes:
      arguments: the state before it and its batch.
      outputs: the state after it and its metrics.
      aliased: of the outputs, which lie where the arguments lay.
      temporaries: all else at the moment when there is most, above all what the backward pass
        needs of the forward pass.
      program: the instructions.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Plan:
    """A train step as it was compiled for a topology, or refused.

    Attributes:
      topology: that it was compiled for.
      mesh: devices along `data` and `space`.
      batch_size: of all devices.
      hbm_bytes: memory of a chip that a program may have.
      compile_seconds: it took to compile it here.
      refusal: the compiler's words if it does not fit into the memory; then there is no more.
      memory: of a chip.
      flops: of a chip in a step, as XLA counts the optimised program.
      accessed_bytes: that operations of a chip read and write in a step, as XLA counts them.
      convolution_flops: of a chip, a multiplication and an addition counted as two: three times
        the forward pass, all taps, nothing recomputed.
      collectives: between the chips.
      unknown_loops: see `collectives.Inventory`.
    """

    topology: Topology
    mesh: tuple[int, int]
    batch_size: int
    hbm_bytes: int
    convolution_flops: float
    compile_seconds: float
    refusal: str = ""
    memory: Memory | None = None
    flops: float = 0.0
    accessed_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.hbm_bytes


def prepare() -> None:
    """Keeps JAX away from all accelerators; to be called before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not there can be kept on disk, but not read again (jax 0.10).
    jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Devices that can be compiled for, and nothing else.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = dict(topology.chip.options)
    if topology.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    wraps = (*topology.rings, False)[:3]
    try:
        found = topologies.get_topology_desc(
            topology.name, platform="tpu", wrap=list(wraps), **options
        )
    except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
        if "not installed" in str(error):
            raise UserError(
                "the TPU compiler is not installed: pip install 'deeplab-jax[tpu]' (no TPU needed)"
            ) from error
        raise UserError(f"--topology {topology.name}: the TPU compiler says: {error}") from error
    return list(found.devices)


def make_plan(
    config: Config,
    architecture: Architecture,
    topology: Topology,
    log: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Compiles the config's train step for a topology; takes minutes.

    Args:
      config: of the run; weights of classes that it takes from its data are planned as ones.
      architecture: that the config and its data make.
      topology: to compile for.
      log: is told when all is well and compiling begins.

    Raises:
      UserError: libtpu is absent, or the config does not suit the number of devices.
    """
    config = _without_data(config, architecture)
    mesh = mesh_lib.make_mesh(config.mesh, topology_devices(topology))
    check(config, architecture, mesh)
    log("compiling; a ResNet-101 takes about ten minutes")
    begun = time.perf_counter()
    lowered = lower(config, architecture, mesh)
    told: dict[str, Any] = {
        "topology": topology,
        "mesh": tuple(mesh.shape.values()),
        "batch_size": config.train.batch_size,
        "hbm_bytes": topology.chip.hbm_bytes,
        "convolution_flops": convolution_flops(config, architecture) / mesh.size,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(
            **told, compile_seconds=time.perf_counter() - begun, refusal=_first_line(str(error))
        )
    return Plan(**told, compile_seconds=time.perf_counter() - begun, **read(compiled, topology))


def check(config: Config, architecture: Architecture, mesh: Mesh) -> None:
    """Raises UserError where training would: batch or height do not suit the mesh."""
    mesh_lib.check_batch(
        "config.train.batch_size", config.train.batch_size, mesh, config.optimizer.accumulate
    )
    height, _ = config_lib.crop_shape(config.data)
    mesh_lib.check_height("config.data.crop_size", height, architecture.output_stride, mesh)


def lower(config: Config, architecture: Architecture, mesh: Mesh) -> jax.stages.Lowered:
    """The train step that training runs, for shapes alone."""
    program = train_program(FunctionalModel(architecture), config, mesh)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        program.state,
        program.where,
    )
    height, width = config_lib.crop_shape(config.data)
    rows = (config.train.batch_size, mesh_lib.filled_height(height, mesh), width)
    where = mesh_lib.image_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((*rows, architecture.in_channels), jnp.uint8, sharding=where),
        "label": jax.ShapeDtypeStruct(rows, jnp.uint8, sharding=where),
    }
    step: Any = program.step
    return step.lower(state, batch)


def read(compiled: jax.stages.Compiled, topology: Topology) -> dict[str, Any]:
    """What a compiled program tells of itself: fields of `Plan`."""
    stats: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    found = inventory(compiled.as_text() or "", topology.chips, topology.slices)
    return {
        "memory": Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            program=stats.generated_code_size_in_bytes,
        ),
        "flops": cost["flops"],
        "accessed_bytes": cost["bytes accessed"],
        "collectives": found.collectives,
        "unknown_loops": found.unknown_loops,
    }


def convolution_flops(config: Config, architecture: Architecture) -> float:
    """Of the convolutions in a step, all devices together: three times the forward pass."""
    found = convolutions(FunctionalModel(architecture), *config_lib.crop_shape(config.data))
    return 3 * 2.0 * config.train.batch_size * sum(conv.macs for conv in found)


def _without_data(config: Config, architecture: Architecture) -> Config:
    """Weights of classes "auto" become ones: what they are changes nothing of the cost."""
    weights = config.loss.class_weights
    classes = architecture.num_classes
    if weights == "auto":
        weights = (1.0,) * classes
    if isinstance(weights, tuple) and len(weights) != classes:
        raise UserError(
            f"config.loss.class_weights has {len(weights)} numbers, but there are {classes} classes"
        )
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, class_weights=weights))


def _first_line(message: str) -> str:
    line = message.strip().splitlines()[0]
    return re.sub(r"^RESOURCE_EXHAUSTED:\s*", "", line)


def batch_unit(config: Config, topology: Topology) -> int:
    """Images that a batch's size must be a multiple of: one a part and device along `data`."""
    mesh = mesh_lib.make_mesh(config.mesh, topology_devices(topology))
    return mesh.shape[mesh_lib.DATA] * config.optimizer.accumulate


def guess_units(plan: Plan, units: int) -> int:
    """How many times its unit a batch may be, if temporaries grow with it in proportion.

    Args:
      plan: of a batch.
      units: how many times its unit that batch is.
    """
    if plan.memory is None:
        return 1
    free = plan.hbm_bytes - (plan.memory.total - plan.memory.temporaries)
    return max(int(units * free / max(plan.memory.temporaries, 1)), 1)
