"""Configs from files: one under `configs/`, or the `config.json` that a run leaves."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from deeplab_jax.config import Config, flatten
from deeplab_jax.utils.errors import UserError, did_you_mean

T = TypeVar("T")


def make_importable(path: str | os.PathLike[str]) -> None:
    """Lets a config file import modules that lie beside it."""
    folder = str(pathlib.Path(path).absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def is_config(text: str) -> bool:
    """Whether a text names a config file, perhaps with a row of it: "x.py" or "x.py:row"."""
    return re.fullmatch(r".+\.py(:.*)?", text, re.S) is not None


def file_and_row(text: str) -> tuple[str, str]:
    """Splits "file.py:row"; the row is empty if there is none."""
    name, colon, row = text.partition(".py:")
    return (f"{name}.py", row) if colon else (text, "")


def row_of(rows: Mapping[str, T], name: str, file: str) -> T:
    """Returns a row of a config file that holds a table of them.

    Raises:
      UserError: there is no such row, with the nearest one; or none is named.
    """
    if name in rows:
        return rows[name]
    if not name:
        first = next(iter(rows))
        raise UserError(f"{file} holds {len(rows)} configs: name one, as in {file}:{first}")
    raise UserError(
        f"{file} has no row {name!r}{did_you_mean(name, rows)}. It has {', '.join(rows)}"
    )


def from_python(path: str | os.PathLike[str]) -> Config:
    """What `get_config()` of a Python file gives; the file is executed.

    Args:
      path: the file, or "file.py:row" for `get_config("row")`.

    Raises:
      UserError: there is no such file, it fails, it has no `get_config() -> Config`, or no rows.
    """
    name, row = file_and_row(os.fspath(path))
    file = pathlib.Path(name)
    if not file.is_file():
        raise UserError(f"there is no config file {file}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    make_importable(file)
    try:
        spec.loader.exec_module(module)
        if row and not inspect.signature(module.get_config).parameters:
            raise UserError(f"{file} holds one config and no rows: leave out :{row}")
        config = module.get_config(row) if row else module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() must give a Config, got {type(config).__name__}")
    return config


def of_run(path: str | os.PathLike[str]) -> Config | None:
    """The config of the run that a path belongs to; None if it belongs to none.

    Args:
      path: a workdir, its folder checkpoints/, or a checkpoint in it.

    Raises:
      UserError: its `config.json` is damaged or of another version.
    """
    folder = pathlib.Path(path).absolute()
    for workdir in (folder, *folder.parents[:2]):
        if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
            return from_json(workdir / "config.json")
    return None


def from_json(path: pathlib.Path) -> Config:
    """Reads what `config.to_json` wrote; fields that it lacks have their defaults.

    Raises:
      UserError: it is no JSON, or holds fields that a config has not.
    """
    try:
        return _from_tree(Config, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a config: {error}") from error


def _from_tree(kind: type, tree: Any, prefix: str = "") -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} must hold named fields")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in tree.items():
        if name not in hints:
            raise ValueError(f"there is no field {prefix}{name}")
        if dataclasses.is_dataclass(hints[name]):
            value = _from_tree(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def override(config: Config, settings: Iterable[str]) -> Config:
    """A config with some fields set, as in `train.batch_size=64` or `model.multi_grid=1,2,4`.

    A text that spells no value of its field's type stays a text, for `config.rules.validate` to
    tell what it must be.

    Args:
      config: stays as it is.
      settings: a dotted field and its value each; the last for a field holds.

    Raises:
      UserError: there is no such field, naming those near it.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"a setting is FIELD=VALUE, as train.batch_size=64; got {setting!r}")
        config = with_fields(config, {name: _Text(text)})
    return config


class _Text(str):
    """A value as it stands on the command line."""


def with_fields(config: Config, fields: Mapping[str, Any]) -> Config:
    """Returns a config with some fields set, as in `{"model.multi_grid": (1, 2, 4)}`.

    Raises:
      UserError: there is no such field, naming those near it.
    """
    for name, value in fields.items():
        if name not in flatten(config):
            raise UserError(
                f"the config has no field {name!r}{nearest_fields(name, flatten(config))}"
            )
        config = _with_field(config, name.split("."), value)
    return config


def _with_field(branch: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _with_field(getattr(branch, path[0]), path[1:], value)
    elif isinstance(value, _Text):
        try:
            value = _parse(str(value), typing.get_type_hints(type(branch))[path[0]])
        except (ValueError, KeyError):
            value = str(value)
    return dataclasses.replace(branch, **{path[0]: value})


def _parse(text: str, expected: Any) -> Any:
    """The value that a text spells; ValueError or KeyError if it is none of the type."""
    origin, options = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        chosen = next(option for option in options if option is not type(None))
        return None if text.lower() == "none" else _parse(text, chosen)
    if origin is tuple:
        return tuple(_parse(part, options[0]) for part in text.strip("()").split(",") if part)
    if expected is bool:
        return {"true": True, "false": False}[text.lower()]
    if expected is object:  # `loss.class_weights`: None, a word or numbers
        return None if text.lower() == "none" else _parse(text, tuple[float, ...])
    return expected(text)


def nearest_fields(name: str, known: Iterable[str]) -> str:
    """A hint at what is near a misspelt field, by its whole name or by its last part."""
    last = {field.rsplit(".", 1)[-1]: field for field in known}
    near = difflib.get_close_matches(name, list(known), n=2)
    near += [last[part] for part in difflib.get_close_matches(name.split(".")[-1], last, n=2)]
    return f"; nearest: {', '.join(dict.fromkeys(near))}" if near else ""
