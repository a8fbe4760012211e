"""`deeplab-jax replay`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import is_bucket


def replay(
    run: Annotated[
        str, options.path_argument("Workdir, also in a bucket; its folder stage1: the first stage.")
    ],
    steps: Annotated[
        str,
        typer.Option(
            help="FIRST:LAST, from the state after FIRST steps to that after LAST. Default: from "
            "the newest checkpoint to the end."
        ),
    ] = "",
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Start from the initial state, not a checkpoint.")
    ] = False,
    root: options.Root = "",
    keep_batches: Annotated[
        str, options.path_option("Write the batches to this folder, for bisect elsewhere.")
    ] = "",
    json_file: options.Json = "",
) -> None:
    """Take steps of a run again, and compare them bit for bit with its receipt.

    Batches, losses, gradients and states are compared, and the first difference is named. The exit
    code is 0 if all is equal, else 1. The run is only read.

    Examples:
      deeplab-jax replay runs/voc
      deeplab-jax replay runs/voc --steps 1000:1010
      deeplab-jax replay runs/voc --steps 0:20 --keep-batches batches
    """
    from deeplab_jax.training import replay as replay_lib
    from deeplab_jax.utils.progress import track

    if is_bucket(keep_batches):
        raise UserError(f"--keep-batches must be a folder on this machine, got {keep_batches}")
    outputs.check("--keep-batches", keep_batches, kind="folder")
    console = outputs.console(json_file)
    result = replay_lib.replay(
        run,
        _parse_steps(steps),
        from_start=from_start,
        root=root,
        keep_batches=keep_batches,
        log=lambda text: console.print(text),
        track=lambda steps: track(steps, "replay", len(steps)),
    )
    difference = result.difference
    if difference is None and result.steps:
        lines = [
            f"steps {result.steps[0]} to {result.steps[1]} equal bit for bit: batches, losses and "
            f"gradients; and {result.num_states} states"
        ]
    else:
        lines = [f"DIFFERS: {difference} (run | here)"]
        if result.image:
            lines.append(f"  image {result.image['index']} of the epoch: {result.image['name']}")
        lines += outputs.cause_lines(result.causes)
    console.print(*lines, sep="\n")
    outputs.write_json(json_file, result.to_json())
    if difference:
        raise typer.Exit(1)


def _parse_steps(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if text and not match:
        raise UserError(
            f"--steps must be FIRST:LAST, as 1000:1010 for the steps 1001 to 1010, got {text!r}"
        )
    return (int(match[1]), int(match[2])) if match else None
