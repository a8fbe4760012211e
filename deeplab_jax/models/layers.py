"""Layers: convolution, batch norm, dropout, max pooling."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from deeplab_jax.models.atrous import atrous_conv
from deeplab_jax.models.operations import operation
from deeplab_jax.models.padding import fill_padding

Initializer = Callable[..., Array]

# He et al. 2015, as torchvision initialises its ResNets: variance 2 / (k * k * out_channels).
HE_FAN_OUT: Initializer = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# Small, so that a new head starts from nearly equal probabilities: a loss of log(num_classes).
SMALL_NORMAL: Initializer = nnx.initializers.normal(0.01)


_norms_folded: contextvars.ContextVar[bool] = contextvars.ContextVar("folded", default=False)


@contextlib.contextmanager
def folded_norms(folded: bool) -> Iterator[None]:
    """Whether what is traced within has batch norm in its convolutions: see `normalized`."""
    token = _norms_folded.set(folded)
    try:
        yield
    finally:
        _norms_folded.reset(token)


def full_precision(dtype: Any) -> Any:
    """dtype of parameters and statistics beside a computation's: float32, or float64 for it."""
    return jnp.promote_types(dtype, jnp.float32)


class Conv(nnx.Module):
    """Convolution, possibly strided, atrous or grouped; see `atrous_conv`.

    Attributes:
      kernel: `[k, k, in_channels / groups, out_channels]`.
      bias: `[out_channels]`, or None.
      stride: pixels.
      rate: pixels between the taps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        rate: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        kernel_init: Initializer = HE_FAN_OUT,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        """`rngs.params` draws the kernel; None: it is 0, and shapes are traced far faster."""
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        param_dtype = full_precision(dtype)
        if rngs is None:
            self.kernel = nnx.Param(jnp.zeros(shape, param_dtype))
        else:
            self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_channels, param_dtype)) if use_bias else None
        self.stride = stride
        self.rate = rate
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: Float[Array, "n h w cin"], shift: Float[Array, " cout"] | None = None
    ) -> Float[Array, "n ho wo cout"]:
        """Convolves; `shift`, of a folded batch norm, is its bias."""
        kernel = self.kernel[...]
        if kernel.shape[0] > 1:
            x = fill_padding(x)
        y = self.convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        bias = shift if self.bias is None else self.bias[...]
        return y if bias is None else y + bias.astype(self.dtype)

    def convolve(self, x: Array, kernel: Array) -> Array:
        return atrous_conv(x, kernel, stride=self.stride, rate=self.rate)


class BatchNorm(nnx.Module):
    """Batch norm over images and pixels: (x - mean) / sqrt(var + epsilon) * scale + bias.

    Statistics, running statistics and the arithmetic are float32 whatever the computation's dtype
    (float64 for float64). Running statistics move as

        running = momentum * running + (1 - momentum) * batch's

    so torch's momentum 0.1 is 0.9 here. The running variance is the biased one, the same as
    normalises the batch; torch's is n / (n - 1) times that. Under `jit` with the batch divided
    over devices the statistics are those of the whole batch. One value a channel, as image
    pooling gives for one image, has variance 0 and is normalised to `bias`.

    Attributes:
      scale, bias: parameters `[channels]`.
      mean, var: running statistics `[channels]`.
    """

    def __init__(
        self, channels: int, *, momentum: float, epsilon: float, dtype: Any = jnp.float32
    ) -> None:
        statistics = full_precision(dtype)
        self.scale = nnx.Param(jnp.ones(channels, statistics))
        self.bias = nnx.Param(jnp.zeros(channels, statistics))
        self.mean = nnx.BatchStat(jnp.zeros(channels, statistics))
        self.var = nnx.BatchStat(jnp.ones(channels, statistics))
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "n h w c"], *, update_bn: bool = False
    ) -> Float[Array, "n h w c"]:
        """Normalises by the running statistics, or with `update_bn` by the batch's, moving them."""
        if update_bn:
            y, mean, var = _normalize_by_batch(x, self.scale[...], self.bias[...], self.epsilon)
            self._move(self.mean, mean)
            self._move(self.var, var)
            return y
        # Not x * scale + shift: for a large mean the shift would cancel it with fewer digits left.
        scale, bias = self.scale[...], self.bias[...]
        values = x.astype(full_precision(x.dtype)) - self.mean[...]
        return (values * (scale * lax.rsqrt(self.var[...] + self.epsilon)) + bias).astype(x.dtype)

    def _move(self, running: nnx.BatchStat, batch: Array) -> None:
        moved = self.momentum * running[...] + (1 - self.momentum) * lax.stop_gradient(batch)
        running[...] = moved


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize_by_batch(
    x: Float[Array, "n h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float,
) -> tuple[Float[Array, "n h w c"], Float[Array, " c"], Float[Array, " c"]]:
    """Normalised map, mean and variance of the batch; the last two are taken as constants.

    The gradient is written out (Ioffe & Szegedy 2015, section 3) so that it reads the map twice,
    once for both sums and once for the result, where the derived one reads it three times and
    keeps a copy.
    """
    values = x.astype(scale.dtype)
    mean = jnp.mean(values, (0, 1, 2))
    # One pass over the map, and one exchange between devices, for both statistics.
    # Rounding may leave a tiny negative difference.
    var = jnp.maximum(jnp.mean(jnp.square(values), (0, 1, 2)) - jnp.square(mean), 0)
    y = (values - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    return y.astype(x.dtype), mean, var


def _normalize_by_batch_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    y, mean, var = _normalize_by_batch(x, scale, bias, epsilon)
    return (y, mean, var), (x, scale, mean, var)


def _normalize_by_batch_backward(
    epsilon: float, kept: tuple[Array, ...], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, scale, mean, var = kept
    dy = cotangents[0].astype(scale.dtype)
    centred = x.astype(scale.dtype) - mean
    deviation = lax.rsqrt(var + epsilon)  # its inverse
    dbias = jnp.sum(dy, (0, 1, 2))
    dscale = jnp.sum(dy * centred, (0, 1, 2)) * deviation
    count = float(x.size // x.shape[3])  # as an integer it may not fit 32 bits
    dx = dy - dbias / count - centred * (deviation * dscale / count)
    return (dx * (scale * deviation)).astype(x.dtype), dscale, dbias


_normalize_by_batch.defvjp(_normalize_by_batch_forward, _normalize_by_batch_backward)


def normalized(
    conv: Conv, norm: BatchNorm, x: Float[Array, "n h w cin"], *, update_bn: bool
) -> Float[Array, "n ho wo cout"]:
    """`norm(conv(x))`; or, where the kernel has `norm`'s scale in it, `conv(x)` plus its shift.

    The convolution has no bias of its own. Who calls this names the pair in a method `conv_norms`,
    by which `FunctionalModel.fold` finds it.
    """
    if _norms_folded.get():
        return conv(x, norm.bias[...])
    return norm(conv(x), update_bn=update_bn)


class ConvNorm(nnx.List):
    """A convolution `[0]` and its batch norm `[1]`."""

    def __init__(self, conv: Conv, norm: BatchNorm) -> None:
        super().__init__([conv, norm])

    def conv_norms(self) -> list[tuple[Conv, BatchNorm]]:
        return [(self[0], self[1])]

    def __call__(self, x: Float[Array, "n h w cin"], *, update_bn: bool = False) -> Array:
        conv, norm = self
        return normalized(conv, norm, x, update_bn=update_bn)


@dataclasses.dataclass(frozen=True)
class LayerMaker:
    """Makes layers that share what an architecture has in common."""

    dtype: Any
    bn_momentum: float
    bn_epsilon: float
    rngs: nnx.Rngs | None

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, **options: Any
    ) -> Conv:
        options = {"dtype": self.dtype, **options}
        return Conv(in_channels, out_channels, kernel_size, rngs=self.rngs, **options)

    def norm(self, channels: int) -> BatchNorm:
        return BatchNorm(
            channels, momentum=self.bn_momentum, epsilon=self.bn_epsilon, dtype=self.dtype
        )

    def conv_norm(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, **options: Any
    ) -> ConvNorm:
        conv = self.conv(in_channels, out_channels, kernel_size, **options)
        return ConvNorm(conv, self.norm(out_channels))

    def logits(self, in_channels: int, num_classes: int) -> Conv:
        """The last convolution of a head, computed in full precision."""
        return self.conv(
            in_channels,
            num_classes,
            use_bias=True,
            kernel_init=SMALL_NORMAL,
            dtype=full_precision(self.dtype),
        )


def scaled_channels(channels: int, width: float) -> int:
    """Number of channels under a width multiplier, at least 8."""
    return max(8, round(channels * width))


def dropout(
    x: Float[Array, "n h w c"], probability: float, key: jax.Array | None
) -> Float[Array, "n h w c"]:
    """Zeroes each value with `probability` and scales the rest to keep the mean; no key: as is."""
    if key is None or probability == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - probability, x.shape)
    return jnp.where(kept, x / (1 - probability), jnp.zeros_like(x))


@operation
def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo c"]:
    """3x3 maximum with stride 2 and padding 1, to `ceil(h / 2)` rows.

    As maxima along one axis, then the other: on CPU 4 times faster forward and 17 times with its
    gradient than `lax.reduce_window`, whose gradient scatters. The padding is the lowest finite
    value, which unlike -inf turns into no NaN in later arithmetic.
    """
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    lowest = float(jnp.finfo(x.dtype).min)
    padded = jnp.pad(fill_padding(x, lowest), padding, constant_values=lowest)
    rows = _max_of_three(padded, axis=1)
    # Windows beyond an image, all of the lowest value, would overflow in the next layer.
    return fill_padding(_max_of_three(rows, axis=2))


def _max_of_three(x: Array, axis: int) -> Array:
    """Maximum of each second run of three along an axis."""
    last = x.shape[axis] - 3
    windows = [lax.slice_in_dim(x, i, i + last + 1, stride=2, axis=axis) for i in range(3)]
    return functools.reduce(jnp.maximum, windows)


def recompute(
    unit: nnx.Module, x: Float[Array, "n h w c"], *, update_bn: bool, method: str = "__call__"
) -> Any:
    """`unit(x, update_bn=update_bn)`, its inner values computed again in the backward pass.

    Or another method of the unit, of the same arguments, that gives arrays. Running statistics
    leave the recomputed function as results: a variable set inside it would leak a traced value.
    """
    split: Any = nnx.split(unit, nnx.Param, nnx.BatchStat)
    graph, params, batch_stats = split

    @jax.checkpoint
    def run(params: nnx.State, batch_stats: nnx.State, x: Array) -> tuple[Any, nnx.State]:
        merged: Any = nnx.merge(graph, params, batch_stats)
        y = getattr(merged, method)(x, update_bn=update_bn)
        return y, nnx.state(merged, nnx.BatchStat)

    y, moved = run(params, batch_stats, x)
    nnx.update(unit, moved)
    return y
