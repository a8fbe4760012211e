"""Output of the commands: consoles, tables, progress bars, JSON and other files."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text

from deeplab_jax.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8
    from matplotlib.figure import Figure

STDOUT = "-"  # the path that makes --json print to standard output
_FILE_WIDTH = 200  # columns of a table that is not printed to a terminal


def check(
    option: str, path: str, *suffixes: str, kind: Literal["file", "folder", "new"] = "file"
) -> None:
    """Checks that a result can be written before the work starts; see `buckets.outputs.check`.

    Nothing is checked if the path is empty, or is `STDOUT` for --json. Without suffixes, any will
    do.
    """
    from deeplab_jax.buckets import outputs

    if not path or (option, path) == ("--json", STDOUT):
        return
    if suffixes and pathlib.Path(path).suffix.lower() not in suffixes:
        raise UserError(f"{option} must be a file that ends in {' or '.join(suffixes)}, got {path}")
    subject = option if kind == "folder" else f"{option}: {path}"
    outputs.check(path, subject, kind=kind)


def write_json(path: str, value: Any) -> None:
    """Writes JSON to the path of --json; does nothing if the path is empty."""
    from deeplab_jax.buckets.outputs import local_output, shown
    from deeplab_jax.utils.files import write_bytes

    text = shown(json.dumps(value, indent=2, allow_nan=False)) + "\n"
    if path == STDOUT:
        print(text, end="")
    elif path:
        with local_output(path) as (file, _):
            write_bytes(file, text.encode())


def write_picture(path: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a PNG to the path of an option."""
    from deeplab_jax.buckets.outputs import local_output
    from deeplab_jax.utils.files import write_png

    with local_output(path) as (file, _):
        write_png(file, picture)


def save_figure(path: str, figure: Figure) -> None:
    """Writes a figure to the path of an option, which has one of `plots.SUFFIXES`."""
    from deeplab_jax.buckets.outputs import local_output
    from deeplab_jax.visualization import plots

    with local_output(path) as (file, _):
        plots.save(file, figure)


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a progress bar if stderr is a terminal; yields a function that advances it by one."""
    stderr = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=stderr, disable=not stderr.is_terminal, transient=True
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def facts(rows: Mapping[str, object], width: int = 24) -> list[str]:
    """Returns a line for each fact, whose value begins at column `width`."""
    return [f"{name:<{width}}{value}" for name, value in rows.items()]


def cause_lines(causes: Sequence[str]) -> list[str]:
    """Returns the lines that name the likely causes of a difference."""
    if not causes:
        return [
            "likely cause: nothing that a receipt records: files of the data or weights, the "
            "hardware, or a program that does not always give the same bits (docs/receipts.md)"
        ]
    return ["likely cause:", *(f"  {cause}" for cause in causes)]


def console(json_path: str = "") -> Console:
    """Returns the console for tables: stdout, or stderr if --json prints to stdout."""
    is_json = json_path == STDOUT
    chosen = Console(stderr=is_json, markup=False, highlight=False, soft_wrap=True)
    if not chosen.is_terminal:
        chosen.width = _FILE_WIDTH
    return chosen


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, num_text_columns: int = 1
) -> Table:
    """Returns a table whose first columns are text, and the others numbers."""
    result = Table(box=None, pad_edge=False)
    for index, title in enumerate(columns):
        is_text = index < num_text_columns
        result.add_column(title, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in rows:
        result.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return result
