"""Atrous convolution: one function, two exact implementations, chosen per platform."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Method = Callable[..., Float[Array, "n ho wo cout"]]

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("method", default=None)


@contextlib.contextmanager
def using(method: str | None) -> Iterator[None]:
    """What is traced within takes this implementation everywhere: to compare, or to export.

    Args:
      method: a name in `METHODS`, or None: what is fastest on the platform.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    token = _forced.set(method)
    try:
        yield
    finally:
        _forced.reset(token)


def atrous_conv(
    x: Float[Array, "n h w cin"],
    kernel: Float[Array, "k kw cin_per_group cout"],
    *,
    stride: int = 1,
    rate: int = 1,
    method: str | None = None,
) -> Float[Array, "n ho wo cout"]:
    """Convolution whose taps lie `rate` pixels apart: y[i] = sum_k x[stride i + rate k] w[k].

    Zeros are padded symmetrically by `rate * (k - 1) / 2`, as torch does, so that the output has
    `ceil(h / stride)` rows whatever the rate. The groups are `x`'s channels over the kernel's.

    Args:
      x: features.
      kernel: of an odd side `k`, and `kw = k`.
      stride: pixels between the outputs' centres.
      rate: pixels between the taps; may be larger than the map.
      method: a name in `METHODS`, or None: what is fastest on the platform that this is compiled
        for (which need not be the one that compiles it).

    Raises:
      ValueError: the kernel's side is even, not the same in both directions, or its channels do
        not divide those of `x`; or `stride` or `rate` is below 1.

    Source: arXiv 1706.05587, equation 1.
    """
    _check(x.shape, kernel.shape, stride, rate)
    method = method or _forced.get()
    if method is not None:
        return METHODS[method](x, kernel, stride=stride, rate=rate)
    native = functools.partial(_native, stride=stride, rate=rate)
    if not _taps_win_on_cpu(x.shape, kernel.shape, stride, rate):
        return native(x, kernel)
    taps = functools.partial(_valid_taps, stride=stride, rate=rate)
    return lax.platform_dependent(x, kernel, cpu=taps, default=native)


def valid_share(size: int, kernel_size: int, *, stride: int = 1, rate: int = 1) -> float:
    """Share of the taps along one axis that fall on the map and not into its padding, 0..1."""
    spans = [_span(size, offset, stride) for offset in _offsets(kernel_size, rate)]
    return sum(stop - start for start, stop in spans) / (kernel_size * -(-size // stride))


def _native(x: Array, kernel: Array, *, stride: int, rate: int) -> Array:
    padding = rate * (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        rhs_dilation=(rate, rate),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // kernel.shape[2],
    )


def _valid_taps(x: Array, kernel: Array, *, stride: int, rate: int) -> Array:
    """One matrix product a tap, over the window where the tap falls on the map; nothing else."""
    _, height, width, _ = x.shape
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    centre = kernel.shape[0] // 2

    def product(row: int, column: int, rows: slice, columns: slice) -> Array:
        return jnp.einsum(
            "nhwc,cd->nhwd",
            x[:, rows, columns],
            kernel[row, column],
            preferred_element_type=accumulator,
        )

    # The centre's tap is valid everywhere, so it starts the sum; of a 1x1 kernel it is all.
    out = product(centre, centre, slice(None, None, stride), slice(None, None, stride))
    for row, dy in enumerate(_offsets(kernel.shape[0], rate)):
        for column, dx in enumerate(_offsets(kernel.shape[1], rate)):
            (top, bottom), (left, right) = _span(height, dy, stride), _span(width, dx, stride)
            if (dy, dx) == (0, 0) or top == bottom or left == right:
                continue
            rows = slice(top * stride + dy, (bottom - 1) * stride + dy + 1, stride)
            columns = slice(left * stride + dx, (right - 1) * stride + dx + 1, stride)
            out = out.at[:, top:bottom, left:right].add(product(row, column, rows, columns))
    return out.astype(x.dtype)


METHODS: dict[str, Method] = {"native": _native, "valid_taps": _valid_taps}


def _taps_win_on_cpu(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], stride: int, rate: int
) -> bool:
    """Whether XLA:CPU is faster with products than with its convolution.

    Measured on two cores, float32, forward and both gradients, native over valid taps:

    | kernel, channels, map, rate              | share of valid taps | ratio of times |
    |------------------------------------------|---------------------|----------------|
    | 1x1, 1024 -> 256, 33x33                  | 1                   | 1.7            |
    | 1x1, 2048 -> 512, 33x33                  | 1                   | 2.9            |
    | 1x1, 64 -> 256, 65x65                    | 1                   | 2.6            |
    | 3x3, 512 -> 512, 33x33, rate 4           | 0.84                | 0.8            |
    | 3x3, 2048 -> 256, 33x33, rate 6          | 0.77                | 1.2 (forward 0.8) |
    | 3x3, 512 -> 512, 33x33, rate 8           | 0.70                | 1.1            |
    | 3x3, 2048 -> 256, 33x33, rate 12         | 0.57                | 1.5            |
    | 3x3, 2048 -> 256, 33x33, rate 18         | 0.40                | 2.4            |
    | 3x3, 64 -> 64, 33x33, rate 16            | 0.46                | 0.7            |

    So 1x1 kernels always gain, larger ones where much of the work is dead and each product is
    large enough to be worth a call.
    """
    _, height, width, in_channels = x_shape
    kernel_size, _, kernel_channels, _ = kernel_shape
    if kernel_channels != in_channels:  # groups
        return False
    if kernel_size == 1:
        return True
    share = valid_share(height, kernel_size, stride=stride, rate=rate)
    share *= valid_share(width, kernel_size, stride=stride, rate=rate)
    return share <= 0.71 and in_channels >= 256


def _offsets(kernel_size: int, rate: int) -> list[int]:
    """Of each tap from the centre's, in pixels."""
    return [rate * (index - kernel_size // 2) for index in range(kernel_size)]


def _span(size: int, offset: int, stride: int) -> tuple[int, int]:
    """First output whose tap at `offset` falls on a map of `size`, and one past the last."""
    start = max(0, -(offset // stride))
    stop = min((size - 1 - offset) // stride + 1, -(-size // stride))
    return (start, stop) if start < stop else (0, 0)


def _check(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], stride: int, rate: int) -> None:
    side, other_side, kernel_channels, _ = kernel_shape
    if side != other_side or side % 2 == 0:
        raise ValueError(f"kernel must have one odd side, got {side}x{other_side}")
    if x_shape[3] % kernel_channels:
        raise ValueError(
            f"kernel's {kernel_channels} input channels must divide the {x_shape[3]} of x"
        )
    if stride < 1 or rate < 1:
        raise ValueError(f"stride and rate must be 1 or more, got {stride} and {rate}")
