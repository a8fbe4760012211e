"""`deeplab-jax bench`."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="The two most telling cases.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name holds this text.")] = "",
    turns: Annotated[int, typer.Option(min=1, help="Of each side, for each of their modes.")] = 5,
    modes: Annotated[str, typer.Option(help="Only their modes whose name holds this text.")] = "",
    alone: Annotated[bool, typer.Option("--alone", help="Do not run torchvision.")] = False,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Write the results there.")
    ] = None,
) -> None:
    """Measure forward passes and training steps here, against torchvision where it is installed.

    Both run in turns in one process, and theirs in its best mode: channels_last, torch.compile,
    autocast. A ratio above 1 means that this package is faster.

    Examples:

      deeplab-jax bench --quick

      deeplab-jax bench --only train --json bench.json
    """
    import dataclasses
    import json

    import jax

    from deeplab_jax.benchmark import measure
    from deeplab_jax.benchmark.cases import cases
    from deeplab_jax.errors import UserError
    from deeplab_jax.files import write_bytes

    # Wide enough for the table, also where there is no terminal.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    platform = jax.default_backend()
    known = cases(platform, quick=quick)
    chosen = [case for case in known if only in case.name]
    if not chosen:
        names = "\n".join(f"  {case.name}" for case in known)
        raise UserError(f"no case holds {only!r}; they are:\n{names}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: its folder does not exist")
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
        row = measure.measure(
            case, peaks[case.dtype], turns=turns, modes=None if alone else modes, log=log.print
        )
        rows.append(dataclasses.asdict(row))
        if json_file is not None:
            write_bytes(json_file, (json.dumps(result, indent=1) + "\n").encode())
    console.print(table(result))


def table(result: dict[str, Any]) -> Table:
    grid = Table(
        *("case", "ours, s", "theirs, s", "ratio", "spread", "of peak", "GiB", "compiling, s"),
        title=f"{result['device']}: medians; ratio above 1: ours is faster; pairs: ours, theirs",
        box=None,
        pad_edge=False,
    )
    for row in result["rows"]:
        low, high = row["ratio_low"], row["ratio_high"]
        memory = (_spell(row[f"{side}_bytes"], "{:.1f}", 2**30) for side in ("ours", "theirs"))
        compiling = (
            _spell(row[f"{side}_compile_seconds"], "{:.0f}") for side in ("ours", "theirs")
        )
        grid.add_row(
            row["name"],
            f"{row['ours_seconds']:.4f}",
            _spell(row["theirs_seconds"], "{:.4f}"),
            _spell(row["ratio"], "{:.2f}"),
            "-" if low is None else f"{low:.2f} to {high:.2f}",
            f"{row['share_of_peak']:.0%}",
            ", ".join(memory),
            ", ".join(compiling),
        )
        for mode, seconds in row["theirs_by_mode"].items():
            grid.add_row(f"  theirs: {mode}", "", f"{seconds:.4f}")
    return grid


def _spell(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else form.format(value / unit)
