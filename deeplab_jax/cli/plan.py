"""`deeplab-jax plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deeplab_jax.cli import outputs

if TYPE_CHECKING:
    from deeplab_jax.config import Config
    from deeplab_jax.models.architecture import Architecture
    from deeplab_jax.plan.chips import Topology
    from deeplab_jax.plan.plan import Plan

_MOST_IMAGES_A_CHIP = 1024  # that --find-batch asks for


def plan(
    config: Annotated[str, typer.Argument(help="A config file, as train.py takes.")],
    topology: Annotated[
        str, typer.Option(help="Chip and shape of a slice: v5e:4x4, v6e:16x16, v5p:4x4x4, v4:2x2x1")
    ],
    slices: Annotated[int, typer.Option(help="Slices, joined by the data centre's network.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE of the config, as train.batch_size=64; repeatable"),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Where neither config nor files of classes tell.")
    ] = None,
    find_batch: Annotated[
        bool, typer.Option("--find-batch", help="The largest batch that fits: compiles repeatedly.")
    ] = False,
    json_file: Annotated[
        str, typer.Option("--json", help="Write all numbers here; -: to stdout, alone.")
    ] = "",
) -> None:
    """Compile the train step of a config for a TPU slice, without a TPU: memory, traffic, speed.

    The real TPU compiler does it, for the very step that train.py would run there: about ten
    minutes of a core for ResNet-101. Exit code 1 if the step does not fit into a chip's memory.

    Examples:

      deeplab-jax plan configs/voc_os16.py --topology v5e:4x4 --set model.dtype=bfloat16

      deeplab-jax plan configs/voc_os16.py --topology v5e:16x16 --set train.batch_size=1024

      deeplab-jax plan configs/voc_os8.py --topology v5e:4x4 --set train.remat=true --find-batch
    """
    from deeplab_jax.analysis import descriptions
    from deeplab_jax.config import io as config_files
    from deeplab_jax.plan import chips, report
    from deeplab_jax.plan import plan as planning

    planning.prepare()
    outputs.check_json(json_file)
    wanted = chips.parse(topology, slices)
    chosen = config_files.override(config_files.from_python(config), settings or ())
    architecture = descriptions.of_config(chosen, config, num_classes).architecture
    found = (
        _find_batch(chosen, architecture, wanted)
        if find_batch
        else _compile(chosen, architecture, wanted)
    )
    console = outputs.console(json_file)
    for name, value in report.facts(found):
        console.print(f"{name:<28}{value}", markup=False)
    if found.collectives:
        console.print(outputs.table(report.COLUMNS, report.rows(found)))
    outputs.write_json(json_file, report.to_json(found))
    if not found.fits:
        raise typer.Exit(1)


def _compile(config: Config, architecture: Architecture, topology: Topology) -> Plan:
    """A plan, while stderr says what goes on."""
    from deeplab_jax.plan.plan import make_plan

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    what = f"batch {config.train.batch_size} of {architecture.name} for {topology.name}"

    def log(message: str) -> None:
        console.print(f"{what}: {message}", markup=False)

    with console.status("compiling"):
        found = make_plan(config, architecture, topology, log)
    fits = "fits" if found.fits else "does not fit"
    log(f"{fits}; compiled in {found.compile_seconds:.0f} s")
    return found


def _find_batch(config: Config, architecture: Architecture, topology: Topology) -> Plan:
    """The plan of the largest batch that fits, or of the smallest if none does."""
    import dataclasses

    from deeplab_jax.plan.plan import batch_unit, guess_units
    from deeplab_jax.plan.search import largest

    unit = batch_unit(config, topology)
    plans: dict[int, Plan] = {}

    def compiled(units: int) -> Plan:
        if units not in plans:
            train = dataclasses.replace(config.train, batch_size=units * unit)
            plans[units] = _compile(
                dataclasses.replace(config, train=train), architecture, topology
            )
        return plans[units]

    limit = max(_MOST_IMAGES_A_CHIP * topology.chips // unit, 1)
    start = min(max(config.train.batch_size // unit, 1), limit)
    while compiled(start).memory is None and start > 1:  # refused, so nothing to guess from
        start //= 2
    guess = guess_units(compiled(start), start)
    best = largest(lambda units: compiled(units).fits, guess, limit)
    return compiled(max(best, 1))
