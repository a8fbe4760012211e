"""`deeplab-jax summary`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deeplab_jax.cli import outputs

if TYPE_CHECKING:
    import numpy as np

    from deeplab_jax.analysis.descriptions import Description


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
        int | None, typer.Option(help="8, 16 or 32; more with a cascade. Default: the model's.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Of a config or a name. Default: the data's, or 21.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables in Markdown.")] = False,
    json_file: Annotated[
        str, typer.Option("--json", help="Write all numbers here; -: to stdout, alone.")
    ] = "",
    plot: Annotated[
        str, typer.Option(help="Draw its blocks, and valid taps against the rate, here (.png).")
    ] = "",
    receptive_field: Annotated[
        str, typer.Option(help="Draw what the logits really depend on here (.png); computes.")
    ] = "",
    samples: Annotated[
        int, typer.Option(min=1, help="Random images of which the receptive field is the mean.")
    ] = 4,
) -> None:
    """Explain a model: each convolution's stride, atrous rate, field of view, taps and arithmetic.

    Examples:

      deeplab-jax summary configs/voc_os16.py

      deeplab-jax summary torchvision_resnet50 --size 520 --markdown

      deeplab-jax summary runs/voc --output-stride 8 --size 360x480 --json summary.json

      deeplab-jax summary runs/voc --plot blocks.png --receptive-field field.png
    """
    import pathlib

    from deeplab_jax.analysis import descriptions
    from deeplab_jax.analysis import summary as summaries
    from deeplab_jax.utils.files import write_png

    outputs.check_json(json_file)
    for option, file in (("--plot", plot), ("--receptive-field", receptive_field)):
        if file:
            outputs.check(option, file, ".png")
    described = descriptions.read(model, num_classes=num_classes)
    height, width = descriptions.parse_size(size) if size else described.size
    architecture = described.architecture
    if output_stride is not None:
        architecture = architecture.at_output_stride(output_stride)
    found = summaries.summarize(architecture, height, width)

    console = outputs.console(json_file)
    tables = (
        (summaries.COLUMNS, summaries.rows(found)),
        (summaries.PART_COLUMNS, summaries.part_rows(found)),
    )
    for columns, lines in tables:
        text = summaries.markdown(columns, lines)
        console.print(text if markdown else outputs.table(columns, lines), "", sep="\n")
    line = "- {}: {}" if markdown else "{:<20}{}"
    for name, value in summaries.totals(found):
        console.print(line.format(name, value), markup=False)
    if plot:
        from deeplab_jax.analysis.plots import model_figure

        write_png(pathlib.Path(plot), model_figure(found))
    if receptive_field:
        described = dataclasses.replace(described, architecture=architecture)
        picture, facts = _fields(described, height, width, samples)
        for name, fact in facts:
            console.print(line.format("receptive field", f"{name}: {fact}"), markup=False)
        write_png(pathlib.Path(receptive_field), picture)
    outputs.write_json(json_file, found.to_json())


def _fields(
    description: Description, height: int, width: int, samples: int
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The picture of effective receptive fields, and a line about each."""
    import jax
    from rich.progress import Progress

    from deeplab_jax.analysis import field_plots as field_figure
    from deeplab_jax.analysis.receptive_field import effective_field, variants
    from deeplab_jax.inference.compile import use_compilation_cache
    from deeplab_jax.models.functional import FunctionalModel

    use_compilation_cache()
    architecture, saved = description.architecture, description.saved
    if saved is None:
        model = FunctionalModel(dataclasses.replace(architecture, dtype="float32"))
        variables = jax.jit(model.init)(jax.random.key(0))
    else:
        variables = jax.device_put(saved.variables)
    chosen, fields = variants(architecture), []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("receptive field", total=len(chosen) * samples)
        for name, variant in chosen:
            field = effective_field(
                variant,
                variables,
                height,
                width,
                samples=samples,
                progress=lambda: bar.advance(task),
            )
            fields.append((name, field))
    weights = "trained weights" if saved is not None else "random weights"
    title = f"Effective receptive field of {architecture.name}, {weights}, {height}x{width}"
    lines = [(name, field_figure.facts(field)[0]) for name, field in fields]
    return field_figure.field_figure(fields, title), lines
