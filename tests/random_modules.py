"""Modules with random parameters from NumPy, which avoids compiling an initializer per shape."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deeplab_jax.models.functional import FunctionalModel, Variables


def abstract_module(make):
    """The module that `make()` returns, with shapes for arrays, in inference mode."""
    module = nnx.eval_shape(make)
    module.eval()
    return module


def random_module(make, seed=0):
    """The module that `make()` returns, with kernels from He's initialization, in inference mode.

    Batch norms and biases are as after training, so that a swapped or forgotten one shows.
    """
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract_module(make))
    filled = {
        path: type(variable)(_value(rng, path[-1], variable))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(filled))


def random_variables(model: FunctionalModel, seed=0) -> Variables:
    """Variables of a model, as `random_module` makes them."""
    rng = np.random.default_rng(seed)
    return Variables(
        *(
            {name: _value(rng, name.split(".")[-1], leaf) for name, leaf in part.items()}
            for part in model.abstract
        )
    )


def _value(rng, name, like):
    shape = like.shape
    if name in ("scale", "var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name in ("bias", "mean"):
        value = rng.normal(0, 0.3, shape)
    else:
        value = rng.normal(0, np.sqrt(2 / np.prod((*shape[:2], shape[-1]))), shape)
    return jnp.asarray(value, like.dtype)
