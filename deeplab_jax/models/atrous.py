"""Atrous convolution: one function, several exact implementations, chosen per platform."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Collection, Iterator

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float

from deeplab_jax.models.operations import Size

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


def forced(methods: Collection[str]) -> str | None:
    """The implementation that `using` asks for, where it is one of these."""
    method = _forced.get()
    return method if method in methods else None


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
    method = method or forced(METHODS)
    if method is not None:
        return METHODS[method](x, kernel, stride=stride, rate=rate)
    native = functools.partial(_native, stride=stride, rate=rate)
    chosen = {}
    if _taps_win_on_cpu(x.shape, kernel.shape, stride, rate):
        chosen["cpu"] = functools.partial(_valid_taps, stride=stride, rate=rate)
    if stride == 1 and rate > 1 and not _any_size(x.shape):
        chosen["cuda"] = functools.partial(_on_cuda, rate=rate)
    if not chosen:
        return native(x, kernel)
    return lax.platform_dependent(x, kernel, **chosen, default=native)


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
            if (dy, dx) == (0, 0):
                continue
            (top, bottom), (left, right) = _span(height, dy, stride), _span(width, dx, stride)
            if top == bottom or left == right:
                continue
            rows = slice(top * stride + dy, (bottom - 1) * stride + dy + 1, stride)
            columns = slice(left * stride + dx, (right - 1) * stride + dx + 1, stride)
            out = out.at[:, top:bottom, left:right].add(product(row, column, rows, columns))
    return out.astype(x.dtype)


def _phases(x: Array, kernel: Array, *, stride: int, rate: int) -> Array:
    """Space to batch: rows and columns `rate` apart are maps of their own, convolved at rate 1.

    The map is padded with zeros to a multiple of the rate, where taps would read zeros anyway.
    Along an axis no longer than the rate the centre's tap alone falls on the map.
    """
    n, height, width, channels = x.shape
    rows, columns = (rate if rate < size else 1 for size in (height, width))
    centre = kernel.shape[0] // 2
    if rows == 1 < rate:
        kernel = kernel[centre : centre + 1]
    if columns == 1 < rate:
        kernel = kernel[:, centre : centre + 1]
    tall, wide = -(-height // rows), -(-width // columns)
    x = jnp.pad(x, ((0, 0), (0, tall * rows - height), (0, wide * columns - width), (0, 0)))
    x = x.reshape(n, tall, rows, wide, columns, channels).transpose(0, 2, 4, 1, 3, 5)
    y = lax.conv_general_dilated(
        x.reshape(n * rows * columns, tall, wide, channels),
        kernel,
        window_strides=(1, 1),
        padding=[(side // 2, side // 2) for side in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels // kernel.shape[2],
    )
    y = y.reshape(n, rows, columns, tall, wide, -1).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(n, tall * rows, wide * columns, -1)[:, :height:stride, :width:stride]


METHODS: dict[str, Method] = {"native": _native, "valid_taps": _valid_taps, "phases": _phases}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _on_cuda(x: Array, kernel: Array, rate: int) -> Array:
    """cuDNN's convolution of the whole map, or of its phases, and always the phases' gradient.

    Measured on one H100, bfloat16, milliseconds of native / phases (cuDNN through PyTorch);
    `benchmarks/atrous_methods.py` measures such rows again:

    | kernel, channels, maps, rate           | forward             | both gradients      |
    |----------------------------------------|---------------------|---------------------|
    | 3x3, 512 -> 512, 16x33x33, rate 2      | 0.19 / 0.17 (0.13)  | 0.92 / 0.34 (0.26)  |
    | 3x3, 2048 -> 256, 16x33x33, rate 6     | 0.33 / 0.35 (0.29)  | 1.48 / 0.66 (0.46)  |
    | 3x3, 2048 -> 256, 16x33x33, rate 12    | 0.51 / 0.34 (0.47)  | 1.60 / 0.80 (0.84)  |
    | 3x3, 2048 -> 256, 16x33x33, rate 18    | 0.51 / 0.23 (0.48)  | 1.61 / 0.73 (0.85)  |
    | 3x3, 256 -> 256, 32x65x65, rate 2      | 0.24 / 0.34 (0.22)  | 1.56 / 0.61 (0.44)  |
    | 3x3, 512 -> 512, 32x65x65, rate 4      | 0.84 / 1.08 (0.87)  | 3.91 / 2.10 (1.80)  |
    | 3x3, 2048 -> 256, 32x65x65, rate 12    | 2.68 / 2.35 (2.84)  | 7.74 / 4.71 (6.39)  |
    | 3x3, 2048 -> 256, 32x65x65, rate 24    | 2.69 / 2.33 (2.75)  | 7.54 / 5.11 (6.21)  |
    | 3x3, 2048 -> 256, 32x65x65, rate 36    | 2.59 / 1.44 (2.68)  | 7.51 / 4.72 (6.08)  |
    """
    method = _phases if rate > 6 else _native
    return method(x, kernel, stride=1, rate=rate)


def _on_cuda_forward(x: Array, kernel: Array, rate: int) -> tuple[Array, tuple[Array, Array]]:
    return _on_cuda(x, kernel, rate), (x, kernel)


def _on_cuda_backward(
    rate: int, inputs: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    _, gradient = jax.vjp(functools.partial(_phases, stride=1, rate=rate), *inputs)
    return gradient(cotangent)


_on_cuda.defvjp(_on_cuda_forward, _on_cuda_backward)


def _taps_win_on_cpu(
    x_shape: tuple[Size, ...], kernel_shape: tuple[int, ...], stride: int, rate: int
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
    if _any_size(x_shape):  # the strided product's size is the same, but JAX cannot tell
        return kernel_size == stride == 1
    if kernel_size == 1:
        return True
    share = valid_share(height, kernel_size, stride=stride, rate=rate)
    share *= valid_share(width, kernel_size, stride=stride, rate=rate)
    return share <= 0.71 and in_channels >= 256


def _any_size(x_shape: tuple[Size, ...]) -> bool:
    """Whether a map's height or width is left open, as in an exported program."""
    return any(map(export.is_symbolic_dim, x_shape[1:3]))


def _offsets(kernel_size: int, rate: int) -> list[int]:
    """Of each tap from the centre's, in pixels."""
    return [rate * (index - kernel_size // 2) for index in range(kernel_size)]


def _span(size: int, offset: int, stride: int) -> tuple[int, int]:
    """First output whose tap at `offset` falls on a map of `size`, and one past the last."""
    start = max(0, -(offset // stride))
    stop = min((size - 1 - offset) // stride + 1, -(-size // stride))
    return (start, stop) if start < stop else (0, 0)


def _check(
    x_shape: tuple[Size, ...], kernel_shape: tuple[int, ...], stride: int, rate: int
) -> None:
    side, other_side, kernel_channels, _ = kernel_shape
    if side != other_side or side % 2 == 0:
        raise ValueError(f"kernel must have one odd side, got {side}x{other_side}")
    if x_shape[3] % kernel_channels:
        raise ValueError(
            f"kernel's {kernel_channels} input channels must divide the {x_shape[3]} of x"
        )
    if stride < 1 or rate < 1:
        raise ValueError(f"stride and rate must be 1 or more, got {stride} and {rate}")
