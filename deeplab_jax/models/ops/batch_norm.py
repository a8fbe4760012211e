"""Batch norm by the statistics of the batch, with an explicit gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_by_batch(
    x: Float[Array, "n h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float,
) -> tuple[Float[Array, "n h w c"], Float[Array, " c"], Float[Array, " c"]]:
    """Normalizes a map; returns also the mean and variance of the batch, without gradients.

    The gradient is that of Ioffe & Szegedy 2015, section 3. It reads the map twice: for both sums
    and for the result. The gradient that JAX derives reads it three times and saves a copy.
    """
    values = x.astype(scale.dtype)
    mean = jnp.mean(values, (0, 1, 2))
    # Both statistics in one pass over the map and one all-reduce between devices. The maximum
    # guards against a difference that rounding made negative.
    var = jnp.maximum(jnp.mean(jnp.square(values), (0, 1, 2)) - jnp.square(mean), 0)
    y = (values - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    return y.astype(x.dtype), mean, var


def _forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    y, mean, var = normalize_by_batch(x, scale, bias, epsilon)
    return (y, mean, var), (x, scale, mean, var)


def _backward(
    epsilon: float, residuals: tuple[Array, ...], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, scale, mean, var = residuals
    dy = cotangents[0].astype(scale.dtype)
    centred = x.astype(scale.dtype) - mean
    inverse_deviation = lax.rsqrt(var + epsilon)
    dbias = jnp.sum(dy, (0, 1, 2))
    dscale = jnp.sum(dy * centred, (0, 1, 2)) * inverse_deviation
    count = float(x.size // x.shape[3])  # an integer might not fit in 32 bits
    dx = dy - dbias / count - centred * (inverse_deviation * dscale / count)
    return (dx * (scale * inverse_deviation)).astype(x.dtype), dscale, dbias


normalize_by_batch.defvjp(_forward, _backward)
