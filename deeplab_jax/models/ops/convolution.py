"""Implementations of convolutions and residual sums, and a function that swaps them in a model.

Each convolution here has the signature of `lax.conv_general_dilated` and serves as the attribute
`conv_general_dilated` of an `nnx.Conv`. All give the same result up to rounding, and all set the
padding of images to zero first (see `models.ops.masking`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import export, lax
from jax.nn import relu
from jaxtyping import Array, Float

from deeplab_jax.models.ops.atrous_conv import atrous_conv, unless_differentiated
from deeplab_jax.models.ops.depthwise_conv import depthwise_conv
from deeplab_jax.models.ops.masking import mask_padding, valid_sizes
from deeplab_jax.models.ops.same_padding import same_conv

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def fastest_conv(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """Convolves by `depthwise_conv` or `atrous_conv`, which choose by platform, kernel and map.

    They compute 2-D convolutions of NHWC maps with an odd square kernel and symmetric padding that
    keeps the size. XLA computes all others. With SAME padding at stride 2, `depthwise_conv` is
    called by `same_conv`.
    """
    return _with_any_padding(_fastest, lhs, rhs, *args, **kwargs)


def _fastest(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    options = _atrous_options(lhs, rhs, *args, **kwargs)
    if options is None:
        return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)
    convolve = depthwise_conv if _is_depthwise(lhs, rhs) else atrous_conv
    return convolve(lhs, rhs, **options)


def xla_conv(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """Convolves by XLA: for exporters, XLA's partitioner, and the analysis of a model's program."""
    return _with_any_padding(lax.conv_general_dilated, lhs, rhs, *args, **kwargs)


def onednn_conv(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """Convolves by XLA, which calls oneDNN on CPU; by `fastest_conv` if depthwise."""
    convolve = fastest_conv if _is_depthwise(lhs, rhs) else xla_conv
    return convolve(lhs, rhs, *args, **kwargs)


def _with_any_padding(
    convolve: Callable[..., Array],
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> Array:
    """Masks padding and convolves, by `same_conv` where `convolve` or XLA cannot pad as SAME."""
    if lhs.ndim == 4 and rhs.shape[:2] != (1, 1):  # a 1x1 kernel reads no neighbouring pixels
        lhs = mask_padding(lhs)
    reach = rhs.shape[0] // 2 * (options.get("rhs_dilation") or (1,))[0]
    if padding == "SAME" and reach and tuple(window_strides) == (2, 2):
        symmetric = ((reach, reach), (reach, reach))
        if _atrous_options(lhs, rhs, window_strides, symmetric, **options) is not None:
            sizes = valid_sizes(lhs)
            unknown = sizes is not None or any(
                export.is_symbolic_dim(side % 2) for side in lhs.shape[1:3]
            )
            if unknown or (convolve is _fastest and _is_depthwise(lhs, rhs)):
                named: Any = {"padding": symmetric, "options": tuple(options.items())}
                return same_conv(lhs, rhs, sizes, convolve=convolve, **named)
    return convolve(lhs, rhs, window_strides, padding, **options)


def _atrous_options(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,  # follows from the shapes
    **others: Any,
) -> dict[str, Any] | None:
    """Returns `strides` and `kernel_dilation` for `atrous_conv`, or None if it cannot be used."""
    side, width = rhs.shape[:2]
    strides, dilation = window_strides[0], (rhs_dilation or (1,))[0]
    reach = dilation * (side // 2)
    is_atrous = (
        dimension_numbers == _NHWC
        and side == width
        and side % 2 == 1
        and set(window_strides) == {strides}
        and set(rhs_dilation or (1,)) == {dilation}
        and set(lhs_dilation or (1,)) == {1}
        and not isinstance(padding, str)
        and {tuple(pads) for pads in padding} == {(reach, reach)}
        and all(value is None for value in others.values())
    )
    return {"strides": strides, "kernel_dilation": dilation} if is_atrous else None


def _is_depthwise(lhs: Array, rhs: Array) -> bool:
    return 1 < lhs.shape[-1] == rhs.shape[-1] and rhs.shape[-2] == 1


def add_relu(
    shortcut: Float[Array, "n h w c"], y: Float[Array, "n h w c"], parameter: Float[Array, ""]
) -> Float[Array, "n h w c"]:
    """Computes `relu(shortcut + y)`, the end of a residual block.

    `parameter` is any number that is on all devices and not a constant of the program. It has no
    effect on the result.
    """
    on_cpu = unless_differentiated(_unfused_add_relu, plain_add_relu)
    return lax.platform_dependent(shortcut, y, parameter, cpu=on_cpu, default=plain_add_relu)


def plain_add_relu(
    shortcut: Float[Array, "n h w c"], y: Float[Array, "n h w c"], parameter: Float[Array, ""]
) -> Float[Array, "n h w c"]:
    """Computes `relu(shortcut + y)` without `add_relu`'s special case for CPU."""
    del parameter
    return relu(shortcut + y)


def _unfused_add_relu(shortcut: Array, y: Array, parameter: Array) -> Array:
    """Computes the sum inside a conditional, which XLA:CPU does not fuse into its consumers.

    Where no gradient needs the sum, XLA:CPU would compute it again for each consumer. The next
    block's sum is one of them, so that each block would add up all blocks before it: a fifth of the
    time of ResNet-101's forward pass. (XLA:CPU removes optimization barriers before it fuses.)
    """
    return lax.cond(parameter >= 0, plain_add_relu, plain_add_relu, shortcut, y, parameter)


class Implementation(NamedTuple):
    """The functions that compute a model's convolutions and residual sums."""

    conv_general_dilated: Callable[..., jax.Array]
    add_relu: Callable[[Array, Array, Array], Array]


FASTEST = Implementation(fastest_conv, add_relu)
XLA = Implementation(xla_conv, plain_add_relu)
ONEDNN = Implementation(onednn_conv, plain_add_relu)

_REPLACEABLE = {lax.conv_general_dilated, fastest_conv, xla_conv, onednn_conv}


def use_implementation(module: nnx.Module, implementation: Implementation) -> None:
    """Sets the implementation of every `nnx.Conv` and residual block inside a module.

    Keeps the function of a convolution that was made with one from outside this module, other than
    `lax.conv_general_dilated`.
    """
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Conv):
            if part.conv_general_dilated in _REPLACEABLE:
                part.conv_general_dilated = implementation.conv_general_dilated
        elif hasattr(part, "add_relu"):
            part.add_relu = implementation.add_relu
