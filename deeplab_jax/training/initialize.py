"""What parameters a run starts from: random, a whole model, or a trained backbone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from deeplab_jax.config import Config
from deeplab_jax.errors import UserError
from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables
from deeplab_jax.training import checkpoint


def variables(config: Config, model: FunctionalModel, log: Callable[[str], None]) -> Variables:
    """Random variables from the seed, with those of `config.init` laid over them.

    Args:
      config: of the run; `init.path` or `init.backbone` say what to read.
      model: whose variables are made.
      log: is told what was read and what was left out.

    Raises:
      UserError: if a file cannot be read, or lacks arrays, or has others than the model.
    """
    fresh = jax.jit(model.init)(jax.random.key(config.seed))
    if config.init.path:
        saved = checkpoint.read(config.init.path)
        log(f"starting from {saved.path}")
        return adopt(fresh, saved.variables, model, whole=True, log=log)
    if config.init.backbone:
        saved = checkpoint.read(config.init.backbone)
        log(f"backbone from {saved.path}")
        return adopt(fresh, saved.variables, model, whole=False, log=log)
    return fresh


def adopt(
    fresh: Variables,
    saved: Variables,
    model: FunctionalModel,
    *,
    whole: bool,
    log: Callable[[str], None],
) -> Variables:
    """The fresh variables with the saved ones in their place.

    Every array that is taken must be there and have the model's shape, and every saved array must
    have a place, with one exception: where the number of classes differs, the layers that give
    logits stay fresh, and that is said.

    Args:
      fresh: random variables of the model.
      saved: to take.
      model: that they belong to.
      whole: take all arrays, or those of the backbone alone.
      log: is told which layers stay fresh.

    Raises:
      UserError: listing what is missing, left over or of another shape.
    """
    classes = model.architecture.num_classes
    problems: list[str] = []
    replaced: list[str] = []

    def merge(ours: Arrays, theirs: Arrays) -> Arrays:
        merged = dict(ours)
        wanted = {name for name in ours if whole or name.startswith("backbone.")}
        for name in sorted(wanted):
            if name not in theirs:
                problems.append(f"{name} is missing")
            elif ours[name].shape == theirs[name].shape:
                merged[name] = np.asarray(theirs[name], ours[name].dtype)
            elif gives_logits(name, ours[name].shape, theirs[name].shape, classes):
                replaced.append(name)
            else:
                problems.append(
                    f"{name} has shape {theirs[name].shape}, the model's is {ours[name].shape}"
                )
        others = sorted(name for name in theirs if name not in ours)
        if whole:
            problems.extend(f"{name} has no place in the model" for name in others)
        return merged

    result = Variables(
        merge(fresh.params, saved.params), merge(fresh.batch_stats, saved.batch_stats)
    )
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"the checkpoint does not fit the model {model.architecture.name}:\n{shown}{more}"
        )
    if replaced:
        log(f"other number of classes: {', '.join(replaced)} start anew")
    return result


def gives_logits(
    name: str, ours: tuple[int, ...], theirs: tuple[int, ...], num_classes: int
) -> bool:
    """Whether shapes differ in the number of classes alone, in a layer of a head."""
    return (
        not name.startswith("backbone.")
        and len(ours) == len(theirs)
        and ours[:-1] == theirs[:-1]
        and ours[-1] == num_classes
    )
