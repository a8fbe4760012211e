"""The description of a family of weights: names, axes and defaults.

A family is a codebase whose files people hold. Its table maps the names of modules here to names
there; the names and axes of a layer's arrays are the same for all of PyTorch. Conversion is strict:
every array is used or dropped for a known reason, and every variable is filled from one array.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.matching import Slot

BACKBONE = "backbone."  # the beginning of the names of a backbone's variables here

# Rows of (regular expression for a module here, its name in the family with groups as \1).
Table = Sequence[tuple[str, str]]
Shapes = Mapping[str, tuple[int, ...]]  # of arrays by the names in the family's table


class Leaf(NamedTuple):
    """An array of a layer: its name here and there, and the axes there in the order of ours."""

    name: str
    their_name: str
    axes: tuple[int, ...]


# PyTorch's "weight" is a kernel or a scale, depending on its number of axes.
TORCH_LEAVES = (
    Leaf("kernel", ".weight", (2, 3, 1, 0)),  # PyTorch's axes: out, in, row, column
    Leaf("scale", ".weight", (0,)),  # batch norm
    Leaf("bias", ".bias", (0,)),
    Leaf("mean", ".running_mean", (0,)),
    Leaf("var", ".running_var", (0,)),
)

# PyTorch uses the first only if a norm's momentum is None.
_DROPPED = (
    (r".*\.num_batches_tracked", "counts batches, which nothing here reads"),
    (r"n_averaged", "counts averaged models, which nothing here reads"),
)


class ConfigFields(NamedTuple):
    """A model's settings in a config. Empty: the config does not have them."""

    fields: dict[str, Any]  # of `Architecture`
    classes: tuple[str, ...] = ()  # names
    mean: tuple[float, ...] = ()  # of the channels, 0..1
    std: tuple[float, ...] = ()  # of the channels, 0..1


@dataclasses.dataclass(frozen=True)
class Family:
    """A codebase whose weights are read, and written if `writes`.

    Attributes:
      name: The name for `--as`.
      title: The name for people.
      signature: For each array that a DeepLab of the family has, beginnings of its name, of which
        one must fit. Empty: no file is recognised as the family's.
      modules: Returns the table of module names for an architecture.
      assumed: Fields of `Architecture` that shapes never tell, for a report.
      backbone: Beginning of the names of a backbone's arrays.
      architectures: The first part of the names of its architectures; empty: `name`.
      read_config: Returns the model's settings in a file's config, see `WeightsFile.config`. It
        raises UserError if the config or the shapes are those of an unsupported model.
      leaves: Arrays of a layer. "depthwise_kernel" and "norm_bias" go before "kernel" and "bias".
      dropped: (regular expression for a name, reason) of arrays without a counterpart.
      first_channels: Returns for a variable the number of its first input channels that are the
        last ones here, since the family concatenates features in another order; 0 for most.
      rename: Returns the name in the table for each name of a file, which may be of an older
        version, or of a backbone only.
      complete: Adds the arrays that a format leaves out, and returns notes on it.
      defaults: Fields of `Architecture` where the family differs from the named architecture, if
        the file does not tell them.
      optional: Fields that its models take as arguments, beside the sizes that all take.
      mean, std: Of the channels, 0..1, unless a config says others.
      resize: How the family resizes images, for the checkpoint's description.
      size: Height and width of its training crops or evaluated images, pixels.
      writes: Whether `from_model` writes the family's names.
    """

    name: str
    title: str
    signature: tuple[tuple[str, ...], ...]
    modules: Callable[[Architecture], Table]
    assumed: tuple[str, ...]
    backbone: str
    architectures: str = ""
    read_config: Callable[[Mapping[str, Any], Shapes], ConfigFields] = lambda *_: ConfigFields({})
    leaves: tuple[Leaf, ...] = TORCH_LEAVES
    dropped: tuple[tuple[str, str], ...] = ()
    first_channels: Callable[[str, tuple[int, ...], Architecture], int] = lambda *_: 0
    rename: Callable[[Sequence[str]], list[str]] = list
    complete: Callable[[dict[str, np.ndarray]], tuple[dict[str, np.ndarray], tuple[str, ...]]] = (
        lambda arrays: (arrays, ())
    )
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: str = ""
    size: tuple[int, int] = (512, 512)
    writes: bool = True

    def matches(self, names: Iterable[str]) -> bool:
        """Whether names have the family's signature."""
        return bool(self.signature) and all(any_begins(names, *each) for each in self.signature)

    def module_names(self, architecture: Architecture) -> Callable[[str], str]:
        """Returns a function that gives the family's name of a module here, "" if it has none."""
        table = [(re.compile(pattern), theirs) for pattern, theirs in self.modules(architecture)]

        @functools.cache
        def name_of(ours: str) -> str:
            found = ((pattern.fullmatch(ours), theirs) for pattern, theirs in table)
            return next((match.expand(theirs) for match, theirs in found if match), "")

        return name_of

    def slots(self, model: FunctionalModel, *, backbone_only: bool = False) -> dict[str, Slot]:
        """Returns the variables of a model that a file must fill, by the family's names."""
        variables = model.abstract.params | model.abstract.batch_stats
        # A variable without a counterpart keeps its own name, which no file has.
        return {
            theirs or slot.name: slot
            for theirs, slot in self._counterparts(variables, model.architecture)
            if not backbone_only or slot.name.startswith(BACKBONE)
        }

    def _counterparts(
        self, variables: Mapping[str, Any], architecture: Architecture
    ) -> Iterator[tuple[str, Slot]]:
        """Yields the family's name of each variable, "" if it has none, and how it is filled."""
        module_of = self.module_names(architecture)
        leaves = {(leaf.name, len(leaf.axes)): leaf for leaf in self.leaves}
        for name, value in variables.items():
            parent, _, kind = name.rpartition(".")
            shape, special = tuple(value.shape), kind
            if kind == "kernel" and len(shape) == 4 and shape[2] == 1 < shape[3]:
                special = "depthwise_kernel"
            elif kind == "bias" and re.fullmatch(r".*bn\d*", parent):
                special = "norm_bias"
            leaf = leaves.get((special, len(shape))) or leaves.get((kind, len(shape)))
            axes = leaf.axes if leaf else tuple(range(len(shape)))
            theirs = tuple(shape[axis] for axis in np.argsort(axes))
            first = self.first_channels(name, shape, architecture)
            module = module_of(parent)
            yield (
                f"{module}{leaf.their_name}" if module and leaf else "",
                Slot(name, axes, theirs, value.dtype, first),
            )

    def why_dropped(self, name: str, model: FunctionalModel, backbone_only: bool) -> str:
        """Returns the reason why a model has no use for an array; empty if it has."""
        for pattern, reason in (*_DROPPED, *self.dropped):
            if re.fullmatch(pattern, name):
                return reason
        if backbone_only and not name.startswith(self.backbone):
            return "belongs to a head, and only the backbone is used"
        is_aux = name.startswith(("aux_classifier.", "auxiliary_head."))
        if is_aux and not model.architecture.aux_head:
            return "belongs to the auxiliary head, which the model does not have"
        return ""

    def from_model(self, variables: Variables, architecture: Architecture) -> dict[str, np.ndarray]:
        """Returns the arrays of a model's variables by the family's names.

        Batch norm's counters of batches are 0.

        Raises:
          UserError: A variable has no counterpart in the family.
        """
        arrays: dict[str, np.ndarray] = {}
        named = variables.params | variables.batch_stats
        for key, slot in self._counterparts(named, architecture):
            if not key:
                raise UserError(
                    f"{slot.name} has no counterpart in {self.title}'s models, so "
                    f"{architecture.name} cannot be written in its format"
                )
            value = np.asarray(named[slot.name])
            if slot.first_channels:
                value = np.roll(value, slot.first_channels, axis=2)
            arrays[key] = np.transpose(value, np.argsort(slot.axes))
            if key.endswith(".running_var"):
                counter = key.removesuffix("running_var") + "num_batches_tracked"
                arrays[counter] = np.zeros((), np.int64)
        return arrays


def pool_first(name: str, shape: tuple[int, ...], architecture: Architecture) -> int:
    """`Family.first_channels` of families that concatenate image pooling before ASPP's branches."""
    if name != "classifier.aspp.project.conv.kernel" or not architecture.image_pooling:
        return 0
    return shape[2] // (2 + len(architecture.atrous_rates))


def any_begins(names: Iterable[str], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in names)
