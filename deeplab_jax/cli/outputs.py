"""What commands share: words of options, files to be written, JSON, bars, and wide tables."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deeplab_jax.utils.errors import UserError

STDOUT = "-"  # in place of a file for JSON: it is printed, alone
_WIDTH_IN_A_FILE = 200  # columns of a table where there is no terminal


def parse_scales(text: str) -> tuple[float, ...]:
    """Numbers of a text such as "0.5,1,1.5".

    Raises:
      UserError: a part of it is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--scales must be numbers such as 0.5,1,1.5, got {text!r}") from None


def check(option: str, path: str, suffix: str) -> None:
    """Sees that a file can be written, before there is something to be lost.

    Raises:
      UserError: it has another suffix, is a folder, or its folder cannot be written.
    """
    file = pathlib.Path(path).absolute()
    if file.suffix.lower() != suffix:
        raise UserError(f"{option} must be a file that ends in {suffix}, got {path}")
    if file.is_dir():
        raise UserError(f"{option}: {path} is a folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make {file.parent}: {error.strerror}") from None
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{option}: {file.parent} cannot be written to")


def check_json(path: str) -> None:
    """As `check`, for --json; nothing to see where it is empty or `STDOUT`."""
    if path and path != STDOUT:
        check("--json", path, ".json")


def write_json(path: str, value: Any) -> None:
    """Writes what --json asks for: nothing where it is empty."""
    from deeplab_jax.utils.files import write_bytes

    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        print(text, end="")
    elif path:
        write_bytes(pathlib.Path(path), text.encode())


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr where that is a terminal; what is given moves it on by one."""
    errors = Console(stderr=True)
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(
        *columns, console=errors, disable=not errors.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def console(json_path: str) -> Console:
    """Where tables go: to stderr if JSON has stdout for itself."""
    chosen = Console(stderr=json_path == STDOUT, highlight=False, soft_wrap=True)
    if not chosen.is_terminal:
        chosen.width = _WIDTH_IN_A_FILE
    return chosen


def table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    """Lines under their columns, the first of words and the others of numbers."""
    found = Table(box=None, pad_edge=False)
    for place, title in enumerate(columns):
        found.add_column(title, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        found.add_row(*line)
    return found
