"""`deeplab-jax data check`."""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from deeplab_jax.config import DataConfig
    from deeplab_jax.data_check.check import Checked, Report

data = typer.Typer(no_args_is_help=True, help="Look at your own images and masks.")


@data.callback()
def _commands() -> None:
    """Look at your own images and masks."""


@data.command()
def check(
    root: Annotated[str, typer.Argument(help="Folder, or CSV file, of images and masks.")],
    config: Annotated[
        str, typer.Option(help="Take the settings from a file as configs/x.py.")
    ] = "",
    classes: Annotated[str, typer.Option(help="File of class names, if not classes.txt.")] = "",
    masks_hold: Annotated[str, typer.Option(help="ids, colors or binary.")] = "",
    ignore_label: Annotated[
        int | None, typer.Option(help="Id of the pixels that do not count.")
    ] = None,
    mask_name: Annotated[
        str, typer.Option(help="A mask's name, as {name}_mask; {name} is its image's.")
    ] = "",
    channels: Annotated[int | None, typer.Option(help="Of the images.")] = None,
    json: Annotated[str, typer.Option(help="Write all that was found to this file.")] = "",
    sheet: Annotated[str, typer.Option(help="Draw masks over images into this PNG.")] = "",
    workers: Annotated[int, typer.Option(help="Threads; 0: one a CPU.", min=0)] = 0,
) -> None:
    """Read every image and mask of a data set; tell what is wrong and how to mend it.

    Exits with 1 if there are errors, with 0 if there are warnings alone.

    Examples:

      deeplab-jax data check my_data

      deeplab-jax data check camvid --ignore-label 11 --sheet camvid.png

      deeplab-jax data check pairs.csv --masks-hold colors --classes classes.txt --json report.json
    """
    from deeplab_jax.data_check.check import check

    for path in (json, sheet):
        _require_writable(path)
    settings = _settings(root, config, classes, masks_hold, ignore_label, mask_name, channels)
    checked = check(settings, workers=workers)
    _print(checked.report)
    if json:
        _write_json(json, checked.report)
    if sheet:
        _draw(sheet, checked, settings.folder.channels)
    if checked.report.errors:
        raise typer.Exit(1)


def _settings(
    root: str,
    config: str,
    classes: str,
    masks_hold: str,
    ignore_label: int | None,
    mask_name: str,
    channels: int | None,
) -> DataConfig:
    """The config's settings of data, with what the command line says laid over them."""
    from deeplab_jax import config as config_lib
    from deeplab_jax.config import io as config_files
    from deeplab_jax.config import rules as config_rules

    whole = config_files.from_python(config) if config else config_lib.Config()
    settings = whole.data
    settings.name, settings.root = "folder", root
    settings.folder.classes = classes or settings.folder.classes
    settings.folder.masks_hold = masks_hold or settings.folder.masks_hold
    settings.folder.mask_name = mask_name or settings.folder.mask_name
    if ignore_label is not None:
        settings.ignore_label = ignore_label
    if channels is not None:  # mean and std matter to a training alone
        settings.folder.channels = channels
        settings.mean = settings.std = (0.5,) * channels
    config_rules.validate(whole)
    return settings


def _require_writable(path: str) -> None:
    """Tells of a missing folder before all files are read, not after."""
    from deeplab_jax.utils.errors import UserError

    if path and not pathlib.Path(path).absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {pathlib.Path(path).parent}")


def _print(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(_splits(report))
    if report.classes:
        console.print()
        console.print(_classes(report))
    for finding in report.findings:
        color = {"error": "red", "warning": "yellow"}[finding.level]
        console.print()
        console.print(f"[bold {color}]{finding.level}[/]", end=" ")
        console.print(f"{finding.kind} ({finding.count}): {finding.message}", markup=False)
        for example in finding.examples:
            console.print(f"  - {example}", markup=False)
        if finding.count > len(finding.examples) > 0:
            console.print(f"  - and {finding.count - len(finding.examples)} more")
        if finding.mend:
            console.print(f"  {finding.mend}", markup=False)
    console.print()
    counts = [_count(len(report.errors), "error"), _count(len(report.warnings), "warning")]
    console.print(f"{report.root}: {', '.join(counts)}", markup=False)


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _splits(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for title in ("images", "smallest", "median", "largest", "sizes", "ignored", "unknown"):
        table.add_column(title, justify="right")
    for name, split in report.splits.items():
        sizes = (split.min_size, split.median_size, split.max_size)
        table.add_row(
            name,
            str(split.images),
            *(f"{size[0]} x {size[1]}" if size else "-" for size in sizes),
            str(split.distinct_sizes),
            f"{split.ignored_share:.2%}",
            f"{split.unknown_share:.2%}",
        )
    return table


def _classes(report: Report) -> Table:
    splits = list(report.classes[0].pixels)
    table = Table(box=None, pad_edge=False)
    table.add_column("id", justify="right")
    table.add_column("class")
    for split in splits:
        table.add_column(f"{split} pixels", justify="right")
        table.add_column("images", justify="right")
    for one in report.classes:
        cells = [
            cell for split in splits for cell in (f"{one.share[split]:.3%}", str(one.images[split]))
        ]
        table.add_row(str(one.id), one.name, *cells)
    for name, pixels in report.unknown.items():
        table.add_row("?", f"{name}: {pixels} pixels")
    return table


def _write_json(path: str, report: Report) -> None:
    import json

    from deeplab_jax.utils.files import write_bytes

    write_bytes(pathlib.Path(path), (json.dumps(report.to_json(), indent=2) + "\n").encode())


def _draw(path: str, checked: Checked, num_channels: int) -> None:
    from deeplab_jax.data_check import contact_sheet
    from deeplab_jax.utils.files import write_png

    if checked.mask_format is None or not any(scan.readable for scan in checked.scans):
        print(f"{path} was not drawn: no pair could be read", file=sys.stderr)
        return
    picture = contact_sheet.draw(checked.scans, checked.mask_format, num_channels)
    write_png(pathlib.Path(path), picture)
