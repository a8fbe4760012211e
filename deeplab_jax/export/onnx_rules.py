"""Rules that write one operation of a traced program as nodes of an ONNX graph.

A map is `[n, h, w, c]` in the trace and `[n, c, h, w]` in the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core
from onnx import helper

from deeplab_jax.export.onnx_graph import Constant, Graph, Tensor

Value = Tensor | Constant
# The axis of a map in the graph for each axis in the trace, and the reverse.
AXES = (0, 2, 3, 1)
TRACE_AXES = (0, 3, 1, 2)


class UnsupportedError(Exception):
    """Raised by a rule for a form of its operation that it cannot write."""


class Step(NamedTuple):
    """An operation of the trace."""

    graph: Graph  # to write to
    equation: core.JaxprEqn
    inputs: list[Value]
    single_use: list[bool]  # for each input, whether this operation is the only one that reads it
    source: str  # line of code that the operation comes from

    @property
    def shape(self) -> tuple[Any, ...]:
        aval: Any = self.equation.outvars[0].aval
        return aval.shape

    @property
    def dtype(self) -> Any:
        aval: Any = self.equation.outvars[0].aval
        return aval.dtype

    @property
    def scope(self) -> str:
        """The module of the variables that are read, or of the tensor computed last."""
        constants = [each.scope for each in self.inputs if isinstance(each, Constant)]
        tensors = [each for each in self.inputs if isinstance(each, Tensor)]
        tensors.sort(key=lambda each: -each.index)
        return next(filter(None, [*constants, *(each.scope for each in tensors)]), "")

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params

    def tensor(self, ndim: int | None = None) -> Tensor:
        """Returns the first input; raises `UnsupportedError` for a constant or another rank."""
        x = self.inputs[0]
        if not isinstance(x, Tensor) or ndim not in (None, len(x.shape)):
            raise UnsupportedError
        return x

    def add(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> Tensor:
        """Adds a node, and returns its output with the shape of the operation's result."""
        return self.graph.add(op_type, inputs, self.shape, self.scope, **attributes)

    def constant(self, value: Any, name: str) -> str:
        """Adds an array of the operation, and returns its name."""
        return self.graph.constant(value, f"{self.scope}/{name}".lstrip("/"))


Rule = Callable[[Step], Value]


def _convolution(step: Step, params: dict[str, Any] | None = None, **padding: Any) -> Value:
    x, kernel, params = step.tensor(), step.inputs[1], params or step.params
    numbers = params["dimension_numbers"]
    layouts = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    if (
        not isinstance(kernel, Constant)
        or layouts != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        or set(params["lhs_dilation"]) != {1}
        or params["batch_group_count"] != 1
    ):
        raise UnsupportedError
    if not padding:
        (top, bottom), (left, right) = params["padding"]
        padding = {"pads": [int(pad) for pad in (top, left, bottom, right)]}
    return step.add(
        "Conv",
        [x.name, step.graph.constant(kernel.value.transpose(3, 2, 0, 1), kernel.name)],
        kernel_shape=kernel.value.shape[:2],
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
        **padding,
    )


def _same_convolution(step: Step) -> Value:
    """Writes a convolution with SAME padding of a map of symbolic size."""
    equations = step.params["jaxpr"].jaxpr.eqns
    (inside,) = (each for each in equations if each.primitive.name == "conv_general_dilated")
    return _convolution(step, inside.params, auto_pad="SAME_UPPER")


def _addition(step: Step) -> Value:
    """Writes an addition, or adds a bias to the convolution before if nothing else reads that."""
    x, y = step.inputs
    if (
        isinstance(x, Tensor)
        and isinstance(y, Constant)
        and step.single_use[0]
        and step.graph.add_bias(x, y)
    ):
        return x
    return _elementwise(step, op_type="Add")


def _elementwise(step: Step, *, op_type: str) -> Value:
    names = []
    for each in step.inputs:
        if isinstance(each, Tensor):
            names.append(each.name)
        elif each.value.ndim in (0, 4):
            value = each.value if each.value.ndim == 0 else each.value.transpose(TRACE_AXES)
            add = step.graph.constant if each.name else step.constant
            names.append(add(value, each.name or "constant"))
        else:
            raise UnsupportedError
    return step.add(op_type, names)


def _concatenation(step: Step) -> Value:
    names = [each.name for each in step.inputs if isinstance(each, Tensor)]
    if len(step.shape) != 4 or len(names) != len(step.inputs):
        raise UnsupportedError
    return step.add("Concat", names, axis=AXES[step.params["dimension"]])


def _broadcast(step: Step) -> Value:
    """Writes the broadcast of one number per channel to a map."""
    x = step.tensor()
    if step.params["broadcast_dimensions"] != (0, 1, 2, 3) or x.shape[1:3] != (1, 1):
        raise UnsupportedError
    return step.add("Expand", [x.name, step.graph.sides(step.shape, step.scope, before=[1, 1])])


def _square(step: Step) -> Value:
    x = step.tensor()
    return step.add("Mul", [x.name, x.name])


def _integer_pow(step: Step) -> Value:
    if step.params["y"] != 2:
        raise UnsupportedError
    return _square(step)


def _operators(*op_types: str, ndim: int | None = None, **attributes: Any) -> Rule:
    """Returns a rule that writes operators of one input each, in sequence."""

    def rule(step: Step) -> Value:
        x = step.tensor(ndim)
        for op_type in op_types:
            x = step.add(op_type, [x.name], **attributes)
        return x

    return rule


def _relu6(step: Step) -> Value:
    x, dtype = step.tensor(), step.dtype
    limits = [step.constant(np.asarray(each, dtype), f"limit{each}") for each in (0, 6)]
    return step.add("Clip", [x.name, *limits])


def _erfc(step: Step) -> Value:
    error = step.add("Erf", [step.tensor().name])
    return step.add("Sub", [step.constant(np.ones((), step.dtype), "one"), error.name])


def _map_reduced_over_channels(step: Step) -> Tensor:
    x = step.tensor(4)
    if step.params["axes"] != (3,):
        raise UnsupportedError
    return x


def _reduction(step: Step, *, op_type: str) -> Value:
    x = _map_reduced_over_channels(step)
    axes = step.constant(np.asarray([AXES[3]], np.int64), "axes")
    return step.add(op_type, [x.name, axes], keepdims=0)


def _argmax(step: Step) -> Value:
    x = _map_reduced_over_channels(step)
    return step.add("ArgMax", [x.name], axis=AXES[3], keepdims=0)


def _reshape(step: Step) -> Value:
    """Writes a reshape that adds a channel axis to a map of one number per pixel."""
    x = step.tensor(3)
    if step.shape != (*x.shape, 1):
        raise UnsupportedError
    axes = step.constant(np.asarray([1], np.int64), "axes")
    return step.add("Unsqueeze", [x.name, axes])


def _transpose(step: Step) -> Value:
    x, permutation = step.tensor(4), step.params["permutation"]
    return step.add("Transpose", [x.name], perm=[AXES[permutation[axis]] for axis in TRACE_AXES])


def _product(step: Step) -> Value:
    """Writes channels times a matrix as a 1x1 convolution, and other products as `Einsum`."""
    x, y = step.inputs
    contracted, batched = step.params["dimension_numbers"]
    is_linear = (contracted, batched) == (((3,), (0,)), ((), ()))
    if is_linear and isinstance(x, Tensor) and isinstance(y, Constant) and len(x.shape) == 4:
        kernel = step.graph.constant(y.value.T[:, :, None, None], y.name)
        return step.add("Conv", [x.name, kernel], kernel_shape=[1, 1])
    ndims = [len(each.shape if isinstance(each, Tensor) else each.value.shape) for each in (x, y)]
    x_axes, y_axes = list("abcdefgh"[: ndims[0]]), list("ijklmnop"[: ndims[1]])
    for x_axis, y_axis in [*zip(*batched, strict=True), *zip(*contracted, strict=True)]:
        y_axes[y_axis] = x_axes[x_axis]
    shared = [x_axes[axis] for axis in batched[0]]
    gone = {*shared, *(x_axes[axis] for axis in contracted[0])}
    result = [*shared, *(name for name in x_axes + y_axes if name not in gone)]
    terms, inputs = [], []
    for each, axes in ((x, x_axes), (y, y_axes)):
        if isinstance(each, Tensor):
            terms.append(_in_graph_order(axes))
            inputs.append(each.name)
        else:
            terms.append("".join(axes))
            inputs.append(step.graph.constant(each.value, each.name or "matrix"))
    return step.add("Einsum", inputs, equation=f"{','.join(terms)}->{_in_graph_order(result)}")


def _in_graph_order(axes: Sequence[str]) -> str:
    """Joins the names of a tensor's axes; a map's channels come second in the graph."""
    return "".join(axes[axis] for axis in TRACE_AXES) if len(axes) == 4 else "".join(axes)


def _cast(step: Step) -> Value:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(step.params["new_dtype"]))
    return step.add("Cast", [step.tensor().name], to=dtype)


def _resize(step: Step, *, coordinates: str) -> Value:
    x = step.tensor()
    if x.shape == step.shape:
        return x
    return step.add(
        "Resize",
        [x.name, "", "", step.graph.sides(step.shape, step.scope)],
        mode="linear",
        coordinate_transformation_mode=coordinates,
        axes=[2, 3],
    )


PRIMITIVE_RULES: dict[str, Rule] = {
    "conv_general_dilated": _convolution,
    "add": _addition,
    "sub": functools.partial(_elementwise, op_type="Sub"),
    "mul": functools.partial(_elementwise, op_type="Mul"),
    "div": functools.partial(_elementwise, op_type="Div"),
    "max": functools.partial(_elementwise, op_type="Max"),
    "min": functools.partial(_elementwise, op_type="Min"),
    "concatenate": _concatenation,
    "broadcast_in_dim": _broadcast,
    "argmax": _argmax,
    "dot_general": _product,
    "erf": _operators("Erf"),
    "erfc": _erfc,
    "exp": _operators("Exp"),
    "integer_pow": _integer_pow,
    "logistic": _operators("Sigmoid"),
    "neg": _operators("Neg"),
    "reduce_max": functools.partial(_reduction, op_type="ReduceMax"),
    "reduce_sum": functools.partial(_reduction, op_type="ReduceSum"),
    "reshape": _reshape,
    "rsqrt": _operators("Sqrt", "Reciprocal"),
    "sqrt": _operators("Sqrt"),
    "square": _square,
    "tanh": _operators("Tanh"),
    "transpose": _transpose,
    "convert_element_type": _cast,
    "copy": lambda step: step.inputs[0],
}

_2X2: dict[str, Any] = {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}
# Jitted functions of this package and of jax.nn that are one operator. Others are lowered
# operation by operation.
FUNCTION_RULES: dict[str, Rule] = {
    "relu": _operators("Relu"),
    "relu6": _relu6,
    "same_conv": _same_convolution,
    "hard_silu": _operators("HardSwish"),
    "hard_sigmoid": _operators("HardSigmoid", alpha=1 / 6, beta=0.5),
    "max_pool_3x3": _operators("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average_pool_2x2": _operators("AveragePool", strides=[2, 2], count_include_pad=0, **_2X2),
    "average_pool_2x2_dense": _operators("AveragePool", count_include_pad=1, **_2X2),
    "global_mean": _operators("GlobalAveragePool"),
    "resize_bilinear_unpadded": functools.partial(_resize, coordinates="half_pixel"),
    "resize_aligned_unpadded": functools.partial(_resize, coordinates="align_corners"),
    "softmax": _operators("Softmax", ndim=4, axis=AXES[3]),
}
