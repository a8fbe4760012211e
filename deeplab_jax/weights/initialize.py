"""The variables from which a run starts: random ones, a whole model's, or a trained backbone's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from deeplab_jax.config import Config
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import families, hub, hub_folder
from deeplab_jax.weights.families.family import BACKBONE
from deeplab_jax.weights.matching import Converted, fill, own_slots
from deeplab_jax.weights.saved_model import SavedModel


def init_variables(config: Config, model: FunctionalModel, log: Callable[[str], None]) -> Variables:
    """Returns random variables from the seed, replaced by those that `config.init` names.

    Args:
      config: The run's config; `init.path` or `init.backbone` is a workdir or folder of a
        checkpoint, a weights file, or the name of published weights.
      model: The model whose variables are returned.
      log: Called with messages on what was read and what stays random.

    Raises:
      UserError: A file cannot be read, its arrays do not fit the model, or are not finite.
    """
    fresh = on_host(model.init, lambda: jax.random.key(config.seed))
    source = config.init.path or config.init.backbone
    if not source:
        return fresh
    backbone_only = not config.init.path
    field = "config.init.backbone" if backbone_only else "config.init.path"
    path = hub.find_weights(source, field)
    options: dict[str, Any] = {
        "allow_missing": config.init.allow_missing,
        "backbone_only": backbone_only,
    }
    try:
        file = hub_folder.open_model(path)
        at = file.path if isinstance(file, SavedModel) else path
        log(f"{'backbone' if backbone_only else 'model'} from {at}")
        if isinstance(file, SavedModel):
            converted, report = from_checkpoint(file.variables, model, **options)
        else:
            found = families.recognise(
                file.arrays, file.config, backbone_only=backbone_only, notes=file.notes
            )
            _compare(found, config, model.architecture, log)
            converted, report = found.to_model(model, **options)
    except UserError as error:
        raise UserError(f"{field} = {source!r}: {error}") from None
    for note in report.notes:
        log(note)
    if report.replaced:
        log(f"other number of classes: {', '.join(report.replaced)} stay random")
    if report.missing:
        log(f"missing as allowed: {', '.join(report.missing)} stay random")
    return Variables(fresh.params | converted.params, fresh.batch_stats | converted.batch_stats)


_OF_BACKBONE = ("padding", "stride_place", "backbone_bn_epsilon")  # of `families.UNSEEN`


def _compare(
    found: families.Recognised,
    config: Config,
    ours: Architecture,
    log: Callable[[str], None],
) -> None:
    """Says how the network that a file was trained with computes otherwise than ours."""
    with contextlib.suppress(UserError):  # of a file that holds no whole network
        theirs = found.architecture()
        fields = families.UNSEEN if config.init.path else _OF_BACKBONE
        pairs = {each: (getattr(theirs, each), getattr(ours, each)) for each in fields}
        differing = [f"{name}={a} (here {b})" for name, (a, b) in pairs.items() if a != b]
        if differing:
            log(f"the weights were trained with {', '.join(differing)}")
    for field, trained in zip(("mean", "std"), found.normalization(), strict=True):
        here = getattr(config.data, field)
        if len(trained) == len(here) and not np.allclose(trained, here, atol=1e-3):
            values = ",".join(f"{value:g}" for value in trained)
            log(f"the weights were trained with another {field}: --config.data.{field}={values}")


def on_host(function: Callable[..., Any], make_argument: Callable[[], Any]) -> Any:
    """Jits and calls a function on the host's CPU, where its many small parts compile fast.

    An accelerator that is JAX's only platform computes it otherwise.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.jit(function)(make_argument())
    # The same bits as with the default level, 2, which takes twice as long to compile.
    options = {"xla_backend_optimization_level": 1}
    with jax.default_device(host):
        return jax.jit(function, compiler_options=options)(make_argument())


def from_checkpoint(
    saved: Variables,
    model: FunctionalModel,
    *,
    allow_missing: str = "",
    backbone_only: bool = False,
) -> Converted:
    """Returns a model's variables, filled from a checkpoint of this package.

    Args:
      saved: The checkpoint's variables.
      model: The model to fill.
      allow_missing: Regular expression. Variables in whose name it is found may be missing.
      backbone_only: Whether to fill only the backbone, and to ignore all other variables of the
        checkpoint, such as a cascade's.

    Raises:
      UserError: See `fill`.
    """
    slots, arrays = own_slots(model), saved.params | saved.batch_stats
    if backbone_only:
        slots = {name: slot for name, slot in slots.items() if name.startswith(BACKBONE)}
        arrays = {name: array for name, array in arrays.items() if name in slots}
    return fill(
        model,
        slots,
        arrays,
        source="the checkpoint",
        allow_missing=allow_missing,
    )
