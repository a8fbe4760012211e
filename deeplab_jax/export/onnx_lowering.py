"""From a program's trace to an ONNX graph.

What is walked is the trace of the very model that is evaluated, so the graph cannot drift from it.
A map is `[n, h, w, c]` there and `[n, c, h, w]` in the graph: convolutions, whose kernels are
transposed here, give it so, and what acts on each number alone does not mind. So there are no
transposes but at the ends.

What does not depend on the images, such as a kernel times the scale of its batch norm, is computed
here and becomes an array of the graph.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from jax.extend import core, source_info_util
from onnx import helper

from deeplab_jax.export.onnx_graph import Constant, Graph, Tensor
from deeplab_jax.utils.errors import UserError

Value = Tensor | Constant
# Axes of a map in the graph, by their places in JAX.
AXES = (0, 2, 3, 1)
JAX_AXES = (0, 3, 1, 2)  # the other way round


class Step(NamedTuple):
    """An equation of the trace, as its rule sees it.

    Attributes:
      equation: the operation with its parameters.
      inputs: of it.
      shape: of its result.
      once: of each input, whether nothing else depends on it.
      scope: the module that it belongs to, or follows.
      source: line of code that it comes from.
    """

    equation: core.JaxprEqn
    inputs: list[Value]
    shape: tuple[Any, ...]
    once: list[bool]
    scope: str
    source: str


# A rule writes nodes and gives the result, or None where an operation is not as it knows it.
Rule = Callable[[Graph, Step], Value | None]


def lower(
    graph: Graph,
    jaxpr: core.Jaxpr,
    constants: Sequence[Any],
    arguments: Sequence[Value],
    source: str = "",
) -> Value:
    """Writes a trace into a graph, and gives its one result.

    Args:
      graph: is added to.
      jaxpr: the trace.
      constants: the arrays that it closes over.
      arguments: what it is called with.
      source: line of code that calls it.

    Raises:
      UserError: an operation that there is no rule for, with where it stands.
    """
    values: dict[core.Var, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= zip(jaxpr.constvars, map(Constant, constants), strict=True)
    equations = _compute_constants(jaxpr, _needed(jaxpr), values)
    reads = [*jaxpr.invars, *jaxpr.outvars, *(atom for one in equations for atom in one.invars)]
    uses = collections.Counter(map(id, reads))
    for equation in equations:
        inputs = [_read(atom, values) for atom in equation.invars]
        once = [uses[id(atom)] == 1 for atom in equation.invars]
        (result,) = equation.outvars
        # A line of this package: JAX's own are left out, and may be all that there are.
        line = source_info_util.summarize(equation.source_info) or source
        step = Step(equation, inputs, _shape(result), once, _scope(inputs), line)
        values[result] = _lower_step(graph, step)
    return _read(jaxpr.outvars[0], values)


def _lower_step(graph: Graph, step: Step) -> Value:
    name, params = step.equation.primitive.name, step.equation.params
    rule = RULES.get(name)
    if name in CALLS:
        called = params[CALLS[name]]
        rule = OPERATIONS.get(params.get("name", ""))
        if rule is None:
            return lower(graph, called.jaxpr, called.consts, step.inputs, step.source)
    written = None if rule is None else rule(graph, step)
    if written is None:
        raise UserError(
            f"the model cannot be exported to ONNX: there is no rule for {name!r}, in or behind "
            f"{step.scope or 'the images'}, at {step.source}. Give --height, --width and --batch, "
            "if an open size is the reason, or export to .stablehlo, which takes every model"
        )
    return written


def _read(atom: Any, values: dict[core.Var, Value]) -> Value:
    return Constant(np.asarray(atom.val)) if isinstance(atom, core.Literal) else values[atom]


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that the result depends on: not those of an auxiliary head."""
    wanted = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return kept[::-1]


def _compute_constants(
    jaxpr: core.Jaxpr, equations: list[core.JaxprEqn], values: dict[core.Var, Value]
) -> list[core.JaxprEqn]:
    """The equations that depend on the images; the results of the others are put into `values`."""
    known = {var: value for var, value in values.items() if isinstance(value, Constant)}
    names = {var: value.name for var, value in known.items()}  # of what each comes from first
    constant, others = [], []
    for equation in equations:
        read = [atom for atom in equation.invars if isinstance(atom, core.Var)]
        open_sides = any(map(export.is_symbolic_dim, _shape(equation.outvars[0])))
        open_sides |= equation.primitive.name == "dim_as_value"
        if open_sides or not names.keys() >= set(read):
            others.append(equation)
            continue
        constant.append(equation)
        name = next((names[var] for var in read if names[var]), "")
        names |= dict.fromkeys(equation.outvars, name)
    if constant:
        results = [var for equation in constant for var in equation.outvars]
        part = jaxpr.replace(constvars=[], invars=[*known], outvars=results, eqns=constant)
        compute = jax.jit(core.jaxpr_as_fun(core.ClosedJaxpr(part, [])))
        arrays = compute(*(value.value for value in known.values()))
        for var, array in zip(results, arrays, strict=True):
            values[var] = Constant(np.asarray(array), names[var])
    return others


def _shape(result: core.Var) -> tuple[Any, ...]:
    aval: Any = result.aval
    return aval.shape


def _scope(inputs: Sequence[Value]) -> str:
    """The module of the variables that are read, or else of the map that was computed last."""
    constants = [one.scope for one in inputs if isinstance(one, Constant)]
    tensors = sorted((one for one in inputs if isinstance(one, Tensor)), key=lambda one: -one.place)
    return next(filter(None, [*constants, *(one.scope for one in tensors)]), "")


def _convolution(graph: Graph, step: Step) -> Value | None:
    x, kernel = step.inputs
    params = step.equation.params
    numbers = params["dimension_numbers"]
    layouts = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    if (
        not (isinstance(x, Tensor) and isinstance(kernel, Constant))
        or layouts != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        or set(params["lhs_dilation"]) != {1}
        or params["batch_group_count"] != 1
    ):
        return None
    (top, bottom), (left, right) = params["padding"]
    return graph.add(
        "Conv",
        [x.name, graph.constant(kernel.value.transpose(3, 2, 0, 1), kernel.name)],
        step.shape,
        step.scope,
        kernel_shape=kernel.value.shape[:2],
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        pads=[int(pad) for pad in (top, left, bottom, right)],
        group=params["feature_group_count"],
    )


def _addition(graph: Graph, step: Step) -> Value | None:
    """An addition, or the bias of the convolution that nothing else reads."""
    x, y = step.inputs
    if isinstance(x, Tensor) and isinstance(y, Constant) and step.once[0] and graph.add_bias(x, y):
        return x
    return _elementwise(graph, step, op_type="Add")


def _elementwise(graph: Graph, step: Step, *, op_type: str) -> Value | None:
    names = []
    for one in step.inputs:
        if isinstance(one, Tensor):
            names.append(one.name)
        elif one.value.ndim in (0, 4):
            value = one.value if one.value.ndim == 0 else one.value.transpose(0, 3, 1, 2)
            names.append(graph.constant(value, one.name or f"{step.scope}/constant".lstrip("/")))
        else:
            return None
    return graph.add(op_type, names, step.shape, step.scope)


def _concatenation(graph: Graph, step: Step) -> Value | None:
    names = [one.name for one in step.inputs if isinstance(one, Tensor)]
    if len(step.shape) != 4 or len(names) != len(step.inputs):
        return None
    axis = AXES[step.equation.params["dimension"]]
    return graph.add("Concat", names, step.shape, step.scope, axis=axis)


def _broadcast(graph: Graph, step: Step) -> Value | None:
    """One number a channel, spread over a map."""
    (x, *_), axes = step.inputs, step.equation.params["broadcast_dimensions"]
    if not isinstance(x, Tensor) or axes != (0, 1, 2, 3) or x.shape[1:3] != (1, 1):
        return None
    return graph.add(
        "Expand", [x.name, graph.spread(step.shape, step.scope)], step.shape, step.scope
    )


def _square(graph: Graph, step: Step) -> Value | None:
    (x,) = step.inputs
    if not isinstance(x, Tensor):
        return None
    return graph.add("Mul", [x.name, x.name], step.shape, step.scope)


def _integer_pow(graph: Graph, step: Step) -> Value | None:
    return _square(graph, step) if step.equation.params["y"] == 2 else None


def _unary(graph: Graph, step: Step, *, op_types: Sequence[str]) -> Value | None:
    """Operators of one number each, one after the other."""
    (x,) = step.inputs
    if not isinstance(x, Tensor):
        return None
    for op_type in op_types:
        x = graph.add(op_type, [x.name], step.shape, step.scope)
    return x


def _erfc(graph: Graph, step: Step) -> Value | None:
    (x,) = step.inputs
    if not isinstance(x, Tensor):
        return None
    error = graph.add("Erf", [x.name], step.shape, step.scope)
    dtype: Any = step.equation.outvars[0].aval
    one = graph.constant(np.ones((), dtype.dtype), f"{step.scope}/one".lstrip("/"))
    return graph.add("Sub", [one, error.name], step.shape, step.scope)


def _reduction(graph: Graph, step: Step, *, op_type: str) -> Value | None:
    """A sum or maximum over the channels of a map."""
    (x,) = step.inputs
    if not isinstance(x, Tensor) or len(x.shape) != 4:
        return None
    if step.equation.params["axes"] != (3,):
        return None
    axes = np.asarray([AXES[3]], np.int64)
    names = [x.name, graph.constant(axes, f"{step.scope}/axes".lstrip("/"))]
    return graph.add(op_type, names, step.shape, step.scope, keepdims=0)


def _reshape(graph: Graph, step: Step) -> Value | None:
    """An axis of one channel, added to a map of one number a pixel."""
    (x, *_) = step.inputs
    if not isinstance(x, Tensor) or len(x.shape) != 3 or step.shape != (*x.shape, 1):
        return None
    axes = graph.constant(np.asarray([1], np.int64), f"{step.scope}/axes".lstrip("/"))
    return graph.add("Unsqueeze", [x.name, axes], step.shape, step.scope)


def _transpose(graph: Graph, step: Step) -> Value | None:
    (x,) = step.inputs
    if not isinstance(x, Tensor) or len(x.shape) != 4:
        return None
    permutation = step.equation.params["permutation"]
    perm = [AXES[permutation[axis]] for axis in JAX_AXES]
    return graph.add("Transpose", [x.name], step.shape, step.scope, perm=perm)


def _product(graph: Graph, step: Step) -> Value | None:
    """A map's channels times a matrix: a 1x1 convolution; any other product: an `Einsum`."""
    x, y = step.inputs
    contracted, batched = step.equation.params["dimension_numbers"]
    is_linear = (contracted, batched) == (((3,), (0,)), ((), ()))
    if is_linear and isinstance(x, Tensor) and isinstance(y, Constant) and len(x.shape) == 4:
        kernel = graph.constant(y.value.T[:, :, None, None], y.name)
        return graph.add("Conv", [x.name, kernel], step.shape, step.scope, kernel_shape=[1, 1])
    letters = iter("abcdefghijklmnop")
    shapes = [_value_shape(one) for one in step.inputs]
    axes: list[list[str]] = [[""] * len(shape) for shape in shapes]
    for pairs in (batched, contracted):
        for ours, theirs in zip(*pairs, strict=True):
            axes[0][ours] = axes[1][theirs] = next(letters)
    shared = [axes[0][axis] for axis in batched[0]]
    summed = {axes[0][axis] for axis in contracted[0]}
    for names in axes:
        names[:] = [name or next(letters) for name in names]
    free = [name for names in axes for name in names if name not in {*shared, *summed}]
    terms = [_in_graph(names, one) for names, one in zip(axes, step.inputs, strict=True)]
    equation = f"{','.join(terms)}->{_in_graph([*shared, *free], None)}"
    names = [
        one.name if isinstance(one, Tensor) else graph.constant(one.value, one.name or "matrix")
        for one in step.inputs
    ]
    return graph.add("Einsum", names, step.shape, step.scope, equation=equation)


def _value_shape(value: Value) -> tuple[Any, ...]:
    return value.shape if isinstance(value, Tensor) else np.shape(value.value)


def _in_graph(axes: Sequence[str], value: Value | None) -> str:
    """Axes in the order that a value of theirs has in the graph: maps have channels second."""
    if len(axes) == 4 and not isinstance(value, Constant):
        return "".join(axes[axis] for axis in JAX_AXES)
    return "".join(axes)


def _argmax(graph: Graph, step: Step) -> Value | None:
    (x,) = step.inputs
    if not isinstance(x, Tensor) or len(x.shape) != 4 or step.equation.params["axes"] != (3,):
        return None
    return graph.add("ArgMax", [x.name], step.shape, step.scope, axis=AXES[3], keepdims=0)


def _cast(graph: Graph, step: Step) -> Value | None:
    (x,) = step.inputs
    if not isinstance(x, Tensor):
        return None
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(step.equation.params["new_dtype"]))
    return graph.add("Cast", [x.name], step.shape, step.scope, to=kind)


def _same(graph: Graph, step: Step) -> Value | None:
    return step.inputs[0]


RULES: dict[str, Rule] = {
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
    "copy": _same,
}


def _one_node(graph: Graph, step: Step, *, op_type: str, **attributes: Any) -> Value | None:
    (x,) = step.inputs
    if not isinstance(x, Tensor) or len(x.shape) != 4:
        return None
    return graph.add(op_type, [x.name], step.shape, step.scope, **attributes)


def _resize(graph: Graph, step: Step) -> Value | None:
    (x,) = step.inputs
    if not isinstance(x, Tensor):
        return None
    if x.shape == step.shape:
        return x
    return graph.add(
        "Resize",
        [x.name, "", "", graph.sides(step.shape, step.scope)],
        step.shape,
        step.scope,
        mode="linear",
        coordinate_transformation_mode="half_pixel",
        axes=[2, 3],
    )


# Primitives that call a trace of their own, and the parameter that holds it.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}

# Functions, of this package and of jax.nn, that are one node; others are walked.
OPERATIONS: dict[str, Rule] = {
    "relu": functools.partial(_one_node, op_type="Relu"),
    "hard_silu": functools.partial(_one_node, op_type="HardSwish"),
    "hard_sigmoid": functools.partial(_one_node, op_type="HardSigmoid", alpha=1 / 6, beta=0.5),
    "max_pool_3x3": functools.partial(
        _one_node, op_type="MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
    ),
    "global_mean": functools.partial(_one_node, op_type="GlobalAveragePool"),
    "bilinear_resize": _resize,
    "softmax": functools.partial(_one_node, op_type="Softmax", axis=AXES[3]),
}
