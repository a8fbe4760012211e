"""Registries of the backbones, heads, losses and data sets that a config can name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from deeplab_jax.utils.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dictionary of entries by name, to which modules outside the package add with `register`.

    `registry[name]` raises UserError for an unknown name and suggests the nearest one.
    """

    def __init__(self, kind: str, entries: Mapping[str, T | str] | None = None) -> None:
        """Creates a registry.

        Args:
          kind: what error messages call an entry, such as "backbone".
          entries: the package's own. A text such as "package.module:function" is imported at the
            first access.
        """
        super().__init__(cast("Mapping[str, T]", entries or {}))
        self.kind = kind

    def __getitem__(self, name: str) -> T:
        entry = resolved(super().__getitem__(name))
        self[name] = entry
        return entry

    def __missing__(self, name: str) -> T:
        raise UserError(
            f"unknown {self.kind} {name!r}{did_you_mean(name, self)}. "
            f"Known: {', '.join(sorted(self))}. A {self.kind} of your own must be registered by a "
            "module that the config, or --import MODULE, imports"
        )

    def register(self, name: str, entry: T) -> T:
        """Adds an entry and returns it; raises ValueError if another one has the name."""
        if not name:
            raise ValueError(f"a {self.kind} needs a name")
        if name in self and not _same(self[name], entry):
            raise ValueError(
                f"the {self.kind} {name!r} is registered already, by {module_of(self[name])}"
            )
        self[name] = entry
        return entry


def resolved(entry: Any) -> Any:
    """Returns an entry, imported if it is a string such as "package.module:function"."""
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


def module_of(entry: Any) -> str:
    """Returns the name of the module that defines an entry."""
    return getattr(entry, "__module__", type(entry).__module__)


def _same(entry: Any, other: Any) -> bool:
    """Whether two entries are one: a file may run twice, as a config and by an import."""
    names = [getattr(each, "__qualname__", None) for each in (entry, other)]
    return entry is other or (names[0] is not None and names[0] == names[1])
