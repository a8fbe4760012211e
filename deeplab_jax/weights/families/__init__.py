"""The families of weights that are read and written: a table of names for each codebase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deeplab_jax.models.architecture import ARCHITECTURES, Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.weights.families.family import BACKBONE
from deeplab_jax.weights.families.recognised import Recognised
from deeplab_jax.weights.families.recognition import FAMILIES, recognise
from deeplab_jax.weights.matching import Converted

__all__ = [
    "FAMILIES",
    "Recognised",
    "architecture_of",
    "from_model",
    "loading_notes",
    "recognise",
    "to_model",
]


def to_model(
    arrays: Mapping[str, np.ndarray],
    model: FunctionalModel,
    *,
    config: Mapping[str, Any] | None = None,
    allow_missing: str = "",
    backbone_only: bool = False,
    notes: Sequence[str] = (),
) -> Converted:
    """Converts the arrays of a file of any family to a model's variables.

    Raises:
      UserError: As `recognise` and `Family.to_model`.
    """
    found = recognise(arrays, config, backbone_only=backbone_only, notes=notes)
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
    own = chosen.name.partition("_")[0].removesuffix("plus")
    name = family or (own if own in FAMILIES and FAMILIES[own].writes else "torchvision")
    target = FAMILIES.get(name)
    if target is None or not target.writes:
        writable = [each.name for each in FAMILIES.values() if each.writes]
        raise UserError(f"--as must be one of {', '.join(writable)}, got {name!r}")
    if name == "timm":
        variables = Variables(
            *({k: v for k, v in group.items() if k.startswith(BACKBONE)} for group in variables)
        )
    return target.from_model(variables, chosen)


# Fields that are arguments of the family's own models, or follow from them.
_ARGUMENTS = ("num_classes", "in_channels", "width", "head_channels")
_OPTIONAL = {
    "torchvision": ("aux_head",),
    "mmseg": ("aux_head", "stem"),
    "smp": ("separable_aspp",),
    "vainf": (),
}
# Fields that change neither names nor shapes of arrays.
_UNSEEN = (
    *("output_stride", "multi_grid", "atrous_rates", "dilation_rule", "stride_place"),
    *("align_corners", "bn_epsilon", "backbone_bn_epsilon"),
)


def loading_notes(chosen: Architecture, family: str) -> tuple[str, ...]:
    """Checks that a family has a model of an architecture, and says what its user must set there.

    Raises:
      UserError: The family has no model with these arrays.
    """
    if family == "timm":
        return ()
    plus = "plus" if chosen.decoder == "plus" and f"{family}plus_resnet50" in ARCHITECTURES else ""
    name = f"{family}{plus}_{chosen.backbone}"
    if name not in ARCHITECTURES:
        raise UserError(
            f"{chosen.name} cannot be written as {family}: it has no model {chosen.backbone}"
        )
    fields = (*_ARGUMENTS, *_OPTIONAL[family])
    theirs = architecture(name, **{field: getattr(chosen, field) for field in fields})
    target = FAMILIES[family]
    ours, wanted = (
        {name: slot.shape for name, slot in target.slots(FunctionalModel.of(each)).items()}
        for each in (chosen, theirs)
    )
    differing = [key for key in ours.keys() | wanted.keys() if ours.get(key) != wanted.get(key)]
    values = {
        field: (getattr(chosen, field), getattr(theirs, field))
        for field in Architecture.__dataclass_fields__
        if field not in ("name", "bn_momentum", "backbone_bn_momentum", "dropout", "dtype")
        if getattr(chosen, field) != getattr(theirs, field)
    }
    if differing:
        seen = [f"{f}={ours} here, {their} there" for f, (ours, their) in values.items()]
        raise UserError(
            f"{chosen.name} cannot be written as {family}: {target.title} has no such model "
            f"({listed(seen, '; ')}), so {len(differing)} arrays would be missing or left over, as "
            f"{listed(sorted(differing)[:3])}"
        )
    unseen = [f"{field}={values[field][0]}" for field in _UNSEEN if field in values]
    if not unseen:
        return ()
    return (
        f"The file does not say {', '.join(unseen)}, which differ from {target.title}'s defaults: "
        "set them where the file is loaded, or its logits differ.",
    )
