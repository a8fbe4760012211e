"""Reads configs from Python files, from the `config.json` of a run, and from FIELD=VALUE texts."""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import importlib.util
import inspect
import json
import operator
import os
import pathlib
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from deeplab_jax.config.rules import union_types
from deeplab_jax.config.schema import Config, flatten
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.paths import is_bucket, required_path

T = TypeVar("T")

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def is_config_file(text: str) -> bool:
    """Returns whether a text has the form "file.py" or "file.py:row"."""
    return re.fullmatch(r".+\.py(:.*)?", text, re.S) is not None


def is_config(text: str) -> bool:
    """Returns whether a text is a config file, or the name of a config of this package."""
    return is_config_file(text) or text.partition(":")[0] in _package_configs()


def _package_configs() -> dict[str, pathlib.Path]:
    return {path.stem: path for path in sorted(CONFIGS.glob("*.py"))}


def _find_config(text: str) -> tuple[pathlib.Path, str]:
    """Returns the file and the row of a config."""
    name, _, row = text.partition(".py:" if is_config_file(text) else ":")
    if is_config_file(text):
        return pathlib.Path(f"{name.removesuffix('.py')}.py"), row
    files = _package_configs()
    if name not in files:
        raise UserError(
            f"there is no config {name!r}{did_you_mean(name, files)}: give a file that ends in "
            f".py, or one of {', '.join(files)}"
        )
    return files[name], row


def get_row(rows: Mapping[str, T], name: str, file: str) -> T:
    """Returns a row of a config file; raises UserError if `name` is empty or unknown."""
    if name in rows:
        return rows[name]
    if not name:
        first = next(iter(rows))
        raise UserError(f"{file} holds {len(rows)} configs: name one, as in {file}:{first}")
    raise UserError(
        f"{file} has no row {name!r}{did_you_mean(name, rows)}. It has {', '.join(rows)}"
    )


def from_python(path: str | os.PathLike[str]) -> Config:
    """Executes a Python file and returns the result of its `get_config()`.

    The file can import modules from its own folder.

    Args:
      path: "file.py"; or the name of a config of this package, such as "voc_os16". To call
        `get_config("row")`, append ":row" to either.

    Raises:
      UserError: the file is missing or fails, or does not return a `Config` for that row.
    """
    file, row = _find_config(str(required_path(path, "the path of the config")))
    if not file.is_file():
        raise UserError(f"there is no config file {file}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # noqa: PT018 - its name ends in .py
    module = importlib.util.module_from_spec(spec)
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
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
        raise UserError(f"{path}: get_config() must return a Config, got {type(config).__name__}")
    return config


def from_run(path: str | os.PathLike[str]) -> Config | None:
    """Returns the config of the run that a path belongs to, or None.

    Args:
      path: a workdir, its folder checkpoints/, or a checkpoint in that folder; also in a bucket.

    Raises:
      UserError: the `config.json` is damaged or was written by another version.
    """
    if is_bucket(path):
        from deeplab_jax.buckets import staging

        path = staging.stage_model(str(path))
    for folder in (pathlib.Path(path).absolute(), pathlib.Path(path).resolve()):
        for checkpoints in (folder / "checkpoints", folder, folder.parent):
            file = checkpoints.with_name("config.json")
            if checkpoints.name == "checkpoints" and checkpoints.is_dir() and file.is_file():
                return from_json(file)
    return None


def from_json(path: pathlib.Path) -> Config:
    """Reads a file that `to_json` wrote; missing fields have their defaults.

    Raises:
      UserError: the file is not JSON, or has fields that a config does not have.
    """
    try:
        tree = json.loads(path.read_text())
        if not isinstance(tree, dict):
            raise ValueError("it must hold a JSON object")
        values = flatten(tree).items()
        return with_fields(Config(), {n: tuple(v) if isinstance(v, list) else v for n, v in values})
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a config: {error}") from error


def override(config: Config, settings: Iterable[str]) -> Config:
    """Returns a copy of a config with fields set by texts such as "model.multi_grid=1,2,4".

    The last text for a field counts. A text that cannot be parsed as the type of its field stays a
    text, which `config.rules.validate` reports.

    Raises:
      UserError: a text has another form, or names no field.
    """
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"a setting is FIELD=VALUE, as train.batch_size=64; got {setting!r}")
        config = with_fields(config, {name: value}, parse=True)
    return config


def with_fields(config: Config, fields: Mapping[str, Any], *, parse: bool = False) -> Config:
    """Returns a copy of a config with fields set, as in `{"model.multi_grid": (1, 2, 4)}`.

    With `parse` the values are texts, to be parsed as the types of their fields where possible.

    Raises:
      UserError: a field does not exist; the message names the nearest.
    """
    config = copy.deepcopy(config)
    known = flatten(config)
    for name, value in fields.items():
        if name not in known:
            raise UserError(unknown_field(name))
        path, _, field = name.rpartition(".")
        section = operator.attrgetter(path)(config) if path else config
        if parse:
            with contextlib.suppress(ValueError, KeyError):
                value = _parse(value, typing.get_type_hints(type(section))[field])
        setattr(section, field, value)
    return config


_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _parse(text: str, hint: Any) -> Any:
    """Parses a value of a type; raises ValueError or KeyError if the text spells none."""
    if text.lower() == "none" and (hint is object or type(None) in union_types(hint)):
        return None
    hint = union_types(hint)[0]
    if typing.get_origin(hint) is dict:
        pairs = (part.split("=", 1) for part in text.split(",") if part.strip())
        return {name.strip(): _parse_scalar(value.strip()) for name, value in pairs}
    if hint is object:  # `loss.class_weights`: None, "auto" or numbers
        hint = tuple[float, ...]
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        parts = (part.strip().strip("'\"") for part in text.strip("()[] ").split(","))
        return tuple(element(part) for part in parts if part)
    return _BOOLEANS[text.lower()] if hint is bool else hint(text)


def _parse_scalar(text: str) -> Any:
    """Returns the number, truth value or None that a text spells, or else the text."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text.title() if text.isalpha() else text)
    return text


def unknown_field(name: str) -> str:
    """Returns the message for a name that is no field of a config, with the nearest fields."""
    known = flatten(Config())
    message = f"the config has no field {name!r}"
    if within := [field for field in known if field.startswith(f"{name}.")]:
        return f"{message}, which is a section; its fields: {', '.join(within)}"
    by_last_part = {field.rsplit(".", 1)[-1]: field for field in known}
    near = difflib.get_close_matches(name, known, n=2)
    last_parts = difflib.get_close_matches(name.split(".")[-1], by_last_part, n=2)
    near += [by_last_part[part] for part in last_parts]
    return f"{message}; nearest: {', '.join(dict.fromkeys(near))}" if near else message
