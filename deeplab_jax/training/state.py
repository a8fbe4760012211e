"""Everything that a step changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from deeplab_jax.models.functional import Arrays, Variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of a run after `step` steps.

    Attributes:
      step: steps made.
      variables: parameters and running statistics of the model.
      opt_state: of the optax transformation.
      ema_params: exponential moving average of the parameters, or None.
    """

    step: Int[Array, ""]
    variables: Variables
    opt_state: Any
    ema_params: Arrays | None

    @property
    def eval_variables(self) -> Variables:
        """What is evaluated: the averaged parameters where there are any."""
        if self.ema_params is None:
            return self.variables
        return Variables(self.ema_params, self.variables.batch_stats)


def start_state(tx: optax.GradientTransformation, variables: Variables, *, ema: bool) -> TrainState:
    """A state before the first step, from given variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=tx.init(variables.params),
        # A copy: the step donates its input, and no buffer may be donated twice.
        ema_params=jax.tree.map(jnp.copy, variables.params) if ema else None,
    )
