"""The training step: one jitted function over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from deeplab_jax.config import Config, crop_shape
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.inference.compilation import GPU_OPTIONS
from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables, normalize
from deeplab_jax.training import losses
from deeplab_jax.training.optimizer import make_optimizer, make_schedule
from deeplab_jax.training.state import TrainState, abstract_state, shardings_of

Metrics = dict[str, Float[Array, ""]]
_LOSSES = {"out": "loss", "aux": "aux_loss"}  # names of the metrics, by head
TrainStep = Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]


def make_train_step(model: FunctionalModel, config: Config, mesh: Mesh) -> TrainStep:
    """Returns the jitted `(state, batch) -> (state, metrics)`; nothing is compiled yet.

    The buffers of the state are donated. The batch holds `image` uint8 `[n, h, w, c]` and `label`
    uint8 `[n, h, w]`, as `mesh.to_global` returns them; the state has the shardings of
    `abstract_state`. Metrics: `loss` (main head), `aux_loss` if there is an auxiliary head,
    `grad_norm` before clipping, `learning_rate`. `config.loss.class_weights` must not be "auto".
    """
    ema_decay = config.optimizer.ema_decay
    height, _ = crop_shape(config.data)
    schedule = make_schedule(config.optimizer, config.train.steps)
    tx = make_optimizer(config.optimizer, config.train.steps, model.abstract.params)
    model = mesh_lib.spatially_partitioned(model, mesh)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        batch = {name: mesh_lib.unpad_height(x, height, mesh) for name, x in batch.items()}
        grads, batch_stats, metrics = gradients(model, config, state, batch, mesh)
        updates, opt_state = tx.update(grads, state.opt_state, state.variables.params)
        params = optax.apply_updates(state.variables.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        metrics["grad_norm"] = global_norm(grads)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        new_state = TrainState(
            step=state.step + 1,
            variables=Variables(params, batch_stats),
            opt_state=opt_state,
            ema_params=ema_params,
        )
        return new_state, metrics

    state_shardings = shardings_of(abstract_state(config, model, mesh))
    return jax.jit(
        step,
        in_shardings=(state_shardings, mesh_lib.image_sharding(mesh)),
        out_shardings=(state_shardings, mesh_lib.replicated(mesh)),
        donate_argnums=0,
        compiler_options=GPU_OPTIONS if is_one_gpu(mesh) else None,
    )


def is_one_gpu(mesh: Mesh) -> bool:
    """Whether the step runs on one GPU, without communication."""
    return mesh.size == 1 and jax.default_backend() == "gpu"


def has_cross_entropy_kernel(mesh: Mesh) -> bool:
    """Whether `cross_entropy_kernel` runs: on one NVIDIA GPU of the Ampere generation or later."""
    capability = getattr(mesh.devices.flat[0], "compute_capability", "")  # AMD's is no number
    return is_one_gpu(mesh) and capability.replace(".", "").isdigit() and float(capability) >= 8


def global_norm(grads: Arrays) -> Float[Array, ""]:
    """Returns the Euclidean norm of all gradients together.

    The vectors are concatenated first. On GPU each would need kernels of its own, which take longer
    to start than to run: 206 vectors of ResNet-101 took 0.4 ms.
    """
    vectors = [x for x in grads.values() if x.ndim == 1]
    others = [x for x in grads.values() if x.ndim != 1]
    if vectors:
        others.append(lax.optimization_barrier(jnp.concatenate(vectors)))
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in others))


def gradients(
    model: FunctionalModel, config: Config, state: TrainState, batch: dict[str, Array], mesh: Mesh
) -> tuple[Arrays, Arrays, Metrics]:
    """Returns the gradient of the mean loss, the new running statistics and the losses.

    With `optimizer.accumulate = k` the batch is computed in k microbatches, one after the other.
    The loss stays the mean over all pixels (or images) of the batch; batch norm sees one microbatch
    at a time.

    With spatial partitioning the logits are upsampled at once, and each device holds some of their
    rows. Otherwise the loss upsamples a few rows at a time.
    """
    stride, align_corners = model.architecture.output_stride, model.architecture.align_corners
    if not config.loss.upsample:
        labels = losses.downsample_labels(batch["label"], stride, align_corners)
        batch = batch | {"label": labels}
    partitioned = mesh.shape[mesh_lib.SPACE] > 1
    kernel = has_cross_entropy_kernel(mesh)
    num_parts = config.optimizer.accumulate
    count = losses.loss_count(batch["label"], config.loss)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def microbatch_gradient(batch_stats: Arrays, microbatch: dict[str, Array], index: Array) -> Any:
        def objective(params: Arrays) -> tuple[Array, tuple[Metrics, Arrays]]:
            outputs, new_stats = model.apply(
                Variables(mesh_lib.constrain_replicated(params, mesh), batch_stats),
                normalize(microbatch["image"], config.data.mean, config.data.std),
                train=True,
                key=jax.random.fold_in(key, index),
                freeze_bn=config.train.freeze_bn,
                remat=config.train.remat,
                upsample=partitioned and config.loss.upsample,
            )
            outputs = mesh_lib.constrain_image_sharding(outputs, mesh)
            means = {}
            for head, logits in outputs.items():
                total = losses.loss_sum(
                    *(logits, microbatch["label"], config.loss),
                    align_corners=align_corners,
                    kernel=kernel,
                )
                means[_LOSSES[head]] = losses.mean(total, count)
            total = means["loss"] + config.loss.aux_weight * means.get("aux_loss", 0.0)
            return total, (means, new_stats)

        (_, (means, new_stats)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.variables.params
        )
        return grads, means, new_stats

    if num_parts == 1:
        grads, means, batch_stats = microbatch_gradient(
            state.variables.batch_stats, batch, jnp.zeros((), jnp.int32)
        )
        return grads, batch_stats, means

    # Row r goes to microbatch r % num_parts, so that no row moves to another device.
    stacked = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]), 1, 0),
        batch,
    )

    def add_part(carry: Any, part_and_index: Any) -> tuple[Any, None]:
        grads, means, batch_stats = carry
        part, index = part_and_index
        part_grads, part_means, batch_stats = microbatch_gradient(batch_stats, part, index)
        add = jax.tree.map(jnp.add, (grads, means), (part_grads, part_means))
        return (*add, batch_stats), None

    first = jax.tree.map(lambda x: x[0], stacked)
    shapes = jax.eval_shape(
        microbatch_gradient, state.variables.batch_stats, first, jnp.zeros((), jnp.int32)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
    carry, _ = lax.scan(
        add_part, (*zeros, state.variables.batch_stats), (stacked, jnp.arange(num_parts))
    )
    grads, means, batch_stats = carry
    return grads, batch_stats, means
