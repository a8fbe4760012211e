"""Modules with random parameters from NumPy, which avoids compiling an initializer per shape."""

import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deeplab_jax.data import labels
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.weights import saved_model


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


def random_saved_model(
    arch: Architecture, *, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0, change=lambda params: None
) -> saved_model.SavedModel:
    """A model with random variables as if read from a file, with letters as classes.

    `change` may change the parameters.
    """
    variables = random_variables(FunctionalModel(arch), seed)
    change(variables.params)
    names = labels.named(*"abcde"[: arch.num_classes])
    info = saved_model.describe(arch, names, mean=mean, std=std, resize="", size=(1, 1))
    return saved_model.SavedModel(pathlib.Path(), info, lambda: variables)


def _value(rng, name, like):
    shape = like.shape
    if name in ("scale", "var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name in ("bias", "mean"):
        value = rng.normal(0, 0.3, shape)
    else:
        value = rng.normal(0, np.sqrt(2 / np.prod((*shape[:2], shape[-1]))), shape)
    return jnp.asarray(value, like.dtype)
