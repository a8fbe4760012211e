"""The families of weights that are read and written: a table of names for each codebase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from deeplab_jax.models.architecture import ARCHITECTURES, Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.weights.families.family import BACKBONE
from deeplab_jax.weights.families.recognition import FAMILIES, Recognised, recognise
from deeplab_jax.weights.matching import Converted
from deeplab_jax.weights.saved_model import SavedModel

__all__ = [
    "FAMILIES",
    "UNSEEN",
    "Recognised",
    "architecture_of",
    "from_model",
    "loading_notes",
    "recognise",
    "to_model",
]

# Fields that change what a network computes, and neither names nor shapes of its arrays.
UNSEEN = (
    *("output_stride", "multi_grid", "atrous_rates", "dilation_rule", "stride_place", "padding"),
    *("align_corners", "bn_epsilon", "backbone_bn_epsilon"),
)
# Fields that models of all families take as arguments, and those that matter only in training.
_ARGUMENTS = ("num_classes", "in_channels", "width", "head_channels")
_OF_TRAINING = ("name", "bn_momentum", "backbone_bn_momentum", "dropout", "dtype")


def to_model(
    arrays: Mapping[str, np.ndarray],
    model: FunctionalModel,
    *,
    allow_missing: str = "",
    backbone_only: bool = False,
    notes: Sequence[str] = (),
) -> Converted:
    """Recognises the family of a file's arrays, and converts them to a model's variables.

    The arguments are those of `recognise` and `Recognised.to_model`.

    Raises:
      UserError: See these functions.
    """
    found = recognise(arrays, backbone_only=backbone_only, notes=notes)
    return found.to_model(model, allow_missing=allow_missing, backbone_only=backbone_only)


def architecture_of(arrays: Mapping[str, np.ndarray]) -> Architecture:
    """Returns the architecture of a DeepLab's arrays, see `Recognised.architecture`."""
    return recognise(arrays).architecture()


def from_model(
    variables: Variables, chosen: Architecture, family: str = ""
) -> dict[str, np.ndarray]:
    """Returns the arrays of a model by the names of a family.

    Args:
      variables: The model's variables.
      chosen: Its architecture.
      family: A key of `FAMILIES`; "timm" gives the backbone only. Default: that of the
        architecture's name, or else torchvision's names.

    Raises:
      UserError: The family is unknown or cannot be written, or a variable has no counterpart in it.
    """
    name = family or _family_name(chosen)
    target = FAMILIES.get(name)
    if target is None or not target.writes:
        writable = [each.name for each in FAMILIES.values() if each.writes]
        raise UserError(f"--as must be one of {', '.join(writable)}, got {name!r}")
    if name == "timm":
        variables = Variables(
            *({k: v for k, v in group.items() if k.startswith(BACKBONE)} for group in variables)
        )
    return target.from_model(variables, chosen)


def loading_notes(saved: SavedModel, family: str = "") -> tuple[str, ...]:
    """Returns what the user of a written file must set where it is loaded.

    Args:
      saved: The model that is written.
      family: As in `from_model`. If it is given, the family must have a model with these arrays.

    Raises:
      UserError: The given family has no such model.
    """
    chosen = saved.architecture
    target = FAMILIES[family or _family_name(chosen)]
    if target.name == "timm":
        return ()
    plus = chosen.decoder == "plus" and f"{target.name}plus_resnet50" in ARCHITECTURES
    theirs = ARCHITECTURES.get(f"{target.name}{'plus' if plus else ''}_{chosen.backbone}")
    ignored = {*_ARGUMENTS, *_OF_TRAINING, *target.optional}
    values = {
        field: getattr(chosen, field)
        for field in Architecture.__dataclass_fields__
        if field not in ignored and getattr(chosen, field) != getattr(theirs, field, None)
    }
    seen = [f"backbone={chosen.backbone}"]
    if theirs:
        same_number = len(chosen.atrous_rates) == len(theirs.atrous_rates)  # shapes tell it
        unseen = [field for field in UNSEEN if field != "atrous_rates" or same_number]
        seen = [
            f"{field}={value} here, {getattr(theirs, field)} there"
            for field, value in values.items()
            if field not in unseen
        ]
    if seen:
        problem = f"{target.title} has no such model ({listed(seen, '; ')})"
        if family:
            raise UserError(f"{chosen.name} cannot be written as {target.name}: {problem}")
        return (f"Only this package reads the file: {problem}",)
    if chosen.in_channels == len(target.mean):
        for field in ("mean", "std"):
            ours = tuple(saved.info[field])
            if not np.allclose(ours, getattr(target, field), atol=1e-3):
                values[field] = ours
    if not values:
        return ()
    said = ", ".join(f"{field}={value}" for field, value in values.items())
    return (
        f"The file does not say {said}, unlike {target.title}'s defaults: set it where the file is "
        "loaded, or its logits differ.",
    )


def _family_name(chosen: Architecture) -> str:
    """Returns the family of an architecture's name, or torchvision.

    Raises:
      UserError: That family is not written.
    """
    own = chosen.name.partition("_")[0].removesuffix("plus")
    if own in FAMILIES and not FAMILIES[own].writes:
        raise UserError(
            f"{chosen.name} cannot be written as a file of another codebase; `deeplab-jax push` "
            "and hf://org/name write a folder of this package"
        )
    return own if own in FAMILIES else "torchvision"
