"""Lowers the trace of a program to an ONNX graph.

The trace is that of the evaluated model itself, so that the graph cannot deviate from it. A map is
`[n, h, w, c]` in the trace and `[n, c, h, w]` in the graph. Convolutions, whose kernels are
transposed here, and elementwise operations work in either layout, so that only the ends of the
graph need transposes.

What does not depend on the images is computed here and stored as an array in the graph.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import export
from jax.extend import core, source_info_util

from deeplab_jax.export.onnx_graph import Constant, Graph
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

    `source` is the line of code that calls it.

    Raises:
      UserError: an operation has no rule. The message says where it is.
    """
    values: dict[core.Var, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= zip(jaxpr.constvars, map(Constant, constants), strict=True)

    def read(atom: Any) -> Value:
        return Constant(np.asarray(atom.val)) if isinstance(atom, core.Literal) else values[atom]

    equations = _live_equations(jaxpr)
    reads = [*jaxpr.invars, *jaxpr.outvars, *(atom for each in equations for atom in each.invars)]
    num_uses = collections.Counter(map(id, reads))
    for equation in equations:
        inputs = [read(atom) for atom in equation.invars]
        if _is_constant(equation, inputs):
            values |= _compute(jaxpr, equation, inputs)
            continue
        single_use = [num_uses[id(atom)] == 1 for atom in equation.invars]
        # The innermost line outside of JAX; there is none if JAX made the operation by itself.
        line = source_info_util.summarize(equation.source_info) or source
        (result,) = equation.outvars
        values[result] = _lower_step(Step(graph, equation, inputs, single_use, line))
    return read(jaxpr.outvars[0])


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


def _live_equations(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Returns the equations that the result depends on, so not those of an auxiliary head."""
    live_vars = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if live_vars.intersection(equation.outvars):
            equations.append(equation)
            live_vars.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return equations[::-1]


def _is_constant(equation: core.JaxprEqn, inputs: Sequence[Value]) -> bool:
    """Whether the results do not depend on the images, nor on a symbolic size."""
    result: Any = equation.outvars[0].aval
    return (
        equation.primitive.name != "dim_as_value"
        and not any(map(export.is_symbolic_dim, result.shape))
        and all(isinstance(each, Constant) for each in inputs)
    )


def _compute(
    jaxpr: core.Jaxpr, equation: core.JaxprEqn, inputs: Sequence[Any]
) -> dict[core.Var, Value]:
    """Computes constant results, with the name of the first variable that they depend on."""
    name = next((each.name for each in inputs if each.name), "")
    pairs = zip(equation.invars, inputs, strict=True)
    arguments = {atom: each.value for atom, each in pairs if isinstance(atom, core.Var)}
    part = jaxpr.replace(
        constvars=[], invars=[*arguments], outvars=equation.outvars, eqns=[equation]
    )
    arrays = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*arguments.values())
    results = zip(equation.outvars, arrays, strict=True)
    return {var: Constant(np.asarray(array), name) for var, array in results}
