"""`deeplab-jax data check`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.config import Config
from deeplab_jax.utils.errors import print_warning

if TYPE_CHECKING:
    from rich.table import Table

    from deeplab_jax.data.io.masks import MaskFormat
    from deeplab_jax.data_check.check import DataReport
    from deeplab_jax.data_check.scan import Scan

data = typer.Typer(no_args_is_help=True)


@data.callback()
def _commands() -> None:
    """Check your own images and masks before a training.

    `deeplab-jax data check --help` explains the command and its options.

    Examples:
      deeplab-jax data check my_data
    """


@data.command()
def check(
    root: Annotated[
        str,
        typer.Argument(
            help="Folder, or CSV file, of the images and masks.", callback=options.expand_path
        ),
    ],
    config: Annotated[
        str,
        typer.Option(
            help="Config file whose data settings to use, as configs/folder.py.",
            callback=options.expand_path,
        ),
    ] = "",
    classes: Annotated[
        str,
        typer.Option(
            help="File of class names. Default: classes.txt in the root.",
            callback=options.expand_path,
        ),
    ] = "",
    masks_hold: Annotated[
        str, typer.Option(help="Pixel values of masks: ids, colors or binary. Default: ids.")
    ] = "",
    ignore_label: Annotated[
        int | None, typer.Option(help="Id of the pixels that do not count. Default: 255.")
    ] = None,
    mask_name: Annotated[
        str,
        typer.Option(
            help="File name of a mask without its suffix, such as {name}_mask; {name} stands for "
            "that of its image. Default: {name}."
        ),
    ] = "",
    channels: Annotated[
        int | None, typer.Option(help="Channels of the images. Default: 3.")
    ] = None,
    json_file: options.Json = "",
    sheet: Annotated[
        str,
        typer.Option(
            help="Draw images with their masks to this file, a PNG.", callback=options.expand_path
        ),
    ] = "",
    workers: Annotated[int, typer.Option(help="Number of threads; 0: one per CPU.", min=0)] = 0,
) -> None:
    """Read every image and mask of a data set; report what is wrong and how to fix it.

    The exit code is 1 if there are errors, and 0 if there are only warnings.

    Examples:
      deeplab-jax data check my_data
      deeplab-jax data check camvid --ignore-label 11 --sheet camvid.png
      deeplab-jax data check pairs.csv --masks-hold colors --classes names.txt --json report.json
    """
    from deeplab_jax.config.io import from_python, with_fields
    from deeplab_jax.config.rules import validate
    from deeplab_jax.data_check.check import check

    for option, path in (("--json", json_file), ("--sheet", sheet)):
        if path not in ("", outputs.STDOUT):
            outputs.check(option, path)
    values = {
        "data.folder.classes": classes or None,
        "data.folder.masks_hold": masks_hold or None,
        "data.folder.mask_name": mask_name or None,
        "data.folder.channels": channels,
        "data.ignore_label": ignore_label,
    }
    fields: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if channels is not None:  # a check does not normalize, so any mean and std will do
        fields |= {"data.mean": (0.5,) * channels, "data.std": (0.5,) * channels}
    base = from_python(config) if config else Config()
    changed = with_fields(base, {"data.name": "folder", "data.root": root} | fields)
    validate(changed)
    settings = changed.data
    report, scans, mask_format = check(settings, num_threads=workers)
    _print(report, json_file)
    outputs.write_json(json_file, report.to_json())
    if sheet:
        _draw(sheet, scans, mask_format, settings.folder.channels)
    if report.errors:
        raise typer.Exit(1)


def _print(report: DataReport, json_file: str) -> None:
    console = outputs.console(json_file)
    console.print(_split_table(report))
    if report.classes:
        console.print("", _class_table(report), sep="\n")
    for finding in report.findings:
        color = {"error": "red", "warning": "yellow"}[finding.level]
        console.print(f"\n[bold {color}]{finding.level}[/]", end=" ")
        lines = [f"{finding.kind} ({finding.count}): {finding.message}"]
        lines += [f"  - {example}" for example in finding.examples]
        if finding.count > len(finding.examples) > 0:
            lines.append(f"  - and {finding.count - len(finding.examples)} more")
        if finding.mend:
            lines.append(f"  {finding.mend}")
        console.print(*lines, sep="\n", markup=False)
    counts = [_count(len(report.errors), "error"), _count(len(report.warnings), "warning")]
    console.print(f"\n{report.root}: {', '.join(counts)}", markup=False)


def _split_table(report: DataReport) -> Table:
    columns = ("split", "images", "smallest", "median", "largest", "sizes", "ignored", "unknown")
    rows = []
    for name, split in report.splits.items():
        sizes = (split.min_size, split.median_size, split.max_size)
        spelled = (f"{size[0]} x {size[1]}" if size else "-" for size in sizes)
        fractions = f"{split.ignored_share:.2%}", f"{split.unknown_share:.2%}"
        rows.append((name, str(split.images), *spelled, str(split.distinct_sizes), *fractions))
    return outputs.table(columns, rows)


def _class_table(report: DataReport) -> Table:
    columns, rows = ["id", "class"], [[str(one.id), one.name] for one in report.classes]
    for split in report.classes[0].pixels:  # splits without pairs have no counts
        columns += [f"{split} pixels", "images"]
        for row, one in zip(rows, report.classes, strict=True):
            row += [f"{one.share[split]:.3%}", str(one.images[split])]
    rows += [["?", f"{name}: {pixels} pixels"] for name, pixels in report.unknown.items()]
    return outputs.table(columns, rows, num_text_columns=2)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _draw(
    path: str, scans: Sequence[Scan], mask_format: MaskFormat | None, num_channels: int
) -> None:
    from deeplab_jax.data_check import contact_sheet
    from deeplab_jax.utils.files import write_png

    if mask_format is None or not any(scan.readable for scan in scans):
        print_warning(f"{path} was not drawn: no pair of image and mask could be read")
        return
    picture = contact_sheet.draw(scans, mask_format, num_channels)
    write_png(pathlib.Path(path), picture)
