"""A model as pure functions over flat dictionaries of arrays.

The rest of the package uses parameters of the form `{"backbone.layer4.0.conv2.kernel": array, ...}`
and does not depend on NNX. A dotted name is the attribute path of the variable in `DeepLabV3`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.deeplab import DeepLabV3, build_model
from deeplab_jax.models.fusion import fuse_batch_norm
from deeplab_jax.models.layers import ShapeRngs
from deeplab_jax.models.ops.convolution import Implementation, use_implementation

Arrays = dict[str, Any]


class Variables(NamedTuple):
    """Arrays of a model by dotted name."""

    params: Arrays
    batch_stats: Arrays  # running means and variances of batch norm


class FunctionalModel:
    """The functions `init` and `apply` of a model; holds no arrays.

    Attributes:
      architecture: description of the model.
      abstract: shapes and dtypes of its variables.
      is_fused: whether its batch norms are fused into its convolutions, see `fused`.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._edits: tuple[tuple[Any, ...], ...] = ()  # functions of a module and their arguments
        self._trace(lambda: build_model(architecture, rngs=ShapeRngs(0)))

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(cls, architecture: Architecture) -> FunctionalModel:
        """Returns the model of an architecture, which is built once: that takes 0.1 s."""
        return cls(architecture)

    def _trace(self, make: Callable[..., DeepLabV3], *arguments: Any) -> None:
        """Stores the graph and the shapes of the module that a function makes."""

        def make_variables(*arguments: Any) -> Variables:
            self._graph, *states = _split(make(*arguments))
            self._paths = [
                {_name(path): path for path, _ in nnx.to_flat_state(state)} for state in states
            ]
            return Variables(*map(_flatten, states))

        self.abstract = jax.eval_shape(make_variables, *arguments)
        self._edited: dict[tuple[Any, ...], FunctionalModel] = {}

    def edited(self, edit: Callable[..., None], *arguments: Any) -> FunctionalModel:
        """Returns the model whose module is changed by a function; cached.

        Args:
          edit: function that changes the attributes of a `DeepLabV3` in place.
          *arguments: its other arguments, hashable.
        """
        key = (edit, *arguments)
        if key not in self._edited:

            def make(variables: Variables) -> DeepLabV3:
                module = self._merge(variables)
                edit(module, *arguments)
                return module

            model = object.__new__(FunctionalModel)
            model.architecture, model._edits = self.architecture, (*self._edits, key)
            model._trace(make, self.abstract)
            self._edited[key] = model
        return self._edited[key]

    def using(self, implementation: Implementation) -> FunctionalModel:
        """Returns the model with another implementation of its operations."""
        return self.edited(use_implementation, implementation)

    def at_output_stride(self, output_stride: int) -> FunctionalModel:
        """Returns the model at another output stride, for the same variables.

        Raises:
          UserError: as `Architecture.at_output_stride` does.
        """
        model = FunctionalModel(self.architecture.at_output_stride(output_stride))
        for edit, *arguments in self._edits:
            model = model.edited(edit, *arguments)
        return model

    @property
    def is_fused(self) -> bool:
        return any(edit is fuse_batch_norm for edit, *_ in self._edits)

    @property
    def fused(self) -> FunctionalModel:
        """The model for inference with fused batch norms, whose variables `fuse` returns.

        See `models.fusion.fuse_batch_norm`.
        """
        return self if self.is_fused else self.edited(fuse_batch_norm)

    def fuse(self, variables: Variables) -> Variables:
        """Returns the variables of `fused` that correspond to variables of this model.

        The result has NumPy arrays if `variables` does, and otherwise JAX arrays.
        """
        if self.is_fused:
            return variables
        module = self._merge(variables)
        fuse_batch_norm(module)
        return _variables(module)

    def init(self, key: jax.Array) -> Variables:
        """Returns random parameters and initial running statistics."""
        return _variables(build_model(self.architecture, rngs=nnx.Rngs(params=key)))

    def apply(
        self,
        variables: Variables,
        images: Float[Array, "n h w c"],
        *,
        train: bool = False,
        key: jax.Array | None = None,
        freeze_bn: bool = False,
        remat: bool = False,
        sizes: Int[Array, "n 2"] | None = None,
        upsample: bool = True,
    ) -> tuple[dict[str, Float[Array, "n ho wo classes"]], Arrays]:
        """Returns logits by head, and the running statistics after this batch.

        Args:
          variables: arrays of the model.
          images: normalized pixels.
          train: whether batch norm uses the statistics of the batch and dropout is active.
          key: key of dropout, needed in training with dropout.
          freeze_bn: whether batch norm uses and keeps its running statistics in training.
          remat: whether to recompute blocks of the backbone in the backward pass, which saves
            memory for about a third more arithmetic.
          sizes, upsample: see `DeepLabV3.__call__`.

        Raises:
          ValueError: `train` with a fused model, with sizes, or with dropout and no key; `remat`
            with a backbone that has no such attribute; or as `DeepLabV3` does.
        """
        # Batch norm assigns to elements of its statistics, which only JAX arrays support.
        module = self._merge(jax.tree.map(jnp.asarray, variables))
        if train and self.is_fused:
            raise ValueError("a model with fused batch norm is for inference: train the original")
        if train and sizes is not None:
            # The statistics of batch norm would include the padding.
            raise ValueError("train=True takes no sizes: padding is for inference only")
        module.set_attributes(
            deterministic=not train,
            use_running_average=not train or freeze_bn,
            raise_if_not_found=False,
        )
        rates = (part.rate for _, part in nnx.iter_modules(module) if isinstance(part, nnx.Dropout))
        if train and key is None and (rate := max(rates, default=0.0)):
            raise ValueError(f"train=True needs a key: dropout is {rate}, not 0")
        if train and remat:
            if not hasattr(module.backbone, "remat"):
                raise ValueError(
                    f"{type(module.backbone).__name__} has no attribute `remat`, so it cannot save "
                    "memory by recomputing: set config.train.remat=False, or see docs/extending.md"
                )
            module.backbone.remat = True
        outputs = module(images, sizes=sizes, upsample=upsample, rngs=key if train else None)
        return outputs, _flatten(nnx.state(module, nnx.BatchStat))

    def _merge(self, variables: Variables) -> DeepLabV3:
        states = (
            nnx.from_flat_state({path: kind(arrays[name]) for name, path in paths.items()})
            for kind, arrays, paths in zip(
                (nnx.Param, nnx.BatchStat), variables, self._paths, strict=True
            )
        )
        return nnx.merge(self._graph, *states)


def normalize(
    images: Num[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Normalizes pixels 0..255: `(pixel / 255 - mean) / std`, with one mean and std per channel."""
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def _split(module: DeepLabV3) -> tuple[Any, Any, Any]:
    """Returns the graph, the parameters and the running statistics of a module."""
    graph, params, batch_stats, rest = nnx.split(  # type: ignore[misc]
        module, nnx.Param, nnx.BatchStat, ...
    )
    if others := [_name(path) for path, _ in nnx.to_flat_state(rest)]:
        raise ValueError(
            "the model holds variables that are neither nnx.Param nor nnx.BatchStat: "
            f"{', '.join(others[:5])}. Make nnx.Dropout without rngs, and call it with the key of "
            "the head's call: self.dropout(x, rngs=rngs)"
        )
    return graph, params, batch_stats


def _variables(module: DeepLabV3) -> Variables:
    _, *states = _split(module)
    return Variables(*map(_flatten, states))


def _flatten(state: Any) -> Arrays:
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
