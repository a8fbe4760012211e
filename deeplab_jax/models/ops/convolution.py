"""Convolution as `lax.conv_general_dilated` defines it, by the fastest exact implementation.

Each function here has the signature of `lax.conv_general_dilated` and is meant for the attribute
`conv_general_dilated` of an `nnx.Conv`. All give the same result up to rounding, and all mask the
padding of images first (see `models.ops.masking`). `use_implementation` swaps them in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import lax
from jax.nn import relu
from jaxtyping import Array, Float

from deeplab_jax.models.ops.atrous_conv import atrous_conv, unless_differentiated
from deeplab_jax.models.ops.depthwise_conv import depthwise_conv
from deeplab_jax.models.ops.masking import mask_padding

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def fastest_conv(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """Chooses by platform, kernel and map; whatever it does not know goes to XLA.

    It knows 2-D convolutions of NHWC maps with an odd square kernel and symmetric padding that
    keeps the size. See `atrous_conv` and `depthwise_conv` for the choices.
    """
    lhs = _mask(lhs, rhs)
    known = _known(lhs, rhs, *args, **kwargs)
    if known is None:
        return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)
    convolve = depthwise_conv if _is_depthwise(lhs, rhs) else atrous_conv
    return convolve(lhs, rhs, strides=known.strides, kernel_dilation=known.kernel_dilation)


def xla_conv(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """XLA's convolution: for exporters, for XLA's partitioner, and to read a model's program."""
    return lax.conv_general_dilated(_mask(lhs, rhs), rhs, *args, **kwargs)


def onednn_conv(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """XLA's convolution, which calls oneDNN on CPU, except for depthwise ones."""
    convolve = fastest_conv if _is_depthwise(lhs, rhs) else xla_conv
    return convolve(lhs, rhs, *args, **kwargs)


class _Known(NamedTuple):
    strides: int
    kernel_dilation: int


def _known(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> _Known | None:
    """Strides and dilation of a convolution that `atrous_conv` computes, or None."""
    del feature_group_count  # follows from the shapes
    dilations = tuple(rhs_dilation or (1, 1))
    side, width = rhs.shape[:2]
    if (
        dimension_numbers != _NHWC
        or set(lhs_dilation or ()) - {1}
        or batch_group_count != 1
        or precision is not None
        or preferred_element_type is not None
        or out_sharding is not None
        or side != width
        or side % 2 == 0
        or len(set(window_strides)) > 1
        or len(set(dilations)) > 1
        or isinstance(padding, str)
    ):
        return None
    reach = dilations[0] * (side // 2)
    if any(tuple(pads) != (reach, reach) for pads in padding):
        return None
    return _Known(window_strides[0], dilations[0])


def _is_depthwise(lhs: Array, rhs: Array) -> bool:
    return 1 < lhs.shape[-1] == rhs.shape[-1] and rhs.shape[-2] == 1


def _mask(lhs: Array, rhs: Array) -> Array:
    """A 1x1 kernel sees no neighbour, so its input need not be masked."""
    return mask_padding(lhs) if lhs.ndim == 4 and rhs.shape[:2] != (1, 1) else lhs


def add_relu(
    shortcut: Float[Array, "n h w c"], y: Float[Array, "n h w c"], parameter: Float[Array, ""]
) -> Float[Array, "n h w c"]:
    """Computes `relu(shortcut + y)`, the end of a residual block, as is fastest on the platform.

    Args:
      shortcut: a map.
      y: the other map.
      parameter: any number that XLA does not know and that all devices hold; it has no effect.
    """
    on_cpu = unless_differentiated(_add_once, plain_add_relu)
    return lax.platform_dependent(shortcut, y, parameter, cpu=on_cpu, default=plain_add_relu)


def plain_add_relu(
    shortcut: Float[Array, "n h w c"], y: Float[Array, "n h w c"], parameter: Float[Array, ""]
) -> Float[Array, "n h w c"]:
    """Computes `relu(shortcut + y)`, left to XLA; see `add_relu`."""
    del parameter
    return relu(shortcut + y)


def _add_once(shortcut: Array, y: Array, parameter: Array) -> Array:
    """The sum behind a conditional, which XLA:CPU does not fuse into its readers.

    Without a gradient to keep the sum, XLA:CPU would recompute it for each reader. The next block's
    sum is one of them, so each block would add up all blocks before it: a fifth of ResNet-101's
    forward pass. (XLA:CPU drops an optimization barrier before it fuses.)
    """
    return lax.cond(parameter >= 0, plain_add_relu, plain_add_relu, shortcut, y, parameter)


class Implementation(NamedTuple):
    """The functions that compute a model's convolutions and residual sums."""

    conv_general_dilated: Callable[..., jax.Array]
    add_relu: Callable[[Array, Array, Array], Array]


FASTEST = Implementation(fastest_conv, add_relu)
XLA = Implementation(xla_conv, plain_add_relu)
ONEDNN = Implementation(onednn_conv, plain_add_relu)

_OURS = {each.conv_general_dilated for each in (FASTEST, XLA, ONEDNN)}


def use_implementation(module: nnx.Module, implementation: Implementation) -> None:
    """Sets the implementation of every `nnx.Conv` and residual block inside a module.

    A convolution that was given another function than `lax.conv_general_dilated` keeps it.
    """
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Conv):
            if part.conv_general_dilated in {lax.conv_general_dilated, *_OURS}:
                part.conv_general_dilated = implementation.conv_general_dilated
        elif hasattr(part, "add_relu"):
            part.add_relu = implementation.add_relu
