"""`deeplab-jax data check`, `deeplab-jax data prepare` and `deeplab-jax data crops`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.cli.data_settings import DataSettings, data_options
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.utils.paths import is_bucket

if TYPE_CHECKING:
    from rich.table import Table

    from deeplab_jax.config import DataConfig
    from deeplab_jax.data.io.masks import MaskFormat
    from deeplab_jax.data_check.check import DataReport
    from deeplab_jax.data_check.findings import Finding
    from deeplab_jax.data_check.scan import Scan

data = typer.Typer(no_args_is_help=True)

Root = Annotated[
    str, options.path_argument("Folder, CSV file or COCO JSON of the images and masks.")
]
Json = Annotated[
    str, options.output_option("Write the report to this file; -: print only JSON.", name="--json")
]
Workers = Annotated[int, typer.Option(help="Number of threads; 0: one per CPU.", min=0)]


@data.callback()
def _commands() -> None:
    """Check your own images and masks, write them as a plain data set, or draw training crops.

    `deeplab-jax data check --help` explains the command and its options.

    Examples:
      deeplab-jax data check my_data
      deeplab-jax data prepare my_data clean_data
      deeplab-jax data crops configs/shapes.py crops.png
    """


@data.command()
@data_options
def check(
    settings: DataSettings,
    root: Root,
    write_classes: Annotated[
        bool,
        typer.Option(
            "--write-classes",
            help="First write a file of classes as the masks suggest, classes.txt in the root or "
            "the file of --classes. One that exists and does not fit is kept as *.orig.",
        ),
    ] = False,
    json_file: Json = "",
    sheet: Annotated[
        str, options.output_option("Draw images with their masks to this file, a PNG.")
    ] = "",
    workers: Workers = 0,
) -> None:
    """Read every image and mask of a data set; report what is wrong and how to fix it.

    The exit code is 1 if there are errors, and 0 if there are only warnings and advice.

    Examples:
      deeplab-jax data check my_data
      deeplab-jax data check my_data --write-classes
      deeplab-jax data check camvid --ignore-label 11 --sheet camvid.png
      deeplab-jax data check pairs.csv --masks-hold colors --classes names.txt --json report.json
    """
    report, scans, mask_format = _check(settings, root, workers, json_file, write_classes)
    outputs.write_json(json_file, report.to_json())
    if sheet and mask_format is not None and any(scan.readable for scan in scans):
        from deeplab_jax.data_check import contact_sheet

        channels = settings.config(root).data.folder.channels
        outputs.write_picture(sheet, contact_sheet.draw(scans, mask_format, channels))
    elif sheet:
        print_warning(f"{sheet} was not drawn: no pair of image and mask could be read")
    if report.errors:
        raise typer.Exit(1)
    outputs.console(json_file).print(f"To train: {settings.train_command(root)}")


@data.command()
@data_options
def prepare(
    settings: DataSettings,
    root: Root,
    out: Annotated[str, options.path_argument("New folder for the data set.")],
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy the images. Default: hard links, else symbolic links."),
    ] = False,
    json_file: Json = "",
    workers: Workers = 0,
) -> None:
    """Check a data set, and write it as images/SPLIT, masks/SPLIT and classes.txt.

    Masks become palette PNGs of 8 bits: the value of a pixel is the id of its class, or 255 if it
    does not count. Nothing is written if the check finds errors.

    Examples:
      deeplab-jax data prepare my_data clean_data
      deeplab-jax data prepare pairs.csv clean_data --masks-hold colors --classes names.txt --copy
    """
    from deeplab_jax.buckets.outputs import local_output
    from deeplab_jax.data_check import prepare

    prepare.require_new_folder(out, root)
    report, scans, mask_format = _check(settings, root, workers, json_file)
    result: dict[str, Any] = {"out": "", "images": {}}
    if mask_format is not None and not report.errors:
        with local_output(out) as (folder, _):
            ways = prepare.write(folder, scans, mask_format, copy=copy, num_threads=workers)
        images = {"copy": ways.total()} if is_bucket(out) else dict(ways)
        result = {"out": out, "images": images}
    outputs.write_json(json_file, report.to_json() | result)
    console = outputs.console(json_file)
    if report.errors:
        console.print(f"{out}: not written, because there are errors")
        raise typer.Exit(1)
    linked = ", ".join(_count(number, way) for way, number in result["images"].items())
    console.print(
        f"{out}: written; images: {linked}; masks: ids in palette PNGs, 255 does not count",
        f"To train: {settings.after_prepare().train_command(out)}",
        sep="\n",
    )


@data.command()
def crops(
    config: options.ConfigFile,
    out: Annotated[str, options.path_argument("File of the picture, a PNG.")],
    settings: options.Settings = None,
    count: Annotated[int, typer.Option(help="Number of crops.", min=1)] = 12,
) -> None:
    """Draw the first training crops of a config, as it augments them, each with its label.

    Examples:
      deeplab-jax data crops configs/shapes.py crops.png --set data.augment.mix=classmix
    """
    from deeplab_jax import data as data_lib
    from deeplab_jax.config import io as config_io
    from deeplab_jax.config import rules
    from deeplab_jax.data import oversampling, pipeline
    from deeplab_jax.visualization import overlays

    outputs.check("OUT", out, ".png")
    values = config_io.override(config_io.from_python(config), settings or ())
    rules.validate(values)
    dataset = data_lib.load(values.data, values.data.split)
    dataset = oversampling.apply(values.data, dataset, quiet=True)
    batch = pipeline.train_batch(dataset, values.data, batch_size=count, seed=values.seed, step=0)
    tiles = []
    for image, label in zip(batch["image"], batch["label"], strict=True):
        pictures = overlays.to_rgb(image), overlays.blend(image, label, dataset.labels)
        tiles += [("", overlays.resized(picture, 200)) for picture in pictures]
    outputs.write_picture(out, overlays.image_grid(tiles, 6, 200))


def _check(
    settings: DataSettings, root: str, workers: int, json_file: str, write_classes: bool = False
) -> tuple[DataReport, list[Scan], MaskFormat | None]:
    """Checks a data set and prints the report; errors end with the commands that mend them."""
    from deeplab_jax import data as data_lib
    from deeplab_jax.data_check.advice import advise
    from deeplab_jax.data_check.check import check

    config = settings.config(root)
    if write_classes and is_bucket(config.data.folder.classes or root):
        raise UserError("--write-classes writes no file in a bucket: add --classes my_classes.txt")
    config.data = data_lib.stage(config.data)
    try:
        if write_classes:
            _write_classes(config.data, workers, json_file)
        report, scans, mask_format = check(config.data, num_threads=workers)
    except UserError as error:
        # The masks were not read yet: they may need a file of classes. One that fits is kept.
        commands = settings.mending_commands(root, str(error), "--write-classes")
        raise UserError("\n".join([str(error), *commands])) from None
    splits = [report.splits[name] for name in ("train", *report.splits) if name in report.splits]
    size = next((split.median_size for split in splits if split.median_size), None)
    advice = tuple(advise(size, report.classes, config))
    report = dataclasses.replace(report, root=root, findings=report.findings + advice)
    _print(report, json_file, settings)
    return report, scans, mask_format


def _write_classes(config: DataConfig, workers: int, json_file: str) -> None:
    """Writes a file of classes and shows it, unless there is one that fits the masks."""
    from deeplab_jax.data.datasets.folder_layout import detect_layout
    from deeplab_jax.data.io import polygons
    from deeplab_jax.data_check import proposal
    from deeplab_jax.data_check.check import check
    from deeplab_jax.data_check.findings import MISREAD

    console = outputs.console(json_file)
    pairs = [pair for split in detect_layout(config).splits.values() for pair in split]
    existing = proposal.existing_file(config) or next(
        (pair.mask for pair in pairs if polygons.is_json(pair.mask)), None
    )
    if existing:
        errors = check(config, num_threads=workers)[0].errors
        if not {error.kind for error in errors} & set(MISREAD):
            console.print(f"{existing}: fits the masks, so nothing is written")
            return
    samples = proposal.survey_all([pair.mask for pair in pairs], workers)
    path, old = proposal.write(config, proposal.propose(config, samples))
    kept = f"; the one that was there is now {old.name}" if old else ""
    console.print(f"{path}: written{kept}", path.read_text(), sep="\n")


def _print(report: DataReport, json_file: str, settings: DataSettings) -> None:
    console = outputs.console(json_file)
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(_split_table(report))
    if report.classes:
        console.print("", _class_table(report), sep="\n")
    for finding in report.findings:
        color = {"error": "red", "warning": "yellow", "advice": "cyan"}[finding.level]
        console.print(f"\n{finding.level}", style=f"bold {color}", end=" ")
        lines = [f"{finding.kind} ({finding.count}): {finding.message}"]
        lines += [f"  - {example}" for example in finding.examples]
        if finding.count > len(finding.examples) > 0:
            lines.append(f"  - and {finding.count - len(finding.examples)} more")
        if finding.mend:
            lines.append(f"  {finding.mend}")
        if finding.level == "error":
            lines += _mending_lines(finding, report, settings)
        console.print(*lines, sep="\n")
    counts = [_count(len(report.errors), "error"), _count(len(report.warnings), "warning")]
    console.print(f"\n{report.root}: {', '.join(counts)}")


def _mending_lines(finding: Finding, report: DataReport, settings: DataSettings) -> list[str]:
    """Returns the lines at the end of an error: the commands that mend it."""
    from deeplab_jax.data_check.findings import ABOUT_CLASSES

    text = "\n".join([finding.message, *finding.examples, finding.mend])
    commands = settings.mending_commands(report.root, text)
    is_proposed = report.proposal and finding.kind in ABOUT_CLASSES
    if not is_proposed or (commands and finding.kind != "classes"):
        return commands
    return [
        "  To write this file of classes, whose names you can then edit:",
        *(f"    {line}" for line in report.proposal.splitlines()),
        settings.check_command(report.root, "--write-classes"),
        *(["  or"] if commands else []),
        *commands,
    ]


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
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number or 'no'} {noun if number == 1 else plural}"
