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
from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables, normalize
from deeplab_jax.training import losses
from deeplab_jax.training.state import TrainState, start_state

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]


def make_train_step(
    model: FunctionalModel,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: Config,
    mesh: Mesh,
) -> TrainStep:
    """Compiles `(state, batch) -> (state, metrics)`; the state's buffers are donated.

    The batch is `image` uint8 `[n, h, w, c]` and `label` uint8 `[n, h, w]`, as `mesh.to_global`
    gives it; the state lies as `state_shardings` says. Metrics: `loss` (of the main head),
    `aux_loss` if there is an auxiliary head, `grad_norm` before clipping, `learning_rate`.
    """
    ema_decay = config.optimizer.ema_decay
    height, _ = crop_shape(config.data)
    model = mesh_lib.partitioned(model, mesh)

    def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        batch = {name: mesh_lib.fit_height(x, height, mesh) for name, x in batch.items()}
        grads, batch_stats, metrics = gradients(model, config, state, batch, mesh)
        updates, opt_state = tx.update(grads, state.opt_state, state.variables.params)
        params = optax.apply_updates(state.variables.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        new_state = TrainState(
            step=state.step + 1,
            variables=Variables(params, batch_stats),
            opt_state=opt_state,
            ema_params=ema_params,
        )
        return new_state, metrics

    held = state_shardings(abstract_state(model, tx, config), config, mesh)
    return jax.jit(
        step,
        in_shardings=(held, mesh_lib.image_sharding(mesh)),
        out_shardings=(held, mesh_lib.replicated(mesh)),
        donate_argnums=0,
    )


def abstract_state(
    model: FunctionalModel, tx: optax.GradientTransformation, config: Config
) -> TrainState:
    """Shapes and dtypes of a run's state."""
    ema = config.optimizer.ema_decay > 0
    return jax.eval_shape(lambda v: start_state(tx, v, ema=ema), model.abstract)


def state_shardings(state: TrainState, config: Config, mesh: Mesh) -> TrainState:
    """Where each array of a state lies; running statistics always whole on each device."""
    return mesh_lib.shardings(state, mesh, fully_sharded=config.mesh.fully_sharded)


def gradients(
    model: FunctionalModel, config: Config, state: TrainState, batch: dict[str, Array], mesh: Mesh
) -> tuple[Arrays, Arrays, Metrics]:
    """Gradient of the mean loss, running statistics after the batch, and losses.

    With `optimizer.accumulate = k` the batch is computed in k parts one after the other. The loss
    is still the mean over the pixels, or images, of the whole batch; batch norm sees a part at a
    time.

    Divided over the height of images, logits are upsampled at once: each device holds some rows of
    them. Elsewhere the loss upsamples some rows at a time.
    """
    if not config.loss.upsample:
        stride = model.architecture.output_stride
        batch = batch | {"label": losses.shrink_labels(batch["label"], stride)}
    divided = mesh.shape[mesh_lib.SPACE] > 1
    parts = config.optimizer.accumulate
    count = losses.loss_count(batch["label"], config.loss)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def part_gradient(batch_stats: Arrays, part: dict[str, Array], index: Array) -> Any:
        def objective(params: Arrays) -> tuple[Array, tuple[Metrics, Arrays]]:
            outputs, new_stats = model.apply(
                Variables(mesh_lib.gathered(params, mesh), batch_stats),
                normalize(part["image"], config.data.mean, config.data.std),
                train=True,
                key=jax.random.fold_in(key, index),
                freeze_bn=config.train.freeze_bn,
                remat=config.train.remat,
                upsample=divided and config.loss.upsample,
            )
            if divided:
                outputs = {name: mesh_lib.divide_height(x, mesh) for name, x in outputs.items()}
            means = {
                head: losses.mean(losses.loss_sum(logits, part["label"], config.loss), count)
                for head, logits in outputs.items()
            }
            total = means["out"] + config.loss.aux_weight * means.get("aux", 0.0)
            return total, (means, new_stats)

        (_, (means, new_stats)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.variables.params
        )
        return grads, means, new_stats

    if parts == 1:
        grads, means, batch_stats = part_gradient(
            state.variables.batch_stats, batch, jnp.zeros((), jnp.int32)
        )
        return grads, batch_stats, _names(means)

    # Row r goes to part r % parts, so that each device keeps the rows that it holds.
    stacked = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def add_part(carry: Any, part_and_index: Any) -> tuple[Any, None]:
        grads, means, batch_stats = carry
        part, index = part_and_index
        more_grads, more_means, batch_stats = part_gradient(batch_stats, part, index)
        add = jax.tree.map(jnp.add, (grads, means), (more_grads, more_means))
        return (*add, batch_stats), None

    first = jax.tree.map(lambda x: x[0], stacked)
    shapes = jax.eval_shape(
        part_gradient, state.variables.batch_stats, first, jnp.zeros((), jnp.int32)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
    carry, _ = lax.scan(
        add_part, (*zeros, state.variables.batch_stats), (stacked, jnp.arange(parts))
    )
    grads, means, batch_stats = carry
    return grads, batch_stats, _names(means)


def _names(means: Metrics) -> Metrics:
    return {{"out": "loss", "aux": "aux_loss"}[head]: value for head, value in means.items()}
