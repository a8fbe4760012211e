"""The command `python -m benchmarks.speed`."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deeplab_jax.cli import outputs


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the two most informative cases.")
    ] = False,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this text.")] = "",
    turns: Annotated[
        int, typer.Option(min=1, help="Runs of each package, per mode of torchvision.")
    ] = 5,
    modes: Annotated[
        str, typer.Option(help="Only torchvision modes whose name contains this.")
    ] = "",
    alone: Annotated[bool, typer.Option("--alone", help="Do not run torchvision.")] = False,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", help="File to write the results to.")
    ] = None,
    plot: Annotated[
        str, typer.Option(help="Draw the times as bars to this file (.png, .svg or .pdf).")
    ] = "",
    recorded: Annotated[
        pathlib.Path | None,
        typer.Option(help="Print the table of a file that --json wrote, measure nothing."),
    ] = None,
) -> None:
    """Measure forward passes and training steps, compared with torchvision if it is installed.

    Both packages run alternately in one process; torchvision runs in its best mode of
    channels_last, torch.compile and autocast. A ratio above 1 means that this package is faster.

    Examples:

      python -m benchmarks.speed --quick

      python -m benchmarks.speed --only train --json bench.json

      python -m benchmarks.speed --recorded bench.json --plot bench.png
    """
    from deeplab_jax.utils.errors import UserError
    from deeplab_jax.visualization import plots

    from .figure import speed_figure

    if plot:
        outputs.check("--plot", plot, *plots.SUFFIXES)
    if recorded is not None:
        result = _read(recorded)
    else:
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UserError(f"--json {json_file}: its folder does not exist")
        result = _measure(quick, only, turns, None if alone else modes, json_file)
    # Wide enough for the table, also without a terminal.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table(result))
    if plot:
        plots.save(pathlib.Path(plot), speed_figure(result))


def _read(file: pathlib.Path) -> dict[str, Any]:
    import json

    from deeplab_jax.utils.errors import UserError

    try:
        result = json.loads(file.read_text())
        dict(result["rows"][0]["theirs_by_mode"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--recorded {file}: not a file of benchmarks.speed results: {error}"
        ) from error
    return dict(result)


def _measure(
    quick: bool, only: str, turns: int, modes: str | None, json_file: pathlib.Path | None
) -> dict[str, Any]:
    """Measures the cases in order; writes the results so far after each of them."""
    import dataclasses
    import json

    import jax

    from deeplab_jax.utils.errors import UserError
    from deeplab_jax.utils.files import write_bytes

    from . import measure
    from .cases import cases

    log = Console(stderr=True, highlight=False, soft_wrap=True)
    platform = jax.default_backend()
    known = cases(platform, quick=quick)
    chosen = [case for case in known if only in case.name]
    if not chosen:
        names = "\n".join(f"  {case.name}" for case in known)
        raise UserError(f"no case contains {only!r}; cases:\n{names}")
    peaks: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    result = measure.conditions() | {
        "platform": platform,
        "matmul_flops_per_second": peaks,
        "rows": rows,
    }
    for case in chosen:
        if case.dtype not in peaks:
            peaks[case.dtype] = measure.matmul_peak(case.dtype)
        row = measure.measure(case, peaks[case.dtype], turns=turns, modes=modes, log=log.print)
        rows.append(dataclasses.asdict(row))
        if json_file is not None:
            write_bytes(json_file, (json.dumps(result, indent=1) + "\n").encode())
    return result


def table(result: dict[str, Any]) -> Table:
    grid = Table(
        *("case", "ours, s", "theirs, s", "ratio", "spread", "of peak", "GiB", "compiling, s"),
        title=f"{result['device']}: medians; ratio above 1: ours is faster; pairs: ours, theirs",
        box=None,
        pad_edge=False,
    )
    for row in result["rows"]:
        low, high = row["ratio_low"], row["ratio_high"]
        memory = (_format(row[f"{side}_bytes"], "{:.1f}", 2**30) for side in ("ours", "theirs"))
        compiling = (
            _format(row[f"{side}_compile_seconds"], "{:.0f}") for side in ("ours", "theirs")
        )
        grid.add_row(
            row["name"],
            f"{row['ours_seconds']:.4f}",
            _format(row["theirs_seconds"], "{:.4f}"),
            _format(row["ratio"], "{:.2f}"),
            "-" if low is None else f"{low:.2f} to {high:.2f}",
            f"{row['share_of_peak']:.0%}",
            ", ".join(memory),
            ", ".join(compiling),
        )
        for mode, seconds in row["theirs_by_mode"].items():
            grid.add_row(f"  theirs: {mode}", "", f"{seconds:.4f}")
    return grid


def _format(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else form.format(value / unit)


def main() -> None:
    """Runs the command; a user error prints a message and exits with code 2."""
    from deeplab_jax.cli.errors import exit_on_user_error

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(bench)
    with exit_on_user_error():
        app()
