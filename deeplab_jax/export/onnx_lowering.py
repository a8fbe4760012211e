"""Lowers the trace of a program to an ONNX graph.

The trace is that of the evaluated model itself, so that the graph cannot deviate from it. A map is
`[n, h, w, c]` in the trace and `[n, c, h, w]` in the graph. Convolutions, whose kernels are
transposed here, and elementwise operations work in either layout, so that only the ends of the
graph need transposes.

What does not depend on the images, such as a kernel times the scale of its batch norm, is computed
here and stored as an array in the graph.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend import core, source_info_util

from deeplab_jax.export.onnx_graph import Constant, Graph, Tensor
from deeplab_jax.export.onnx_rules import (
    FUNCTION_RULES,
    PRIMITIVE_RULES,
    Step,
    UnsupportedError,
    Value,
)
from deeplab_jax.utils.errors import UserError

# Primitives that call another trace, and the parameter that holds it.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def lower(
    graph: Graph,
    jaxpr: core.Jaxpr,
    constants: Sequence[Any],
    arguments: Sequence[Value],
    source: str = "",
) -> Value:
    """Writes a trace with one result to a graph, and returns that result.

    Args:
      graph: graph to write to.
      jaxpr: the trace.
      constants: arrays that the trace closes over.
      arguments: arguments of the trace.
      source: line of code that calls it.

    Raises:
      UserError: an operation has no rule. The message says where it is.
    """
    values: dict[core.Var, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= zip(jaxpr.constvars, map(Constant, constants), strict=True)
    equations = _compute_constants(jaxpr, _live_equations(jaxpr), values)
    reads = [*jaxpr.invars, *jaxpr.outvars, *(atom for each in equations for atom in each.invars)]
    num_uses = collections.Counter(map(id, reads))
    for equation in equations:
        inputs = [_read(atom, values) for atom in equation.invars]
        single_use = [num_uses[id(atom)] == 1 for atom in equation.invars]
        (result,) = equation.outvars
        # The innermost line outside of JAX; there is none if JAX made the operation by itself.
        line = source_info_util.summarize(equation.source_info) or source
        step = Step(graph, equation, inputs, _shape(result), single_use, _scope(inputs), line)
        values[result] = _lower_step(step)
    return _read(jaxpr.outvars[0], values)


def _lower_step(step: Step) -> Value:
    name = step.equation.primitive.name
    rule = PRIMITIVE_RULES.get(name)
    if name in CALLS:
        rule = FUNCTION_RULES.get(step.params.get("name", ""))
        if rule is None:
            called = step.params[CALLS[name]]
            return lower(step.graph, called.jaxpr, called.consts, step.inputs, step.source)
    try:
        if rule is None:
            raise UnsupportedError
        return rule(step)
    except UnsupportedError:
        raise UserError(
            f"the model cannot be exported to ONNX: there is no rule for {name!r}, in or after "
            f"{step.scope or 'the images'}, at {step.source}. Give --height, --width and --batch "
            "if a symbolic size is the reason, or export to .stablehlo, which takes every model"
        ) from None


def _read(atom: Any, values: dict[core.Var, Value]) -> Value:
    return Constant(np.asarray(atom.val)) if isinstance(atom, core.Literal) else values[atom]


def _live_equations(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Returns the equations that the result depends on, so not those of an auxiliary head."""
    live_vars = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if live_vars.intersection(equation.outvars):
            equations.append(equation)
            live_vars.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return equations[::-1]


def _compute_constants(
    jaxpr: core.Jaxpr, equations: list[core.JaxprEqn], values: dict[core.Var, Value]
) -> list[core.JaxprEqn]:
    """Computes the equations that do not depend on the images, and returns the others.

    Adds the results to `values`, each with the name of the first variable that it depends on.
    """
    known = {var: value for var, value in values.items() if isinstance(value, Constant)}
    names = {var: value.name for var, value in known.items()}
    constant, others = [], []
    for equation in equations:
        read = [atom for atom in equation.invars if isinstance(atom, core.Var)]
        is_symbolic = equation.primitive.name == "dim_as_value" or any(
            map(export.is_symbolic_dim, _shape(equation.outvars[0]))
        )
        if is_symbolic or not names.keys() >= set(read):
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
    """Returns the module of the variables that are read, or of the tensor computed last."""
    constants = [each.scope for each in inputs if isinstance(each, Constant)]
    tensors = sorted(
        (each for each in inputs if isinstance(each, Tensor)), key=lambda each: -each.index
    )
    return next(filter(None, [*constants, *(each.scope for each in tensors)]), "")
