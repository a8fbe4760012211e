"""SGD with momentum and the "poly" learning rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import optax

from deeplab_jax.config import OptimizerConfig


def poly_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns `learning_rate * (1 - step / num_steps)^power`, after a linear warm-up.

    With a warm-up, `step` and `num_steps` count from its end. Source: paper, section 4.1.
    """
    poly = optax.polynomial_schedule(
        init_value=config.learning_rate,
        end_value=0.0,
        power=config.power,
        transition_steps=num_steps - config.warmup_steps,
    )
    if not config.warmup_steps:
        return poly
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, poly], [config.warmup_steps])


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter: to kernels, not to biases or batch norm."""
    return name.endswith("kernel")


def is_head(name: str) -> bool:
    """Whether a parameter lies outside the backbone, so that pretraining does not cover it."""
    return not name.startswith("backbone.")


def make_optimizer(
    config: OptimizerConfig, num_steps: int, names: Iterable[str]
) -> optax.GradientTransformation:
    """Returns SGD in torch's order of operations, with the poly schedule.

    Clips the gradient by its global norm, adds weight decay, accumulates momentum, scales the
    head's updates and multiplies by the learning rate.

    Args:
      config: hyper-parameters; a part whose value is neutral is left out.
      num_steps: length of the schedule.
      names: dotted names of all parameters.
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
    parts.append(optax.scale_by_learning_rate(poly_schedule(config, num_steps)))
    return optax.chain(*parts)
