"""The state of a run: every array that a training step changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from deeplab_jax.config import Config
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables
from deeplab_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a run after `step` steps."""

    step: Int[Array, ""]
    variables: Variables
    opt_state: Any  # of the optax transformation
    ema_params: Arrays | None  # exponential moving average of the parameters

    @property
    def eval_variables(self) -> Variables:
        """The variables to evaluate: with the averaged parameters where there are any."""
        return self.variables._replace(params=self.ema_params or self.variables.params)


def init_state(config: Config, variables: Variables) -> TrainState:
    """Returns the state before the first step, from initial variables."""
    ema = config.optimizer.ema_decay > 0
    tx = make_optimizer(config.optimizer, config.train.steps, variables.params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables.params),
        # A copy: the step donates its input, and no buffer may be donated twice.
        ema_params=jax.tree.map(jnp.copy, variables.params) if ema else None,
    )


def abstract_state(config: Config, model: FunctionalModel, mesh: Mesh) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state, without arrays."""
    shapes = jax.eval_shape(lambda variables: init_state(config, variables), model.abstract)
    shardings = mesh_lib.shardings(shapes, mesh, fully_sharded=config.mesh.fully_sharded)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def shardings_of(abstract: TrainState) -> TrainState:
    """The sharding of each array of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
