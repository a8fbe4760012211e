"""A model as pure functions over flat dictionaries of arrays.

The rest of the package uses parameters of the form `{"backbone.layer4.0.conv2.kernel": array, ...}`
and does not depend on NNX. A dotted name is the attribute path of the variable in `DeepLabV3`.
"""

from __future__ import annotations

import copy
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
        self.is_fused = False
        self._edits: tuple[Callable[[DeepLabV3], None], ...] = ()
        self._using: dict[Implementation, FunctionalModel] = {}
        self._set_module(lambda: build_model(architecture, rngs=ShapeRngs(0)))

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(cls, architecture: Architecture) -> FunctionalModel:
        """Returns the model of an architecture, which is built once: that takes 0.1 s."""
        return cls(architecture)

    def _set_module(self, make: Callable[..., DeepLabV3], *arguments: Any) -> None:
        """Stores the graph and the shapes of the module that a function makes."""

        def make_variables(*arguments: Any) -> Variables:
            self._graph, *states = _split(make(*arguments))
            self._paths = [
                {_name(path): path for path, _ in nnx.to_flat_state(state)} for state in states
            ]
            return Variables(*map(_flatten, states))

        self.abstract = jax.eval_shape(make_variables, *arguments)

    def edited(self, edit: Callable[[DeepLabV3], None]) -> FunctionalModel:
        """Returns a copy of the model whose module was passed to `edit`.

        Args:
          edit: function that changes the attributes of a module in place.
        """

        def make(variables: Variables) -> DeepLabV3:
            module = self._merge(variables)
            edit(module)
            return module

        model = copy.copy(self)
        model._edits = (*self._edits, edit)
        model._using = {}
        model.__dict__.pop("fused", None)  # the cached property of this model
        model._set_module(make, self.abstract)
        return model

    def using(self, implementation: Implementation) -> FunctionalModel:
        """Returns the model with another implementation of its operations; cached."""
        if implementation not in self._using:
            edit = functools.partial(use_implementation, implementation=implementation)
            self._using[implementation] = self.edited(edit)
        return self._using[implementation]

    def at_output_stride(self, output_stride: int) -> FunctionalModel:
        """Returns the model at another output stride, for the same variables.

        Raises:
          UserError: as `Architecture.at_output_stride` does.
        """
        model = FunctionalModel(self.architecture.at_output_stride(output_stride))
        for edit in self._edits:
            model = model.edited(edit)
        model.is_fused = self.is_fused
        return model

    @functools.cached_property
    def fused(self) -> FunctionalModel:
        """The model for inference with fused batch norms, whose variables `fuse` returns.

        See `models.fusion.fuse_batch_norm`.
        """
        if self.is_fused:
            return self
        model = self.edited(fuse_batch_norm)
        model.is_fused = True
        return model

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
          sizes: see `DeepLabV3.__call__`.
          upsample: see `DeepLabV3.__call__`.

        Raises:
          ValueError: `train` with a fused model, with sizes, or with dropout and no key; `remat`
            with a backbone that has no such attribute; or as `DeepLabV3` does.
        """
        # Batch norm assigns to elements of its statistics, which only JAX arrays support.
        module = self._merge(jax.tree.map(jnp.asarray, variables))
        if train:
            self._check_training(module, key, sizes)
        module.set_attributes(
            deterministic=not train,
            use_running_average=not train or freeze_bn,
            raise_if_not_found=False,
        )
        if remat and train:
            _set_remat(module)
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

    def _check_training(
        self, module: DeepLabV3, key: jax.Array | None, sizes: Array | None
    ) -> None:
        if self.is_fused:
            raise ValueError("a model with fused batch norm is for inference: train the original")
        if sizes is not None:
            # The statistics of batch norm would include the padding.
            raise ValueError("train=True takes no sizes: padding is for inference only")
        parts = [part for _, part in nnx.iter_modules(module) if isinstance(part, nnx.Dropout)]
        rate = max((part.rate for part in parts), default=0.0)
        if key is None and rate:
            raise ValueError(f"train=True needs a key: dropout is {rate}, not 0")


def normalize(
    images: Num[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Normalizes pixels 0..255: `(pixel / 255 - mean) / std`, with one mean and std per channel."""
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def _set_remat(module: DeepLabV3) -> None:
    backbone: Any = module.backbone
    if not hasattr(backbone, "remat"):
        raise ValueError(
            f"{type(backbone).__name__} has no attribute `remat`, so it cannot save memory by "
            "recomputing: set config.train.remat=False, or see docs/extending.md"
        )
    backbone.remat = True


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
