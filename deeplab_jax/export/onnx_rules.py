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
    """An operation of the trace.

    Attributes:
      graph: graph to write to.
      equation: equation of the operation.
      inputs: values that it reads.
      shape: shape of its result.
      single_use: for each input, whether this operation is the only one that reads it.
      scope: module that the operation belongs to, or follows.
      source: line of code that the operation comes from.
    """

    graph: Graph
    equation: core.JaxprEqn
    inputs: list[Value]
    shape: tuple[Any, ...]
    single_use: list[bool]
    scope: str
    source: str

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

    def scoped(self, name: str) -> str:
        """Returns a name for an array of the operation."""
        return f"{self.scope}/{name}".lstrip("/")


Rule = Callable[[Step], Value]


def _convolution(step: Step, auto_pad: str = "") -> Value:
    x, kernel, params = step.tensor(), step.inputs[1], step.params
    numbers = params["dimension_numbers"]
    layouts = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    if (
        not isinstance(kernel, Constant)
        or layouts != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        or set(params["lhs_dilation"]) != {1}
        or params["batch_group_count"] != 1
    ):
        raise UnsupportedError
    (top, bottom), (left, right) = params["padding"]
    pads = [int(pad) for pad in (top, left, bottom, right)]
    padding: dict[str, Any] = {"auto_pad": auto_pad} if auto_pad else {"pads": pads}
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
    return _convolution(step._replace(equation=inside), auto_pad="SAME_UPPER")


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
            name = each.name or step.scoped("constant")
            names.append(step.graph.constant(value, name))
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
    return step.add("Expand", [x.name, step.graph.expand_shape(step.shape, step.scope)])


def _square(step: Step) -> Value:
    x = step.tensor()
    return step.add("Mul", [x.name, x.name])


def _integer_pow(step: Step) -> Value:
    if step.params["y"] != 2:
        raise UnsupportedError
    return _square(step)


def _unary(
    step: Step, *, op_types: Sequence[str] = (), ndim: int | None = None, **attributes: Any
) -> Value:
    """Writes operators of one input each, in sequence."""
    x = step.tensor(ndim)
    for op_type in op_types:
        x = step.add(op_type, [x.name], **attributes)
    return x


def _relu6(step: Step) -> Value:
    dtype: Any = step.equation.outvars[0].aval
    limits = [
        step.graph.constant(np.asarray(limit, dtype.dtype), step.scoped(name))
        for limit, name in ((0, "low"), (6, "high"))
    ]
    return step.add("Clip", [step.tensor().name, *limits])


def _erfc(step: Step) -> Value:
    error = step.add("Erf", [step.tensor().name])
    dtype: Any = step.equation.outvars[0].aval
    one = step.graph.constant(np.ones((), dtype.dtype), step.scoped("one"))
    return step.add("Sub", [one, error.name])


def _map_reduced_over_channels(step: Step) -> Tensor:
    x = step.tensor(4)
    if step.params["axes"] != (3,):
        raise UnsupportedError
    return x


def _reduction(step: Step, *, op_type: str) -> Value:
    x = _map_reduced_over_channels(step)
    axes = step.graph.constant(np.asarray([AXES[3]], np.int64), step.scoped("axes"))
    return step.add(op_type, [x.name, axes], keepdims=0)


def _argmax(step: Step) -> Value:
    x = _map_reduced_over_channels(step)
    return step.add("ArgMax", [x.name], axis=AXES[3], keepdims=0)


def _reshape(step: Step) -> Value:
    """Writes a reshape that adds a channel axis to a map of one number per pixel."""
    x = step.tensor(3)
    if step.shape != (*x.shape, 1):
        raise UnsupportedError
    axes = step.graph.constant(np.asarray([1], np.int64), step.scoped("axes"))
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
    letters = iter("abcdefghijklmnop")
    axes = [
        [""] * len(each.shape if isinstance(each, Tensor) else np.shape(each.value))
        for each in step.inputs
    ]
    for pairs in (batched, contracted):
        for x_axis, y_axis in zip(*pairs, strict=True):
            axes[0][x_axis] = axes[1][y_axis] = next(letters)
    shared = [axes[0][axis] for axis in batched[0]]
    summed = {axes[0][axis] for axis in contracted[0]}
    for names in axes:
        names[:] = [name or next(letters) for name in names]
    free = [name for names in axes for name in names if name not in {*shared, *summed}]
    terms = [
        "".join(names) if isinstance(each, Constant) else _in_graph_order(names)
        for names, each in zip(axes, step.inputs, strict=True)
    ]
    inputs = [
        each.name
        if isinstance(each, Tensor)
        else step.graph.constant(each.value, each.name or "matrix")
        for each in step.inputs
    ]
    return step.add(
        "Einsum", inputs, equation=f"{','.join(terms)}->{_in_graph_order(shared + free)}"
    )


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
        [x.name, "", "", step.graph.spatial_shape(step.shape, step.scope)],
        mode="linear",
        coordinate_transformation_mode=coordinates,
        axes=[2, 3],
    )


def _operator(op_type: str, **attributes: Any) -> Rule:
    """Returns a rule that writes one operator of a map."""
    return functools.partial(_unary, op_types=[op_type], ndim=4, **attributes)


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
    "erf": functools.partial(_unary, op_types=["Erf"]),
    "erfc": _erfc,
    "exp": functools.partial(_unary, op_types=["Exp"]),
    "integer_pow": _integer_pow,
    "logistic": functools.partial(_unary, op_types=["Sigmoid"]),
    "neg": functools.partial(_unary, op_types=["Neg"]),
    "reduce_max": functools.partial(_reduction, op_type="ReduceMax"),
    "reduce_sum": functools.partial(_reduction, op_type="ReduceSum"),
    "reshape": _reshape,
    "rsqrt": functools.partial(_unary, op_types=["Sqrt", "Reciprocal"]),
    "sqrt": functools.partial(_unary, op_types=["Sqrt"]),
    "square": _square,
    "tanh": functools.partial(_unary, op_types=["Tanh"]),
    "transpose": _transpose,
    "convert_element_type": _cast,
    "copy": lambda step: step.inputs[0],
}

_2X2: dict[str, Any] = {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}
# Jitted functions of this package and of jax.nn that are one operator. Others are lowered
# operation by operation.
FUNCTION_RULES: dict[str, Rule] = {
    "relu": _operator("Relu"),
    "relu6": _relu6,
    "same_conv": _same_convolution,
    "hard_silu": _operator("HardSwish"),
    "hard_sigmoid": _operator("HardSigmoid", alpha=1 / 6, beta=0.5),
    "max_pool_3x3": _operator("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average_pool_2x2": _operator("AveragePool", strides=[2, 2], count_include_pad=0, **_2X2),
    "average_pool_2x2_dense": _operator("AveragePool", count_include_pad=1, **_2X2),
    "global_mean": _operator("GlobalAveragePool"),
    "resize_bilinear_unpadded": functools.partial(_resize, coordinates="half_pixel"),
    "resize_aligned_unpadded": functools.partial(_resize, coordinates="align_corners"),
    "softmax": _operator("Softmax", axis=AXES[3]),
}
