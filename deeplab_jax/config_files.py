"""Configs from files: one under `configs/`, or the `config.json` that a run leaves."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any

from deeplab_jax.config import Config, flatten
from deeplab_jax.errors import UserError


def make_importable(path: str | os.PathLike[str]) -> None:
    """Lets a config file import modules that lie beside it."""
    folder = str(pathlib.Path(path).absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def from_python(path: str | os.PathLike[str]) -> Config:
    """What `get_config()` of a Python file gives; the file is executed.

    Raises:
      UserError: there is no such file, it fails, or it has no `get_config() -> Config`.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"there is no config file {path}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    make_importable(file)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
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

    A text that spells no value of its field's type stays a text, for `config_rules.validate` to
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
        if name not in flatten(config):
            raise UserError(
                f"the config has no field {name!r}{nearest_fields(name, flatten(config))}"
            )
        config = _replaced(config, name.split("."), text)
    return config


def _replaced(branch: Any, path: list[str], text: str) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(branch, path[0]), path[1:], text)
    else:
        try:
            value = _parse(text, typing.get_type_hints(type(branch))[path[0]])
        except (ValueError, KeyError):
            value = text
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
