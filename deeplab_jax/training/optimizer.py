"""SGD with momentum, the "poly" schedule, and which parameters they treat how."""

from __future__ import annotations

from collections.abc import Iterable

import optax

from deeplab_jax.config import OptimizerConfig


def poly_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """learning_rate * (1 - step / steps)^power (paper section 4.1), after a linear warm-up.

    With a warm-up, `step` and `steps` count from its end.
    """
    poly = optax.polynomial_schedule(
        init_value=config.learning_rate,
        end_value=0.0,
        power=config.power,
        transition_steps=steps - config.warmup_steps,
    )
    if not config.warmup_steps:
        return poly
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, poly], [config.warmup_steps])


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: to kernels, not to biases or batch norm."""
    return name.endswith("kernel")


def is_head(name: str) -> bool:
    """Whether the parameter is new in a model whose backbone was trained before."""
    return not name.startswith("backbone.")


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, names: Iterable[str]
) -> optax.GradientTransformation:
    """The transformation of gradients into updates; torch's order of operations.

    Clip the gradient, add weight decay to it, add it to the momentum, scale by the learning rate.

    Args:
      config: its numbers.
      schedule: the learning rate by step.
      names: of all parameters, dotted.
    """
    names = list(names)
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        decayed = {name: is_decayed(name) for name in names}
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if config.momentum:
        parts.append(optax.trace(decay=config.momentum))
    if config.head_multiplier != 1:
        heads = {name: is_head(name) for name in names}
        parts.append(optax.masked(optax.scale(config.head_multiplier), heads))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)
