"""`deeplab-jax plan`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from deeplab_jax.cli import options, outputs

if TYPE_CHECKING:
    from deeplab_jax.config import Config
    from deeplab_jax.models.architecture import Architecture
    from deeplab_jax.plan.chips import Topology
    from deeplab_jax.plan.plan import Plan

_MAX_IMAGES_PER_CHIP = 1024  # that --find-batch tries


def plan(
    config: options.ConfigFile,
    topology: Annotated[
        str, typer.Option(help="Chip and shape of a slice: v5e:4x4, v6e:16x16, v5p:4x4x4, v4:2x2x1")
    ],
    slices: Annotated[int, typer.Option(help="Slices, joined by the data centre's network.")] = 1,
    settings: options.Settings = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes, if the config does not tell.")
    ] = None,
    find_batch: Annotated[
        bool, typer.Option("--find-batch", help="Find the largest batch: compiles several times.")
    ] = False,
    json_file: options.Json = "",
) -> None:
    """Compile a config's train step for a TPU slice, without a TPU: memory, traffic, speed.

    Uses the real TPU compiler and the same step as train.py. ResNet-101 takes about ten minutes
    on one core. The exit code is 1 if the step does not fit into a chip's memory.

    Examples:
      deeplab-jax plan configs/voc_os16.py --topology v5e:4x4 --set model.dtype=bfloat16
      deeplab-jax plan configs/voc_os16.py --topology v5e:16x16 --set train.batch_size=1024
      deeplab-jax plan configs/voc_os8.py --topology v5e:4x4 --set train.remat=true --find-batch
    """
    from deeplab_jax.analysis import descriptions
    from deeplab_jax.config import io as config_io
    from deeplab_jax.plan import chips, report
    from deeplab_jax.plan.plan import prepare

    prepare()
    target = chips.parse(topology, slices)
    values = config_io.override(config_io.from_python(config), settings or ())
    architecture = descriptions.of_config(values, config, num_classes).architecture
    make = _find_batch if find_batch else _compile
    result = make(values, architecture, target)
    console = outputs.console(json_file)
    rows = outputs.facts(dict(report.summary_rows(result)), 28)
    console.print(*rows, sep="\n")
    if result.collectives:
        console.print(outputs.table(report.COLLECTIVE_COLUMNS, report.collective_rows(result)))
    outputs.write_json(json_file, report.to_json(result))
    if not result.fits:
        raise typer.Exit(1)


def _compile(config: Config, architecture: Architecture, topology: Topology) -> Plan:
    """Makes a plan and reports progress on stderr."""
    from deeplab_jax.plan.plan import make_plan

    console = outputs.console(outputs.STDOUT)  # stderr, because stdout has the results
    title = f"batch {config.train.batch_size} of {architecture.name} for {topology.name}"

    def log(message: str) -> None:
        console.print(f"{title}: {message}")

    with console.status("compiling"):
        result = make_plan(config, architecture, topology, log)
    fits = "fits" if result.fits else "does not fit"
    log(f"{fits}; compiled in {result.compile_seconds:.0f} s")
    return result


def _find_batch(config: Config, architecture: Architecture, topology: Topology) -> Plan:
    """Returns the plan of the largest batch that fits, or of the smallest if none does."""
    from deeplab_jax.plan.plan import batch_multiple, estimate_max_batch, largest

    multiple = batch_multiple(config, topology)
    plans: dict[int, Plan] = {}

    def compiled(count: int) -> Plan:
        if count not in plans:
            train = dataclasses.replace(config.train, batch_size=count * multiple)
            plans[count] = _compile(
                dataclasses.replace(config, train=train), architecture, topology
            )
        return plans[count]

    limit = max(_MAX_IMAGES_PER_CHIP * topology.num_chips // multiple, 1)
    start = min(max(config.train.batch_size // multiple, 1), limit)
    while compiled(start).memory is None and start > 1:  # refused: no memory to estimate from
        start //= 2
    guess = estimate_max_batch(compiled(start)) // multiple
    best = largest(lambda count: compiled(count).fits, guess, limit)
    return compiled(max(best, 1))
