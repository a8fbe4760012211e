"""Modules filled by NumPy, for which no program is compiled for each shape of parameter."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def random_module(make, seed=0):
    """The module that `make()` returns, with kernels from He's initialisation.

    Batch norms and biases are as after training, so that a swapped or forgotten one shows.
    """
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(make))

    def value(name, shape):
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape)
        if name in ("bias", "mean"):
            return rng.normal(0, 0.3, shape)
        return rng.normal(0, np.sqrt(2 / np.prod((*shape[:2], shape[-1]))), shape)

    filled = {
        path: type(variable)(jnp.asarray(value(path[-1], variable.shape), variable.dtype))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(filled))
