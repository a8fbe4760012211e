"""The optimizers of optax by name, and what is wrong with a config's choice of one."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deeplab_jax.config.schema import OptimizerConfig
from deeplab_jax.utils.errors import did_you_mean, first_line

if TYPE_CHECKING:  # imported only for the configs that need it
    import optax


def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Returns the functions of optax that make an optimizer from a learning rate."""
    import optax

    return {
        name: function
        for name, function in vars(optax).items()
        if isinstance(function, (types.FunctionType, functools.partial))
        and not name.startswith(("_", "scale_by_"))
        and next(iter(inspect.signature(function).parameters), "") == "learning_rate"
    }


def mask_argument(name: str) -> str | None:
    """Returns the argument that masks an optimizer's own, decoupled, weight decay; None: no such.

    adam and others have no weight decay of their own, and novograd's takes no mask.
    """
    taken = inspect.signature(optimizers()[name]).parameters
    masks = [mask for mask in ("mask", "weight_decay_mask") if mask in taken]
    return masks[0] if masks and "weight_decay" in taken else None


def make_optax(
    config: OptimizerConfig, schedule: optax.Schedule, decayed: dict[str, bool]
) -> optax.GradientTransformation:
    """Makes the optimizer that `config.name` and `config.arguments` describe.

    Args:
      config: of its other fields, `momentum` is for "sgd", and `weight_decay` for the optimizers
        that decouple it.
      schedule: learning rate by step.
      decayed: whether weight decay applies to a parameter, by name.
    """
    arguments = dict(config.arguments)
    if config.name == "sgd":
        arguments["momentum"] = config.momentum
    if mask := mask_argument(config.name):
        arguments |= {"weight_decay": config.weight_decay, mask: decayed}
    return optimizers()[config.name](schedule, **arguments)


def problems(config: OptimizerConfig) -> Iterator[tuple[str, str]]:
    """Yields a field and what it must be, for each mistake in the optimizer's name and arguments.

    Without mistakes, one step is traced, for what only optax can find; this uses no device.
    """
    name, arguments = config.name, config.arguments
    if name == "sgd" and not arguments:
        return
    known = optimizers()
    if name not in known:
        yield "name", f"an optimizer of optax{did_you_mean(name, known)}: {', '.join(known)}"
        return
    parameters = inspect.signature(known[name]).parameters
    fields = ["learning_rate", "weight_decay", *["momentum"] * (name == "sgd")]
    taken = [key for key in parameters if key not in fields and not key.endswith("mask")]
    allowed = f"arguments of optax.{name} ({', '.join(taken) or 'it takes none'})"
    mistakes = []
    for key, value in arguments.items():
        if key in fields:
            mistakes.append(f"without {key}, which is the field optimizer.{key}")
        elif key not in taken:
            mistakes.append(f"without {key!r}{did_you_mean(key, taken)}")
        elif isinstance(parameters[key].default, bool) != isinstance(value, bool):
            kind = "a number or a text" if isinstance(value, bool) else "true or false"
            mistakes.append(f"with {kind} for {key}")
    yield from (("arguments", f"{allowed} {mistake}") for mistake in mistakes)
    if mistakes:
        return
    if refusal := _refusal(OptimizerConfig(name=name)):
        expected = "an optimizer that steps from the gradient and a schedule alone"
        yield "name", f"{expected}; optax says: {refusal}"
    elif refusal := _refusal(config):
        yield "arguments", f"{allowed}; optax says: {refusal}"


def _refusal(config: OptimizerConfig) -> str:
    """Returns why optax does not make a step with an optimizer; empty if it does."""
    import jax

    def step(params: Any) -> Any:
        tx = make_optax(config, lambda count: 0.1 / (1 + count), {"kernel": True})
        state = tx.init(params)
        return (params, state), tx.update(params, state, params)

    try:
        before, after = jax.eval_shape(step, {"kernel": jax.ShapeDtypeStruct((3, 5), "float32")})
    except Exception as error:  # whatever optax raises for a value
        return first_line(error)
    if any(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(before)):
        return "its state holds a random key"
    return "" if before == after else "a step changes the dtypes or shapes of the state"
