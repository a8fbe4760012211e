"""The convolutions of a model as they are executed, read from the program that it is traced to.

The model is traced without arrays, and its jaxpr followed from the image on. For each map it is
known which rows of the image a row of it sees: a convolution widens that, an addition joins two.
So strides, rates and fields of view are those of the program, whatever made them.
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
from deeplab_jax.models.ops.atrous_conv import valid_share
from deeplab_jax.models.ops.convolution import XLA
from deeplab_jax.models.ops.masking import STRIDES
from deeplab_jax.models.ops.resize import bilinear_matrix

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of a model, for one image.

    Attributes:
      name: its attribute path, as in `backbone.layer4.0.conv2`.
      kernel_size: side of its kernel.
      stride: pixels of its input.
      rate: pixels of its input between the taps.
      groups: that its channels are divided into; as many as channels where it is depthwise.
      in_shape, out_shape: height, width and channels of its input and output.
      output_stride: pixels of the image between neighbours of its output; None where the image was
        pooled to one pixel before.
      field_of_view: side of the square of the image that an output sees through convolutions and
        max pooling, pixels, the image's borders apart; None where the image was pooled before.
        Behind a resize, which reads other rows at each place, of all places together.
      sees_image: whether an output (also) sees the whole image, through pooling.
      params: number of parameters: its own, and those of the batch norm executed behind it.
    """

    name: str
    kernel_size: int
    stride: int
    rate: int
    groups: int
    in_shape: Shape
    out_shape: Shape
    output_stride: int | None
    field_of_view: int | None
    sees_image: bool
    params: int

    @property
    def valid_share(self) -> float:
        """Share of the kernel's taps that fall on the map and not into its padding, 0..1."""
        rows, columns = (
            valid_share(side, self.kernel_size, strides=self.stride, kernel_dilation=self.rate)
            for side in self.in_shape[:2]
        )
        return rows * columns

    @property
    def macs(self) -> int:
        """Multiplications, each with its addition, of all taps; the bias is not counted."""
        taps = self.kernel_size**2 * self.in_shape[2] // self.groups
        return math.prod(self.out_shape) * taps

    @property
    def valid_macs(self) -> int:
        """Those of the taps that fall on the map."""
        return round(self.macs * self.valid_share)


def convolutions(
    model: FunctionalModel, height: int = 513, width: int | None = None
) -> list[Convolution]:
    """Each convolution of a model, in the order of execution.

    Args:
      model: whose program is read.
      height, width: of the image, pixels; no width: the same.

    Raises:
      ValueError: a side is below 1; or the model does something between two convolutions of which
        it is not known here what it sees.
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
    counts = _params_of(reader, {name: math.prod(leaf.shape) for name, leaf in params.items()})
    return [
        dataclasses.replace(found, params=count)
        for found, count in zip(reader.found, counts, strict=True)
    ]


def _params_of(reader: _Reader, sizes: dict[str, int]) -> list[int]:
    """Parameters of each convolution: of its module, and of the norms executed before the next."""
    places = {found.name: place for place, found in enumerate(reader.found)}
    counts = [0] * len(places)
    for name, size in sizes.items():
        module = name.rpartition(".")[0]
        if module in places:
            counts[places[module]] += size
        elif f"{module}.scale" in sizes:
            counts[reader.first_use[name] - 1] += size
    return counts


class _Variable(NamedTuple):
    """An array of the model, or a copy of it in another dtype."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A map whose row i sees rows stride * i + low to stride * i + high of the image.

    Columns are treated as rows are: by every layer, and so here. Where the image was pooled to one
    pixel there is no stride, and `whole` says so.
    """

    stride: int | None
    low: int
    high: int
    whole: bool = False

    def window(self, start: int, end: int, step: int = 1) -> _Seen:
        """The map whose row i sees rows step * i + start to step * i + end of this one."""
        if self.stride is None:
            return self
        low, high = self.low + self.stride * start, self.high + self.stride * end
        return _Seen(self.stride * step, low, high, self.whole)

    def join(self, other: _Seen) -> _Seen:
        """What sees both."""
        whole = self.whole or other.whole
        if self.stride is None or other.stride is None:
            local = other if self.stride is None else self
            return dataclasses.replace(local, whole=whole)
        if self.stride != other.stride:
            raise ValueError(f"maps of strides {self.stride} and {other.stride} are joined")
        return _Seen(self.stride, min(self.low, other.low), max(self.high, other.high), whole)


class _Unknown(NamedTuple):
    """A map made by an operation that is not followed; harmless behind the last convolution."""

    operation: str


_Value = _Variable | _Seen | _Unknown | None  # None: of no image, such as a constant

_ELEMENTWISE = (
    *("abs", "add", "add_any", "cbrt", "clamp", "convert_element_type", "copy", "div", "eq", "erf"),
    *("erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "le", "log", "log1p"),
    *("logistic", "lt", "max", "min", "mul", "ne", "neg", "pow", "rsqrt", "select_n", "sign"),
    *("sqrt", "square", "stop_gradient", "sub", "tanh"),
)
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


class _Reader:
    """Follows a program.

    Attributes:
      found: its convolutions so far, without their parameters.
      first_use: how many convolutions were found before an array of the model was first used.
    """

    def __init__(self, image: tuple[int, int]) -> None:
        self.image = image  # height and width, pixels
        self.found: list[Convolution] = []
        self.first_use: dict[str, int] = {}

    def run(self, jaxpr: Any, inputs: Iterable[_Value]) -> list[_Value]:
        """What the results of a program see, of what its inputs see."""
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value_of(variable: Any) -> _Value:
            return None if isinstance(variable, Literal) else values.get(variable)

        for equation in jaxpr.eqns:
            results = self._results(equation, [value_of(v) for v in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [value_of(variable) for variable in jaxpr.outvars]

    def _results(self, equation: Any, inputs: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name == "jit" and params["name"] == "bilinear_resize":
            return [_resized(equation, inputs[0], self.image)]
        if name in _CALLS:
            return self.run(params[_CALLS[name]].jaxpr, inputs)
        for value in inputs:
            if isinstance(value, _Variable):
                self.first_use.setdefault(value.name, len(self.found))
        if name == "conv_general_dilated":
            return [self._convolve(equation, *inputs)]
        if name == "dot_general" and _is_1x1(equation, inputs):
            return [self._multiply(equation, *inputs)]
        return [_follow(equation, inputs)] * len(equation.outvars)

    def _convolve(self, equation: Any, seen: _Value, kernel: _Value) -> _Seen:
        (x, weights), params = (v.aval.shape for v in equation.invars), equation.params
        if not isinstance(kernel, _Variable):
            raise ValueError(f"a convolution of {x} has a kernel that is no array of the model")
        name = kernel.name.rpartition(".")[0]
        if not isinstance(seen, _Seen):
            what = f"{seen.operation!r}" if isinstance(seen, _Unknown) else "no image"
            raise ValueError(f"what {name} sees is not known: its input comes from {what}")
        (before, _), stride = params["padding"][0], params["window_strides"][0]
        side, rate = weights[0], params["rhs_dilation"][0]
        out = seen.window(-before, rate * (side - 1) - before, stride)
        groups = params["feature_group_count"]
        self._record(equation, name, out, side, stride=stride, rate=rate, groups=groups)
        return out

    def _multiply(self, equation: Any, seen: _Value, kernel: _Value) -> _Value:
        """Each pixel's channels times a matrix, as `nnx.Linear` does: a 1x1 convolution."""
        assert isinstance(seen, _Seen)
        assert isinstance(kernel, _Variable)
        self._record(equation, kernel.name.rpartition(".")[0], seen, 1)
        return seen

    def _record(
        self,
        equation: Any,
        name: str,
        out: _Seen,
        side: int,
        *,
        stride: int = 1,
        rate: int = 1,
        groups: int = 1,
    ) -> None:
        self.found.append(
            Convolution(
                name=name,
                kernel_size=side,
                stride=stride,
                rate=rate,
                groups=groups,
                in_shape=equation.invars[0].aval.shape[1:],
                out_shape=equation.outvars[0].aval.shape[1:],
                output_stride=out.stride,
                field_of_view=None if out.stride is None else out.high - out.low + 1,
                sees_image=out.whole,
                params=0,
            )
        )


def _is_1x1(equation: Any, inputs: list[_Value]) -> bool:
    x = equation.invars[0].aval.shape
    return (
        isinstance(inputs[0], _Seen)
        and isinstance(inputs[1], _Variable)
        and len(x) == 4
        and equation.params["dimension_numbers"] == (((3,), (0,)), ((), ()))
    )


def _resized(equation: Any, seen: _Value, image: tuple[int, int]) -> _Value:
    """What a map resized to the size of another one sees: rows as bilinear weights say."""
    if not isinstance(seen, _Seen) or seen.stride is None:
        return seen
    before, after = (v.aval.shape[1:3] for v in (*equation.invars, *equation.outvars))
    fitting = (s for s in STRIDES if after == tuple(-(-side // s) for side in image))
    stride = next(fitting, None)
    if stride is None:
        return _Unknown("bilinear_resize")
    lows, highs = [], []
    for in_side, out_side in zip(before, after, strict=True):
        read = bilinear_matrix(out_side, in_side) > 0
        first, last = read.argmax(1), in_side - 1 - read[:, ::-1].argmax(1)
        place = stride * np.arange(out_side)
        lows.append(int((seen.stride * first - place).min()))
        highs.append(int((seen.stride * last - place).max()))
    return _Seen(stride, seen.low + min(lows), seen.high + max(highs), seen.whole)


def _follow(equation: Any, inputs: list[_Value]) -> _Value:
    """What the result of an operation other than a convolution sees."""
    name, params = equation.primitive.name, equation.params
    lost = [value for value in inputs if isinstance(value, _Unknown)]
    if lost:
        return lost[0]
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
    if name in ("reduce_sum", "reduce_max") and params["axes"] == (1, 2):
        return _Seen(None, 0, 0, whole=True)
    before, after = (variables[0].aval.shape for variables in (equation.invars, equation.outvars))
    if name in ("reduce_sum", "reduce_max", "reduce_min") and params["axes"] == (3,):
        return seen  # over the channels
    kept = params.get("broadcast_dimensions", (0, 1, 2))[:3] == (0, 1, 2)
    if name in ("broadcast_in_dim", "reshape") and kept and before[:3] == after[:3]:
        return seen  # images, rows and columns as they were
    if seen.stride is None and name in ("broadcast_in_dim", "reshape", "transpose"):
        return seen
    if name == "dot_general" and all(value in (None, seen) for value in inputs):
        # A fixed matrix along rows or columns: pooling, whose every output may see all of them.
        return _Seen(None, 0, 0, whole=True)
    return _Unknown(name)
