"""`deeplab-jax summary`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError

if TYPE_CHECKING:
    from deeplab_jax.analysis.descriptions import Description
    from deeplab_jax.analysis.receptive_field import EffectiveField


def summary(
    model: Annotated[
        str,
        options.path_argument(
            "Config file, name of a config or architecture, workdir, checkpoint or weights file."
        ),
    ],
    size: Annotated[
        str, typer.Option(help="Image size: 513, or height x width: 360x480. Default: the model's.")
    ] = "",
    output_stride: options.OutputStride = None,
    num_classes: Annotated[
        int | None, typer.Option(help="For a config or a name. Default: the data's, or 21.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables in Markdown.")] = False,
    json_file: options.Json = "",
    plot: Annotated[
        str, options.figure_option("Draw valid taps by rate, and its blocks, here")
    ] = "",
    receptive_field: Annotated[
        str, options.figure_option("Draw the effective receptive field, which takes a while, here")
    ] = "",
    samples: Annotated[
        int, typer.Option(min=1, help="Random images to average the receptive field over.")
    ] = 4,
) -> None:
    """Explain a model: each convolution's stride, atrous rate, field of view, taps and arithmetic.

    The model may be untrained: a config file or the name of an architecture is enough.

    Examples:
      deeplab-jax summary configs/voc_os16.py
      deeplab-jax summary torchvision_resnet50 --size 520 --markdown
      deeplab-jax summary runs/voc --output-stride 8 --size 360x480 --json summary.json
      deeplab-jax summary runs/voc --plot blocks.png --receptive-field field.png
    """
    from deeplab_jax.analysis import descriptions
    from deeplab_jax.analysis.summary import (
        COLUMNS,
        PART_COLUMNS,
        markdown_table,
        part_rows,
        rows,
        summarize,
        totals,
    )

    if plot and plot == receptive_field:
        raise UserError(f"--plot and --receptive-field are the same file, {plot}")
    description = descriptions.read(model, num_classes=num_classes)
    height, width = descriptions.parse_size(size) if size else description.size
    if output_stride is not None:
        architecture = description.architecture.at_output_stride(output_stride)
        description = dataclasses.replace(description, architecture=architecture)
    result = summarize(description.architecture, height, width)

    console = outputs.console(json_file)
    for columns, lines in (
        (tuple(COLUMNS), rows(result)),
        (PART_COLUMNS, part_rows(result)),
    ):
        table = markdown_table(columns, lines) if markdown else outputs.table(columns, lines)
        console.print(table, "", sep="\n")
    line = "- {}: {}" if markdown else "{:<20}{}"
    for name, value in totals(result):
        console.print(line.format(name, value))
    if plot:
        from deeplab_jax.analysis.plots import model_figure

        outputs.save_figure(plot, model_figure(result))
    if receptive_field:
        from deeplab_jax.analysis.plots import field_facts, field_figure

        fields = _effective_fields(description, height, width, samples)
        for name, field in fields:
            words = f"{name}: {', '.join(field_facts(field)[:2])}"
            console.print(line.format("receptive field", words))
        weights = "random weights" if description.saved is None else "trained weights"
        about = f"{description.architecture.name}, {weights}, {height}x{width}"
        figure = field_figure(fields, f"Effective receptive field of {about}")
        outputs.save_figure(receptive_field, figure)
    outputs.write_json(json_file, result.to_json())


def _effective_fields(
    description: Description, height: int, width: int, samples: int
) -> list[tuple[str, EffectiveField]]:
    """Computes the effective receptive field of each variant of the model."""
    import jax

    from deeplab_jax.analysis.receptive_field import effective_field, variants
    from deeplab_jax.inference.compilation import use_compilation_cache
    from deeplab_jax.models.functional import FunctionalModel

    use_compilation_cache()
    architecture, saved = description.architecture, description.saved
    if saved is None:
        model = FunctionalModel(dataclasses.replace(architecture, dtype="float32"))
        variables = jax.jit(model.init)(jax.random.key(0))
    else:
        variables = jax.device_put(saved.variables)
    chosen, size = variants(architecture), (height, width)
    with outputs.progress_bar("receptive field", len(chosen) * samples) as advance:
        return [
            (name, effective_field(variant, variables, *size, samples=samples, progress=advance))
            for name, variant in chosen
        ]
