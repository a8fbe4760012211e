"""Atrous convolution, by the fastest of several exact methods for the target platform."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float

# Pixels: an int, or a symbolic dimension of jax.export in a program for any size.
Size = Any
Method = Callable[..., Float[Array, "n ho wo cout"]]


def atrous_conv(
    x: Float[Array, "n h w cin"],
    kernel: Float[Array, "k kw cin_per_group cout"],
    *,
    strides: int = 1,
    kernel_dilation: int = 1,
    method: str | None = None,
) -> Float[Array, "n ho wo cout"]:
    """Convolves with taps `rate = kernel_dilation` pixels apart: y[i] = sum_k x[i + rate k] w[k].

    Pads `rate * (k - 1) / 2` zeros on every side, as torch does, so that the output has
    `ceil(h / strides)` rows at any rate. The number of groups is the number of channels of `x`
    divided by that of the kernel.

    Args:
      x: features.
      kernel: weights, with an odd side `k` and `kw = k`.
      strides: pixels between the centres of neighbouring outputs.
      kernel_dilation: pixels between the taps; may be larger than the map.
      method: a name in `METHODS`. Defaults to the fastest one for the target platform.

    Raises:
      ValueError: the kernel is not square or its side is even; its input channels do not divide
        the channels of `x`; `strides` or `kernel_dilation` is below 1; or the method is unknown.

    Source: arXiv 1706.05587, equation 1.
    """
    side, width, kernel_channels, _ = kernel.shape
    if side != width or side % 2 == 0 or x.shape[3] % kernel_channels:
        raise ValueError(
            "kernel must have one odd side and input channels that divide those of x, "
            f"{x.shape[3]}; got {list(kernel.shape)}"
        )
    if strides < 1 or kernel_dilation < 1:
        raise ValueError(
            f"strides and kernel_dilation must be 1 or more, got {strides} and {kernel_dilation}"
        )
    options: dict[str, Any] = {"strides": strides, "kernel_dilation": kernel_dilation}
    if method is not None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        return METHODS[method](x, kernel, **options)
    any_size = any(map(export.is_symbolic_dim, x.shape[1:3]))
    by_platform: dict[str, Method] = {}
    if kernel.shape[:3] == (1, 1, x.shape[3]):
        # One matrix product, on CPU 1.7 to 2.9 times as fast with gradients. For a strided map of
        # any size JAX cannot prove that the output sizes agree.
        if strides == 1 or not any_size:
            by_platform["cpu"] = _valid_taps
        if strides == 1 and not any_size and x.shape[1] * x.shape[2] > 1:
            by_platform["cuda"] = _pointwise_on_cuda
    elif strides == 1 and kernel_dilation > 1 and not any_size:
        if _taps_win_on_cpu(x.shape, kernel.shape, kernel_dilation):
            by_platform["cpu"] = _on_cpu
        by_platform["cuda"] = _on_cuda
    if not by_platform:
        return _native(x, kernel, **options)
    by_platform["default"] = _native
    bound = {name: functools.partial(conv, **options) for name, conv in by_platform.items()}
    return lax.platform_dependent(x, kernel, **bound)


def unless_differentiated(
    inference: Callable[..., Array], training: Callable[..., Array]
) -> Callable[..., Array]:
    """Returns a function that runs `inference`, or when it is differentiated `training`.

    Both must have the same result up to rounding.
    """

    @jax.custom_vjp
    def function(*arrays: Array) -> Array:
        return inference(*arrays)

    function.defvjp(
        lambda *arrays: jax.vjp(training, *arrays), lambda gradient, cotangent: gradient(cotangent)
    )
    return function


def valid_fraction(
    sizes: Sequence[int], kernel_size: int, *, strides: int = 1, kernel_dilation: int = 1
) -> float:
    """Returns the fraction of a kernel's taps that read the map and not its padding, 0..1.

    Args:
      sizes: height and width of the map, or one of them.
      kernel_size: side of the kernel.
      strides, kernel_dilation: as in `atrous_conv`.
    """
    offsets = _offsets(kernel_size, kernel_dilation)
    fraction = 1.0
    for size in sizes:
        ranges = [_valid_outputs(size, offset, strides) for offset in offsets]
        fraction *= sum(b - a for a, b in ranges) / (kernel_size * -(-size // strides))
    return fraction


def _native(x: Array, kernel: Array, *, strides: int, kernel_dilation: int) -> Array:
    padding = kernel_dilation * (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=[(padding, padding)] * 2,
        rhs_dilation=(kernel_dilation, kernel_dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // kernel.shape[2],
    )


def _pointwise_on_cuda(x: Array, kernel: Array, **_: int) -> Array:
    """A 1x1 convolution as a product of matrices in the dtype of the map.

    XLA:GPU compiles and times 70 of cuDNN's candidates for each convolution, and few for a product.
    cuDNN's gradient of a kernel has another order of axes than the kernel: XLA's kernel that
    transposes it and updates the parameter takes 22 us for 256 -> 1024 channels on an H200.
    """
    return _product(x, kernel[0, 0], x.dtype)


def _valid_taps(x: Array, kernel: Array, *, strides: int, kernel_dilation: int) -> Array:
    """Sums one matrix product per tap, over the window where the tap reads the map."""
    _, height, width, _ = x.shape
    centre = kernel.shape[0] // 2
    # The centre tap is valid everywhere, so its product starts the sum.
    out = _product(x[:, ::strides, ::strides], kernel[centre, centre])
    taps = enumerate(_offsets(kernel.shape[0], kernel_dilation))
    for (row, dy), (column, dx) in itertools.product(taps, repeat=2):
        if row == column == centre:
            continue
        top, bottom = _valid_outputs(height, dy, strides)
        left, right = _valid_outputs(width, dx, strides)
        if top == bottom or left == right:
            continue
        rows = slice(top * strides + dy, (bottom - 1) * strides + dy + 1, strides)
        columns = slice(left * strides + dx, (right - 1) * strides + dx + 1, strides)
        product = _product(x[:, rows, columns], kernel[row, column])
        out = out.at[:, top:bottom, left:right].add(product)
    return out.astype(x.dtype)


def _valid_blocks(x: Array, kernel: Array, *, strides: int, kernel_dilation: int) -> Array:
    """Computes the products of `_valid_taps` by blocks of the map, copying each pixel once.

    The windows of `_valid_taps` overlap. Their edges cut the map into blocks that do not. Each
    block is multiplied by the taps that are valid on all of it, and each product is added to the
    outputs that read the block through that tap.
    """
    _, height, width, _ = x.shape
    offsets = _offsets(kernel.shape[0], kernel_dilation)
    centre = kernel.shape[0] // 2
    out = _product(x, kernel[centre, centre])
    for (top, bottom), rows in _blocks(height, offsets):
        for (left, right), columns in _blocks(width, offsets):
            block = x[:, top:bottom, left:right]
            for row, column in itertools.product(rows, columns):
                if row == column == centre:
                    continue
                dy, dx = offsets[row], offsets[column]
                outputs = (slice(top - dy, bottom - dy), slice(left - dx, right - dx))
                out = out.at[:, *outputs].add(_product(block, kernel[row, column]))
    return out[:, ::strides, ::strides].astype(x.dtype)


def _product(x: Array, weights: Array, dtype: Any = None) -> Array:
    """Multiplies `[n h w cin]` by `[cin cout]`, as a product of two matrices.

    The result has this dtype; None: float32 or wider. Without the reshape, XLA:CPU would copy the
    cotangent to another memory layout for the gradient of the weights.
    """
    n, height, width, channels = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32) if dtype is None else dtype
    pixels = x.reshape(n * height * width, channels)
    product = jnp.dot(pixels, weights, preferred_element_type=dtype)
    return product.reshape(n, height, width, weights.shape[1])


def _phases(x: Array, kernel: Array, *, strides: int, kernel_dilation: int) -> Array:
    """Space to batch: convolves every rate-th row and column as a map of its own, at rate 1.

    Pads the map with zeros to a multiple of the rate, where taps would read zeros anyway. Along an
    axis no longer than the rate only the centre tap reads the map.
    """
    n, height, width, channels = x.shape
    rows, columns = (kernel_dilation if kernel_dilation < size else 1 for size in (height, width))
    centre = kernel.shape[0] // 2
    if rows == 1 < kernel_dilation:
        kernel = kernel[centre : centre + 1]
    if columns == 1 < kernel_dilation:
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
    return y.reshape(n, tall * rows, wide * columns, -1)[:, :height:strides, :width:strides]


METHODS: dict[str, Method] = {
    "native": _native,
    "valid_taps": _valid_taps,
    "valid_blocks": _valid_blocks,
    "phases": _phases,
}


def _on_cuda(x: Array, kernel: Array, *, strides: int = 1, kernel_dilation: int) -> Array:
    """Convolves by cuDNN, up to rate 6 natively and above by phases; the gradient is by phases.

    Measured on one H100, bfloat16, milliseconds of native / phases (cuDNN through PyTorch).
    `benchmarks/atrous_methods.py` repeats such measurements:

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
    native, phases = (
        functools.partial(method, strides=strides, kernel_dilation=kernel_dilation)
        for method in (_native, _phases)
    )
    forward = phases if kernel_dilation > 6 else native

    @jax.custom_vjp
    def convolve(*inputs: Array) -> Array:
        return forward(*inputs)

    convolve.defvjp(
        lambda *inputs: (forward(*inputs), inputs),
        lambda inputs, cotangent: jax.vjp(phases, *inputs)[1](cotangent),
    )
    return convolve(x, kernel)


def _on_cpu(x: Array, kernel: Array, *, strides: int = 1, kernel_dilation: int) -> Array:
    """Convolves by blocks of valid taps or natively, and for gradients by whole valid windows.

    `inference.compilation.jit_inference` replaces these convolutions by oneDNN's where XLA has it.

    Measured on two cores, float32, milliseconds of native / taps / blocks (oneDNN through PyTorch).
    `benchmarks/atrous_methods.py` repeats such measurements, gradients apart from the forward pass:

    | kernel, channels, maps, rate         | valid | forward              | with both gradients    |
    |--------------------------------------|-------|----------------------|------------------------|
    | 3x3, 256 -> 256, 2x33x33, rate 2     | 0.92  | 14 / 11 / 8 (6)      | 29 / 35 / 42 (24)      |
    | 3x3, 512 -> 512, 2x33x33, rate 2     | 0.92  | 35 / 36 / 36 (26)    | 99 / 98 / 122 (78)     |
    | 3x3, 512 -> 512, 4x33x33, rate 4     | 0.84  | 60 / 66 / 68 (47)    | 211 / 183 / 209 (156)  |
    | 3x3, 512 -> 512, 1x65x65, rate 8     | 0.84  | 58 / 62 / 67 (42)    | 231 / 177 / 212 (158)  |
    | 3x3, 128 -> 128, 1x65x65, rate 12    | 0.77  | 7 / 7 / 3 (3)        | 18 / 13 / 13 (8)       |
    | 3x3, 256 -> 256, 1x65x65, rate 12    | 0.77  | 20 / 21 / 15 (9)     | 61 / 54 / 62 (37)      |
    | 3x3, 2048 -> 256, 1x65x65, rate 12   | 0.77  | 203 / 153 / 118 (91) | 595 / 402 / 470 (394)  |
    | 3x3, 2048 -> 256, 2x33x33, rate 12   | 0.57  | 122 / 52 / 44 (33)   | 327 / 144 / 205 (131)  |
    | 3x3, 2048 -> 256, 1x65x65, rate 24   | 0.57  | 287 / 105 / 79 (67)  | 742 / 301 / 364 (304)  |
    | 3x3, 2048 -> 256, 1x65x65, rate 36   | 0.40  | 396 / 68 / 64 (51)   | 872 / 209 / 224 (397)  |
    """
    valid = valid_fraction(x.shape[1:3], kernel.shape[0], kernel_dilation=kernel_dilation)
    inference, training = (
        functools.partial(method, strides=strides, kernel_dilation=kernel_dilation)
        for method in (_valid_blocks if valid <= 0.8 else _native, _valid_taps)
    )
    return unless_differentiated(inference, training)(x, kernel)


def _taps_win_on_cpu(
    x_shape: tuple[Size, ...], kernel_shape: tuple[int, ...], kernel_dilation: int
) -> bool:
    """Returns whether enough taps read padding for `_on_cpu` to gain time, by its table."""
    side, _, kernel_channels, _ = kernel_shape
    return (
        64 <= kernel_channels == x_shape[3]
        and valid_fraction(x_shape[1:3], side, kernel_dilation=kernel_dilation) <= 0.85
    )


def _offsets(kernel_size: int, kernel_dilation: int) -> list[int]:
    """Returns the offset of each tap from the centre tap, in pixels."""
    return [kernel_dilation * (index - kernel_size // 2) for index in range(kernel_size)]


def _valid_outputs(size: int, offset: int, strides: int) -> tuple[int, int]:
    """Returns start and stop of the outputs whose tap at `offset` reads a map of `size` pixels."""
    start = max(0, -(offset // strides))
    stop = min((size - 1 - offset) // strides + 1, -(-size // strides))
    return (start, stop) if start < stop else (0, 0)


def _blocks(size: int, offsets: list[int]) -> list[tuple[tuple[int, int], list[int]]]:
    """Returns start and stop of each block along an axis, and the taps that are valid on all of it.

    The tap at `offset` reads input pixel s for output pixel s - offset, if the map has that.
    """
    edges = (min(max(edge, 0), size) for offset in offsets for edge in (offset, size + offset))
    return [
        ((start, stop), [k for k, at in enumerate(offsets) if at <= start and stop <= size + at])
        for start, stop in itertools.pairwise(sorted({0, size, *edges}))
    ]
