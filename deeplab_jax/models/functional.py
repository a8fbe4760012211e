"""A DeepLabv3 as pure functions over flat dictionaries of arrays.

The rest of the package sees parameters as `{"backbone.layer4.0.conv2.kernel": array, ...}` and
knows nothing of NNX. A dotted name is the attribute path of the variable in `DeepLabV3`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from deeplab_jax.models.deeplab import Architecture, DeepLabV3

Arrays = dict[str, Any]


class Variables(NamedTuple):
    """Arrays of a model by dotted name."""

    params: Arrays
    batch_stats: Arrays  # running means and variances of batch norm


class FoldedVariables(Variables):
    """Arrays for inference, see `FunctionalModel.fold`."""


class FunctionalModel:
    """`init`, `fold` and `apply` of one architecture; holds no arrays."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        module = nnx.eval_shape(lambda: DeepLabV3(architecture, rngs=None))
        self._norms = _norms_behind_convolutions(module)
        self._graph: Any
        self._graph, params, batch_stats = _split(module)
        self._param_paths = _paths(params)
        self._stat_paths = _paths(batch_stats)
        self.abstract = Variables(_flatten(params), _flatten(batch_stats))

    def init(self, key: jax.Array) -> Variables:
        """Random parameters, and the running statistics of a batch norm that saw nothing."""
        module = DeepLabV3(self.architecture, rngs=nnx.Rngs(params=key))
        _, params, batch_stats = _split(module)
        return Variables(_flatten(params), _flatten(batch_stats))

    def fold(self, variables: Variables) -> FoldedVariables:
        """Batch norm by running statistics put into the convolution before it, where one is.

        `apply` then computes the same up to rounding with less: a convolution and its bias. Kernels
        are scaled, and the norms' biases are the shifts; what else norms have is left, unused.

        Args:
          variables: of the model, as NumPy's arrays or JAX's: the result's are of the same kind.
            Folded ones are given back.
        """
        if isinstance(variables, FoldedVariables):
            return variables
        params, stats = dict(variables.params), variables.batch_stats
        for conv, (norm, epsilon) in self._norms.items():
            scale = params[f"{norm}.scale"] * (stats[f"{norm}.var"] + epsilon) ** -0.5
            params[f"{conv}.kernel"] = params[f"{conv}.kernel"] * scale
            params[f"{norm}.bias"] = params[f"{norm}.bias"] - stats[f"{norm}.mean"] * scale
        return FoldedVariables(params, stats)

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
        """Logits by head, and the running statistics after this batch.

        Args:
          variables: arrays of the model; for inference `fold` makes them faster.
          images: normalised pixels.
          train: normalise by the batch's statistics and drop units.
          key: of dropout; needed when training with it.
          freeze_bn: keep to the running statistics although training.
          remat: recompute each residual unit in the backward pass.
          sizes: height and width of each image, pixels; what lies beyond is padding, of which the
            logits on the image do not depend. At inference alone; see `models.padding`.
          upsample: resize the logits to the images' size.

        Raises:
          ValueError: as `DeepLabV3` does.
        """
        module = nnx.merge(
            self._graph,
            _unflatten(variables.params, self._param_paths, nnx.Param),
            _unflatten(variables.batch_stats, self._stat_paths, nnx.BatchStat),
        )
        outputs = module(
            images,
            train=train,
            key=key,
            freeze_bn=freeze_bn,
            remat=remat,
            sizes=sizes,
            folded=isinstance(variables, FoldedVariables),
            upsample=upsample,
        )
        return outputs, _flatten(nnx.state(module, nnx.BatchStat))


def normalize(
    images: Num[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Pixels 0..255 to (pixel / 255 - mean) / std, with mean and std one number a channel."""
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def _norms_behind_convolutions(module: DeepLabV3) -> dict[str, tuple[str, float]]:
    """Name and epsilon of the batch norm behind each convolution that one is folded into."""
    parts = list(nnx.iter_modules(module))
    names = {id(part): _name(path) for path, part in parts}
    return {
        names[id(conv)]: (names[id(norm)], norm.epsilon)
        for _, part in parts
        if hasattr(part, "conv_norms")
        for conv, norm in part.conv_norms()
    }


def _split(module: DeepLabV3) -> tuple[Any, Any, Any]:
    graph, params, batch_stats = nnx.split(module, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graph, params, batch_stats


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _paths(state: Any) -> dict[str, tuple[Any, ...]]:
    return {_name(path): path for path, _ in nnx.to_flat_state(state)}


def _flatten(state: Any) -> Arrays:
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _unflatten(arrays: Arrays, paths: dict[str, tuple[Any, ...]], kind: type) -> Any:
    # NumPy arrays too become JAX's: batch norm assigns to its statistics.
    return nnx.from_flat_state({p: kind(jnp.asarray(arrays[n])) for n, p in paths.items()})
