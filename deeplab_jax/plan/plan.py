"""Compiles a config's train step for a TPU topology and reads what it needs of the chips."""

from __future__ import annotations

import dataclasses
import os
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
from deeplab_jax.plan.collectives import Collective, find_collectives
from deeplab_jax.training.state import abstract_state
from deeplab_jax.training.step import make_train_step
from deeplab_jax.utils.errors import UserError, first_line

# Without these, libtpu looks for a chip and queries the network.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # the metadata server of a cloud machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other plans or a training may run at the same time
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's memory that a train step needs."""

    arguments: int  # the old state and the batch
    outputs: int  # the new state and the metrics
    aliased: int  # part of the outputs that reuses the memory of the arguments
    temporaries: int  # peak of everything else, mostly activations saved for the backward pass
    program: int  # the instructions

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Plan:
    """A train step compiled for a topology, or refused by the compiler."""

    topology: Topology
    mesh: tuple[int, int]  # number of devices along `data` and `space`
    batch_size: int  # global
    hbm_bytes: int  # memory of a chip that a program can use
    # FLOPs of the convolutions on a chip: three times the forward pass, all kernel taps, without
    # rematerialisation; a multiply-add counts as two.
    convolution_flops: float
    compile_seconds: float = 0.0
    # The compiler's message if the step does not fit; the fields below are then empty.
    refusal: str = ""
    memory: Memory | None = None  # of a chip
    # By XLA's count of the optimized program, of a chip in a step: FLOPs, and bytes that its
    # operations read and write.
    flops: float = 0.0
    accessed_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()  # operations between the chips
    unknown_loops: int = 0  # see `find_collectives`

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.hbm_bytes


def prepare() -> None:
    """Keeps JAX away from all accelerators; must be called before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    # JAX 0.10 can write but not read cached programs for devices that are not there.
    jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Returns devices to compile for; they cannot run anything.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"wrap": [*topology.rings, False][:3]}
    if topology.chip.megacore:
        options["chip_config_name"] = "megacore"
    if topology.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    try:
        description = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
        if "not installed" in str(error):
            raise UserError(
                "the TPU compiler is not installed: pip install 'deeplab-jax[tpu]' (no TPU needed)"
            ) from error
        raise UserError(f"--topology {topology.name}: the TPU compiler says: {error}") from error
    return list(description.devices)


def make_plan(
    config: Config,
    architecture: Architecture,
    topology: Topology,
    log: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Compiles the config's train step for a topology, which takes minutes.

    Class weights that the run computes from its data are replaced by ones, which cost the same.
    `log` is called with a message when compilation starts.

    Raises:
      UserError: libtpu is not installed, or the batch, image height or class weights do not suit
        the devices or the architecture.
    """
    config = _without_data(config, architecture)
    mesh = mesh_lib.make_mesh(config.mesh, topology_devices(topology))
    batch_size, (height, _) = config.train.batch_size, config_lib.crop_shape(config.data)
    mesh_lib.check_batch("config.train.batch_size", batch_size, mesh, config.optimizer.accumulate)
    mesh_lib.check_height("config.data.crop_size", height, architecture.output_stride, mesh)
    log("compiling; a ResNet-101 takes about ten minutes")
    start = time.perf_counter()
    compiled, refusal = None, ""
    try:
        compiled = lower(config, architecture, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = first_line(error).removeprefix("RESOURCE_EXHAUSTED:").strip()
    return Plan(
        topology=topology,
        mesh=(mesh.shape[mesh_lib.DATA], mesh.shape[mesh_lib.SPACE]),
        batch_size=batch_size,
        hbm_bytes=topology.chip.hbm_bytes,
        convolution_flops=convolution_flops(config, architecture) / mesh.size,
        compile_seconds=time.perf_counter() - start,
        refusal=refusal,
        **(read(compiled, topology) if compiled else {}),
    )


def lower(config: Config, architecture: Architecture, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the train step that training runs, from shapes and shardings only."""
    model = FunctionalModel(architecture)
    height, width = config_lib.crop_shape(config.data)
    shape = (config.train.batch_size, mesh_lib.padded_height(height, mesh), width)
    shapes = {"image": (*shape, architecture.in_channels), "label": shape}
    sharding = mesh_lib.image_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)
        for name, shape in shapes.items()
    }
    step: Any = make_train_step(model, config, mesh)
    return step.lower(abstract_state(config, model, mesh), batch)


def read(compiled: jax.stages.Compiled, topology: Topology) -> dict[str, Any]:
    """Returns the fields of `Plan` that a compiled program gives."""
    stats: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    collectives, unknown_loops = find_collectives(
        compiled.as_text() or "", topology.num_chips, topology.num_slices
    )
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
        "collectives": collectives,
        "unknown_loops": unknown_loops,
    }


def convolution_flops(config: Config, architecture: Architecture) -> float:
    """Returns the convolutions' FLOPs in a step on all devices: three times the forward pass."""
    convs = convolutions(FunctionalModel(architecture), *config_lib.crop_shape(config.data))
    return 3 * 2.0 * config.train.batch_size * sum(conv.macs for conv in convs)


def _without_data(config: Config, architecture: Architecture) -> Config:
    """Replaces the class weights "auto" by ones, and checks the number of others."""
    weights, num_classes = config.loss.class_weights, architecture.num_classes
    if weights == "auto":
        weights = (1.0,) * num_classes
    if isinstance(weights, tuple) and len(weights) != num_classes:
        raise UserError(
            f"config.loss.class_weights has {len(weights)} numbers, but there are {num_classes} "
            "classes"
        )
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, class_weights=weights))


def batch_multiple(config: Config, topology: Topology) -> int:
    """Returns the number that a batch size must be a multiple of on a topology."""
    mesh = mesh_lib.make_mesh(config.mesh, topology_devices(topology))
    return mesh.shape[mesh_lib.DATA] * config.optimizer.accumulate


def estimate_max_batch(plan: Plan) -> int:
    """Returns the largest batch that fits if temporaries are proportional to it; 0: unknown."""
    if plan.memory is None:
        return 0
    free = plan.hbm_bytes - (plan.memory.total - plan.memory.temporaries)
    return int(plan.batch_size * free / max(plan.memory.temporaries, 1))


def largest(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """Returns the largest number from 1 to `limit` that fits, or 0 if none does.

    `fits` is true up to some number and false beyond it. Each call compiles for minutes, so it is
    called at most once per number: the search starts at a guess, doubles its stride until the
    answer changes, and then bisects.
    """
    low, high = 0, limit + 1  # `low` fits and `high` does not; both are never tried
    number, stride = min(max(guess, 1), limit), 1
    while high - low > 1:
        low, high = (number, high) if fits(number) else (low, number)
        if high > limit:
            number = min(low + stride, limit)
        elif low == 0:
            number = max(high - stride, 1)
        else:
            number = (low + high) // 2
        stride *= 2
    return low
