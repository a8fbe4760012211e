"""Cases compiled for this package."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.analysis.conv_trace import convolutions
from deeplab_jax.config import Config, LossConfig, MeshConfig, OptimizerConfig
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.inference.compilation import jit_inference
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training.state import init_state
from deeplab_jax.training.step import make_train_step
from deeplab_jax.weights.initialize import on_host

from .cases import (
    AUX_WEIGHT,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Built,
    Case,
)


def build(case: Case) -> Built:
    """Compiles a case."""
    return _build_forward(case) if case.kind == "forward" else _build_train(case)


def model_of(case: Case) -> FunctionalModel:
    """Returns torchvision's architecture with the settings of a case."""
    chosen = architecture(
        f"torchvision_{case.backbone}",
        num_classes=NUM_CLASSES,
        output_stride=case.output_stride,
        aux_head=case.kind == "train",
        dtype=case.dtype,
    )
    return FunctionalModel(chosen)


def _build_forward(case: Case) -> Built:
    model = model_of(case)
    begun = time.perf_counter()
    variables = on_host(lambda key: model.fuse(model.init(key)), lambda: jax.random.key(0))
    variables = jax.device_put(variables, jax.devices()[0])
    images = _images(case)

    def forward(model: FunctionalModel, variables: Any, images: Any) -> Any:
        return model.apply(variables, images)[0]["out"]

    compiled = jit_inference(forward, model.fused).lower(variables, images).compile()
    kept: list[Any] = [compiled(variables, images)]
    jax.block_until_ready(kept)

    def start() -> None:
        kept[0] = compiled(variables, images)

    return Built(
        start,
        lambda: jax.block_until_ready(kept),
        time.perf_counter() - begun,
        _peak_bytes(compiled),
    )


def _build_train(case: Case) -> Built:
    model = model_of(case)
    begun = time.perf_counter()
    config = Config(
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        ),
        loss=LossConfig(aux_weight=AUX_WEIGHT),
        mesh=MeshConfig(data=1),
    )
    mesh = mesh_lib.make_mesh(config.mesh)
    state = on_host(lambda key: init_state(config, model.init(key)), lambda: jax.random.key(0))
    state = mesh_lib.replicate(state, mesh)
    batch = mesh_lib.to_global(_batch(case), mesh, case.batch)
    step: Any = make_train_step(model, config, mesh)
    compiled = step.lower(state, batch).compile()
    kept: list[Any] = [compiled(state, batch)[0]]
    jax.block_until_ready(kept)

    def start() -> None:
        kept[0], _ = compiled(kept[0], batch)

    return Built(
        start,
        lambda: jax.block_until_ready(kept),
        time.perf_counter() - begun,
        _peak_bytes(compiled),
    )


def _images(case: Case) -> Any:
    shape = (case.batch, case.height, case.width, 3)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return jax.device_put(jnp.asarray(images, case.dtype))


def _batch(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (case.batch, case.height, case.width)
    return {
        "image": rng.integers(0, 256, (*shape, 3), np.uint8),
        "label": rng.integers(0, NUM_CLASSES, shape, np.uint8),
    }


def _peak_bytes(compiled: Any) -> int:
    """Returns the bytes of arguments, results and temporaries; shared memory counts once."""
    memory = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def dense_flops(case: Case) -> float:
    """Returns the FLOPs of a case's convolutions; a multiplication and an addition count as two.

    All taps count, including those in the padding. A training step counts three times its forward
    pass, because each convolution has two gradients.
    """
    found = convolutions(model_of(case), case.height, case.width)
    forward = 2.0 * case.batch * sum(conv.macs for conv in found)
    return forward * (3 if case.kind == "train" else 1)
