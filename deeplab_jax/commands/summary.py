"""`deeplab-jax summary`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_WIDTH_IN_A_FILE = 200  # columns of the table where there is no terminal


def summary(
    model: Annotated[
        str,
        typer.Argument(
            help="A config file, an architecture's name, or a workdir, checkpoint or file of "
            "weights.",
        ),
    ],
    size: Annotated[
        str, typer.Option(help="Of the image: 513, or height x width: 360x480. Default: its own.")
    ] = "",
    output_stride: Annotated[
        int | None, typer.Option(help="8, 16 or 32. Default: the model's.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Of a config or a name. Default: the data's, or 21.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables in Markdown.")] = False,
    json_file: Annotated[
        str, typer.Option("--json", help="Write all numbers here; -: to stdout, alone.")
    ] = "",
) -> None:
    """Explain a model: each convolution's stride, atrous rate, field of view, taps and arithmetic.

    Examples:

      deeplab-jax summary configs/voc_os16.py

      deeplab-jax summary torchvision_resnet50 --size 520 --markdown

      deeplab-jax summary runs/voc --output-stride 8 --size 360x480 --json summary.json
    """
    import json
    import pathlib

    from deeplab_jax import descriptions
    from deeplab_jax import summary as summaries
    from deeplab_jax.evaluation.setup import check_output
    from deeplab_jax.files import write_bytes

    if json_file and json_file != "-":
        check_output("--json", json_file, ".json")
    described = descriptions.read(model, num_classes=num_classes)
    height, width = descriptions.parse_size(size) if size else described.size
    architecture = described.architecture
    if output_stride is not None:
        architecture = architecture.at_output_stride(output_stride)
    found = summaries.summarize(architecture, height, width)

    console = Console(stderr=json_file == "-", highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH_IN_A_FILE
    tables = (
        (summaries.COLUMNS, summaries.rows(found)),
        (summaries.PART_COLUMNS, summaries.part_rows(found)),
    )
    for columns, lines in tables:
        text = summaries.markdown(columns, lines)
        console.print(text if markdown else _table(columns, lines), "", sep="\n")
    line = "- {}: {}" if markdown else "{:<20}{}"
    for name, value in summaries.totals(found):
        console.print(line.format(name, value), markup=False)
    text = json.dumps(found.to_json(), indent=2) + "\n"
    if json_file == "-":
        print(text, end="")
    elif json_file:
        write_bytes(pathlib.Path(json_file), text.encode())


def _table(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, title in enumerate(columns):
        table.add_column(title, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table
