"""The optimizer, its learning rate schedule, and the rates of single layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import optax

from deeplab_jax.config import OptimizerConfig
from deeplab_jax.config.optimizers import make_optax, mask_argument


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by step, after a linear warm-up from 0.

    With t = step / num_steps, "poly" is `learning_rate * (1 - t)^power`, "cosine" is
    `learning_rate * (1 + cos(pi t)) / 2`, and "constant" is `learning_rate`. With a warm-up, `step`
    and `num_steps` count from its end.

    Source: "poly": arXiv 1706.05587, section 4.1; "cosine": arXiv 1608.03983, equation 5.
    """
    rate, decay_steps = config.learning_rate, num_steps - config.warmup_steps
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(rate, decay_steps)
    elif config.schedule == "constant":
        schedule = optax.constant_schedule(rate)
    else:
        schedule = optax.polynomial_schedule(
            init_value=rate, end_value=0.0, power=config.power, transition_steps=decay_steps
        )
    if not config.warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to a parameter: to kernels, not to biases or batch norm."""
    return name.endswith("kernel")


def is_head(name: str) -> bool:
    """Whether a parameter lies outside the backbone, so that pretraining does not cover it."""
    return not name.startswith("backbone.")


def stages_to_head(names: Iterable[str]) -> dict[str, int]:
    """Returns how many stages before the head each parameter of the backbone is; the last: 1.

    The stem is the first stage. The first number in any other name is the number of its stage: 1 in
    "backbone.layer1.0.bn2.scale" of a ResNet, 12 in "backbone.block12.project.conv.kernel" of a
    MobileNet. Names without a number, such as "backbone.final_bn.scale", are in the last stage.
    """
    stages: dict[str, float] = {}
    for name in names:
        if not is_head(name):
            number = re.search(r"\d+", name)
            last = int(number[0]) if number else float("inf")
            stages[name] = -1 if name.startswith("backbone.stem") else last
    known = {stage for stage in stages.values() if stage != float("inf")}
    return {name: max(1, sum(s >= stage for s in known)) for name, stage in stages.items()}


def scale_rates(config: OptimizerConfig, names: Iterable[str]) -> optax.GradientTransformation:
    """Multiplies finished updates, and so the learning rate, by the factor of each parameter.

    The factor is `head_multiplier` outside the backbone, and in the backbone
    `layer_decay^distance` with the distance of `stages_to_head`.
    """
    factors = {name: config.head_multiplier for name in names if is_head(name)}
    factors |= {name: config.layer_decay**n for name, n in stages_to_head(names).items()}

    def scale(updates: Any, params: Any) -> Any:
        del params
        return {k: u if factors[k] == 1 else factors[k] * u for k, u in updates.items()}

    return optax.stateless(scale)


def make_optimizer(
    config: OptimizerConfig, num_steps: int, names: Iterable[str]
) -> optax.GradientTransformation:
    """Returns the config's optimizer, which clips the gradient first.

    "sgd" is torch's in its order of operations: weight decay, momentum, rates of layers, learning
    rate. With `decoupled_weight_decay`, momentum comes before weight decay (SGDW, arXiv 1711.05101,
    algorithm 1). Another optimizer of optax gets the weight decay if it can decouple it from the
    gradient and mask it. Otherwise the weight decay is added to the gradient.

    A part whose value is neutral is left out. `names` are the dotted names of all parameters.
    """
    names = list(names)
    schedule, decayed = make_schedule(config, num_steps), {name: is_decayed(name) for name in names}
    decay = [optax.add_decayed_weights(config.weight_decay, mask=decayed)]
    decay *= config.weight_decay > 0
    rates = [scale_rates(config, names)] * (config.head_multiplier != 1 or config.layer_decay != 1)
    parts = [optax.clip_by_global_norm(config.clip_norm)] * (config.clip_norm > 0)
    if config.name == "sgd":
        trace = [optax.trace(config.momentum, **config.arguments)] * (config.momentum > 0)
        parts += [*trace, *decay] if config.decoupled_weight_decay else [*decay, *trace]
        parts += [*rates, optax.scale_by_learning_rate(schedule)]
    else:
        own_decay = mask_argument(config.name) is not None
        parts += [*decay * (not own_decay), make_optax(config, schedule, decayed), *rates]
    return optax.chain(*parts)
