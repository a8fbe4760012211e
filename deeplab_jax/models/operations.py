"""What exporters ask of the models: sizes that are left open, and layers as one operation each."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax

# Of a map, pixels: an int, or where a program is traced for any size an expression of jax.export.
Size = Any
Function = TypeVar("Function", bound=Callable[..., jax.Array])

_named: contextvars.ContextVar[bool] = contextvars.ContextVar("named", default=False)


@contextlib.contextmanager
def naming_operations() -> Iterator[None]:
    """What is traced within shows each `operation` as a call with its name."""
    token = _named.set(True)
    try:
        yield
    finally:
        _named.reset(token)


def operation(function: Function) -> Function:
    """Marks a function of an array, and of what is fixed while it is traced.

    Within `naming_operations` its trace is a `jit` of its name; otherwise it is as it was.
    """

    @functools.wraps(function)
    def wrapped(x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if not _named.get():
            return function(x, *args, **kwargs)

        @functools.wraps(function)
        def one_operation(x: jax.Array) -> jax.Array:
            return function(x, *args, **kwargs)

        return jax.jit(one_operation)(x)

    return cast(Function, wrapped)
