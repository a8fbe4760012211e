"""What parameters a run starts from: random, a whole model, or a trained backbone."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from deeplab_jax.config import Config
from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import hub, saved_model, torch_file, torchvision

Log = Callable[[str], None]


class Taken(NamedTuple):
    """Arrays to lay over a model's fresh ones, and the names of those that stay fresh."""

    params: Arrays
    batch_stats: Arrays
    replaced: tuple[str, ...]  # because the number of classes differs
    missing: tuple[str, ...]  # from the file, as was allowed


def variables(config: Config, model: FunctionalModel, log: Log) -> Variables:
    """Random variables from the seed, with those of `config.init` laid over them.

    Args:
      config: of the run; `init.path` or `init.backbone` say what to read.
      model: whose variables are made.
      log: is told what was read and what stays random.

    Raises:
      UserError: if a file cannot be read, or lacks arrays, or has others than the model.
    """
    fresh = jax.jit(model.init)(jax.random.key(config.seed))
    source = config.init.path or config.init.backbone
    if not source:
        return fresh
    whole = bool(config.init.path)
    field = "config.init.path" if whole else "config.init.backbone"
    taken = take(source, model, field, whole, config.init.allow_missing, log)
    if taken.replaced:
        log(f"other number of classes: {', '.join(taken.replaced)} start anew")
    if taken.missing:
        log(f"missing as allowed, and start anew: {', '.join(taken.missing)}")
    return Variables(fresh.params | taken.params, fresh.batch_stats | taken.batch_stats)


def take(
    source: str, model: FunctionalModel, field: str, whole: bool, allow_missing: str, log: Log
) -> Taken:
    """Arrays of a checkpoint of ours, a file of weights, or weights that torchvision publishes."""
    path = pathlib.Path(source)
    what = "model" if whole else "backbone"
    if path.is_dir():
        saved = saved_model.read(path)
        log(f"{what} from {saved.path}")
        return adopt(saved.variables, model, whole=whole, allow_missing=allow_missing)
    if hub.is_name(source):
        path = hub.fetch(source)
    if not path.is_file():
        raise UserError(
            f"{field} = {source!r} is neither a folder with a checkpoint, nor a file of weights, "
            f"nor a name of torchvision's: {', '.join(hub.FILES)}"
        )
    log(f"{what} from {path}")
    converted = torchvision.to_model(
        torch_file.read(path), model, allow_missing=allow_missing, backbone_only=not whole
    )
    for note in converted.report.notes:
        log(note)
    report = converted.report
    return Taken(converted.params, converted.batch_stats, report.replaced, report.missing)


def adopt(
    saved: Variables, model: FunctionalModel, *, whole: bool, allow_missing: str = ""
) -> Taken:
    """The arrays of a checkpoint of ours that a model takes.

    Every array of the model must be there in its shape and, of a whole model, every saved array
    must have a place, with two exceptions: where the number of classes differs, the layers that
    give logits stay fresh, and what `allow_missing` names may be absent.

    Args:
      saved: to take from.
      model: to take for.
      whole: take all arrays, or those of the backbone alone.
      allow_missing: regular expression, found in names that may be absent; empty: none.

    Raises:
      UserError: listing what is missing, left over or of another shape.
    """
    problems: list[str] = []
    replaced: list[str] = []
    missing: list[str] = []

    def pick(ours: Arrays, theirs: Arrays) -> Arrays:
        picked = {}
        for name, value in ours.items():
            if not whole and not name.startswith("backbone."):
                continue
            if name not in theirs:
                allowed = allow_missing and re.search(allow_missing, name)
                (missing if allowed else problems).append(name if allowed else f"{name} is missing")
            elif value.shape == theirs[name].shape:
                picked[name] = np.asarray(theirs[name], value.dtype)
            elif gives_logits(name, value.shape, theirs[name].shape):
                replaced.append(name)
            else:
                problems.append(
                    f"{name} has shape {theirs[name].shape}, the model's is {value.shape}"
                )
        if whole:
            problems.extend(
                f"{name} has no place in the model" for name in theirs if name not in ours
            )
        return picked

    params = pick(model.abstract.params, saved.params)
    batch_stats = pick(model.abstract.batch_stats, saved.batch_stats)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in sorted(problems)[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"the checkpoint does not fit the model {model.architecture.name}:\n{shown}{more}"
        )
    return Taken(params, batch_stats, tuple(replaced), tuple(missing))


def gives_logits(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether an array belongs to a layer that gives logits, and differs in classes alone."""
    last_layer = ".logits." in name or name.startswith("decoder.")
    return last_layer and len(ours) == len(theirs) and ours[:-1] == theirs[:-1]
