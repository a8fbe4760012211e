"""Batch norm by the statistics of the batch, with an explicit gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Map = Float[Array, "n h w c"]
Channels = Float[Array, " c"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_by_batch(
    x: Map, scale: Channels, bias: Channels, epsilon: float
) -> tuple[Map, Channels, Channels]:
    """Normalizes a map; returns also the mean and variance of the batch, without gradients.

    The gradient is that of Ioffe & Szegedy 2015, section 3. It reads the map twice: for both sums
    and for the result. The gradient that JAX derives reads it three times and saves a copy.
    """
    values = x.astype(scale.dtype)
    count = float(x.size // x.shape[3])  # an integer might not fit in 32 bits
    # Both statistics in one pass over the map and one all-reduce between devices. The maximum
    # guards against a difference that rounding made negative.
    total, total_of_squares = _two_sums(values, jnp.square(values))
    mean = total / count
    var = jnp.maximum(total_of_squares / count - jnp.square(mean), 0)
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
    dbias, dscale = _two_sums(dy, dy * centred)
    dscale *= inverse_deviation
    count = float(x.size // x.shape[3])
    dx = dy - dbias / count - centred * (inverse_deviation * dscale / count)
    return (dx * (scale * inverse_deviation)).astype(x.dtype), dscale, dbias


def _two_sums(first: Map, second: Map) -> tuple[Channels, Channels]:
    """Sums two maps over images and pixels.

    On GPU in one reduction: XLA:GPU splits each in two kernels, but two reductions that read the
    same map in three. Of 2 800 kernels of ResNet-101's step this saves 211, and 0.6 of 37.5 ms.
    """
    return lax.platform_dependent(first, second, cuda=_sum_together, default=_sum_apart)


def _sum_apart(first: Map, second: Map) -> tuple[Channels, Channels]:
    return jnp.sum(first, (0, 1, 2)), jnp.sum(second, (0, 1, 2))


def _sum_together(first: Map, second: Map) -> tuple[Channels, Channels]:
    def add(sums: Any, terms: Any) -> Any:
        return tuple(map(lax.add, sums, terms))

    zero = jnp.zeros((), first.dtype)
    return lax.reduce((first, second), (zero, zero), add, (0, 1, 2))


normalize_by_batch.defvjp(_forward, _backward)
