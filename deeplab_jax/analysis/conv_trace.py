"""The convolutions of a model as executed, read from its traced program.

The model is traced without arrays, and its jaxpr is followed from the image to the logits. For each
feature map, the rows of the image that one of its rows sees are tracked: a convolution widens this
window, an addition merges two. Strides, rates and fields of view are thus those of the program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.models.ops.atrous_conv import valid_fraction
from deeplab_jax.models.ops.convolution import XLA
from deeplab_jax.models.ops.masking import STRIDES
from deeplab_jax.models.ops.resize import bilinear_matrix

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of a model, for one image."""

    name: str  # its attribute path, as in `backbone.layer4.0.conv2`
    kernel_size: int  # side of its kernel
    stride: int  # pixels of its input between neighbouring outputs
    rate: int  # pixels of its input between the kernel's taps
    groups: int  # of channels; as many as channels if it is depthwise
    in_shape: Shape  # height, width, channels
    out_shape: Shape
    # Pixels of the image between neighbours of its output; None after pooling to one pixel.
    output_stride: int | None
    # Side of the square of the image that an output sees through convolutions and max pooling,
    # pixels, as if the image had no border; None after pooling to one pixel. After a resize, whose
    # rows read different windows, their union.
    field_of_view: int | None
    sees_image: bool  # whether an output also sees the whole image, through pooling
    params: int  # its own, and those of the batch norm that follows

    @property
    def valid_fraction(self) -> float:
        """Fraction of the kernel's taps that read the map and not its padding, 0..1."""
        options = {"strides": self.stride, "kernel_dilation": self.rate}
        return valid_fraction(self.in_shape[:2], self.kernel_size, **options)

    @property
    def macs(self) -> int:
        """Number of multiply-adds of all taps, without the bias."""
        taps = self.kernel_size**2 * self.in_shape[2] // self.groups
        return math.prod(self.out_shape) * taps

    @property
    def valid_macs(self) -> int:
        """Number of multiply-adds of the taps that read the map."""
        return round(self.macs * self.valid_fraction)


def convolutions(
    model: FunctionalModel, height: int = 513, width: int | None = None
) -> list[Convolution]:
    """Lists the convolutions of a model in the order of execution.

    Height and width of the image are in pixels; without a width, the image is a square.

    Raises:
      ValueError: a side is below 1, or an operation between two convolutions is not supported here.
    """
    width = height if width is None else width
    if min(height, width) < 1:
        raise ValueError(f"height and width must be 1 or more, got {height} and {width}")
    shape = (1, height, width, model.architecture.in_channels)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    plain = model.using(XLA)
    traced = jax.make_jaxpr(lambda v, x: plain.apply(v, x, upsample=False)[0])(
        model.abstract, image
    )
    params, stats = model.abstract
    names: list[str] = jax.tree.leaves(Variables({n: n for n in params}, {n: n for n in stats}))
    reader = _Reader((height, width))
    reader.run(traced.jaxpr, [*map(_Variable, names), _Seen(1, 0, 0)])
    index_of = {found.name: index for index, found in enumerate(reader.found)}
    counts = [0] * len(index_of)
    for name, leaf in params.items():
        module = name.rpartition(".")[0]
        if module in index_of:
            counts[index_of[module]] += math.prod(leaf.shape)
        elif f"{module}.scale" in params:  # a norm belongs to the convolution before it
            counts[reader.first_use[name] - 1] += math.prod(leaf.shape)
    return [
        dataclasses.replace(found, params=count)
        for found, count in zip(reader.found, counts, strict=True)
    ]


class _Variable(NamedTuple):
    """An array of the model, or a copy of it in another dtype."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A map whose row i sees rows stride * i + low to stride * i + high of the image.

    Every layer treats columns as rows, so only rows are tracked. `stride` is None after the image
    was pooled to one pixel.
    """

    stride: int | None
    low: int
    high: int
    sees_image: bool = False

    def window(self, start: int, end: int, step: int = 1) -> _Seen:
        """The map whose row i sees rows step * i + start to step * i + end of this one."""
        if self.stride is None:
            return self
        low, high = self.low + self.stride * start, self.high + self.stride * end
        return _Seen(self.stride * step, low, high, self.sees_image)

    def join(self, other: _Seen) -> _Seen:
        """The map whose rows see what the same rows of both maps see."""
        sees_image = self.sees_image or other.sees_image
        if self.stride is None or other.stride is None:
            local = other if self.stride is None else self
            return dataclasses.replace(local, sees_image=sees_image)
        if self.stride != other.stride:
            raise ValueError(
                f"an operation combines maps of output strides {self.stride} and {other.stride}"
            )
        low, high = min(self.low, other.low), max(self.high, other.high)
        return _Seen(self.stride, low, high, sees_image)


class _Unknown(NamedTuple):
    """The result of an unsupported operation: an error only if a convolution reads it."""

    operation: str


_Value = _Variable | _Seen | _Unknown | None  # None: does not depend on the image

_ELEMENTWISE = (
    *("abs", "add", "add_any", "cbrt", "clamp", "convert_element_type", "copy", "div", "eq", "erf"),
    *("erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "le", "log", "log1p"),
    *("logistic", "lt", "max", "min", "mul", "ne", "neg", "pow", "rsqrt", "select_n", "sign"),
    *("sqrt", "square", "stop_gradient", "sub", "tanh"),
)
# Functions that resize a map, and whether with aligned corners.
_RESIZES = {"resize_bilinear_unpadded": False, "resize_aligned_unpadded": True}
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class _Reader:
    """Follows a program."""

    def __init__(self, image: tuple[int, int]) -> None:
        self.image = image  # height and width, pixels
        self.found: list[Convolution] = []  # so far, with `params` 0
        # Name of an array of the model -> number of convolutions before its first use.
        self.first_use: dict[str, int] = {}

    def run(self, jaxpr: Any, inputs: Iterable[_Value]) -> list[_Value]:
        """Returns what the results of a program see, given what its inputs see."""
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value_of(variable: Any) -> _Value:
            return None if isinstance(variable, Literal) else values.get(variable)

        for equation in jaxpr.eqns:
            results = self._results(equation, [value_of(v) for v in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [value_of(variable) for variable in jaxpr.outvars]

    def _results(self, equation: Any, inputs: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name == "jit" and params["name"] in _RESIZES:
            return [_resized(equation, inputs[0], self.image)]
        if name in _CALLS:
            return self.run(params[_CALLS[name]].jaxpr, inputs)
        for value in inputs:
            if isinstance(value, _Variable):
                self.first_use.setdefault(value.name, len(self.found))
        if name == "conv_general_dilated" or _is_linear(equation, inputs):
            return [self._convolve(equation, *inputs)]
        return [_follow(equation, inputs)] * len(equation.outvars)

    def _convolve(self, equation: Any, seen: _Value, kernel: _Value) -> _Seen:
        (x, weights), params = (v.aval.shape for v in equation.invars), equation.params
        if not isinstance(kernel, _Variable):
            raise ValueError(f"the kernel of a convolution of {x} is not an array of the model")
        name = kernel.name.rpartition(".")[0]
        if not isinstance(seen, _Seen):
            reason = "does not depend on the image"
            if isinstance(seen, _Unknown):
                reason = f"is the result of {seen.operation!r}, which is not supported here"
            raise ValueError(f"the field of view of {name} is not known: its input {reason}")
        before, stride, side, rate, groups = 0, 1, 1, 1, 1
        if equation.primitive.name == "conv_general_dilated":
            (before, _), stride, side = (
                params["padding"][0],
                params["window_strides"][0],
                weights[0],
            )
            rate, groups = params["rhs_dilation"][0], params["feature_group_count"]
        out = seen.window(-before, rate * (side - 1) - before, stride)
        self.found.append(
            Convolution(
                name=name,
                kernel_size=side,
                stride=stride,
                rate=rate,
                groups=groups,
                in_shape=x[1:],
                out_shape=equation.outvars[0].aval.shape[1:],
                output_stride=out.stride,
                field_of_view=None if out.stride is None else out.high - out.low + 1,
                sees_image=out.sees_image,
                params=0,
            )
        )
        return out


def _is_linear(equation: Any, inputs: list[_Value]) -> bool:
    """Whether channels are multiplied by a matrix, as in `nnx.Linear`: a 1x1 convolution."""
    return (
        equation.primitive.name == "dot_general"
        and isinstance(inputs[0], _Seen)
        and isinstance(inputs[1], _Variable)
        and len(equation.invars[0].aval.shape) == 4
        and equation.params["dimension_numbers"] == (((3,), (0,)), ((), ()))
    )


def _resized(equation: Any, seen: _Value, image: tuple[int, int]) -> _Value:
    """What a bilinearly resized map sees: the rows whose weights are not 0."""
    if not isinstance(seen, _Seen) or seen.stride is None:
        return seen
    before, after = (v.aval.shape[1:3] for v in (*equation.invars, *equation.outvars))
    strides = (s for s in STRIDES if after == tuple(-(-side // s) for side in image))
    stride = next(strides, None)
    if stride is None:
        return _Unknown(equation.params["name"])
    lows, highs = [], []
    for in_side, out_side in zip(before, after, strict=True):
        read = bilinear_matrix(out_side, in_side, _RESIZES[equation.params["name"]]) > 0
        first, last = read.argmax(1), in_side - 1 - read[:, ::-1].argmax(1)
        row = stride * np.arange(out_side)
        lows.append(int((seen.stride * first - row).min()))
        highs.append(int((seen.stride * last - row).max()))
    return _Seen(stride, seen.low + min(lows), seen.high + max(highs), seen.sees_image)


def _follow(equation: Any, inputs: list[_Value]) -> _Value:
    """What the result of an operation other than a convolution sees."""
    name, params = equation.primitive.name, equation.params
    unknown = [value for value in inputs if isinstance(value, _Unknown)]
    if unknown:
        return unknown[0]
    maps = [value for value in inputs if isinstance(value, _Seen)]
    if not maps:
        return inputs[0] if name == "convert_element_type" else None
    seen = maps[0]
    if name in _ELEMENTWISE or (name == "concatenate" and params["dimension"] == 3):
        return functools.reduce(_Seen.join, maps)
    if name == "slice":
        start, step = params["start_indices"][1], (params["strides"] or (1,) * 4)[1]
        return seen.window(int(start), int(start), int(step))
    if name == "pad" and not any(interior for *_, interior in params["padding_config"]):
        before = int(params["padding_config"][1][0])
        return seen.window(-before, -before)
    if name == "reduce_window_sum":
        before, side = params["padding"][1][0], params["window_dimensions"][1]
        return seen.window(-before, side - 1 - before, params["window_strides"][1])
    if name in ("reduce_sum", "reduce_max") and params["axes"] == (1, 2):
        return _Seen(None, 0, 0, sees_image=True)
    before, after = (variables[0].aval.shape for variables in (equation.invars, equation.outvars))
    if name in ("reduce_sum", "reduce_max", "reduce_min") and params["axes"] == (3,):
        return seen  # over the channels
    same_axes = params.get("broadcast_dimensions", (0, 1, 2))[:3] == (0, 1, 2)
    if name in ("broadcast_in_dim", "reshape") and same_axes and before[:3] == after[:3]:
        return seen  # only the channels change
    if seen.stride is None and name in ("broadcast_in_dim", "reshape", "transpose"):
        return seen
    if name == "dot_general" and all(value in (None, seen) for value in inputs):
        # A constant matrix along rows or columns: pooling, whose outputs may see all of them.
        return _Seen(None, 0, 0, sees_image=True)
    return _Unknown(name)
