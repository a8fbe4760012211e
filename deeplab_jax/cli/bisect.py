"""`deeplab-jax bisect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deeplab_jax.cli import options, outputs

_RUN = "Workdir, also in a bucket, or its receipt.jsonl."


def bisect(
    run_a: Annotated[str, options.path_argument(_RUN)],
    run_b: Annotated[str, options.path_argument(_RUN)],
    root: options.Root = "",
    batches_a: Annotated[
        str, options.path_option("Folder with batches of RUN_A from replay --keep-batches.")
    ] = "",
    batches_b: Annotated[
        str, options.path_option("Folder with batches of RUN_B from replay --keep-batches.")
    ] = "",
    json_file: options.Json = "",
) -> None:
    """Find the first step at which two runs differ, and what differs first.

    Reads only the receipts: versions, config, data and devices; then, for each step, the batch,
    loss, gradient and state. Where a batch differs, the image is named, and the first pixel if both
    batches can be made again here or were kept. The exit code is 0 if all is equal, else 1.

    Examples:
      deeplab-jax bisect runs/laptop runs/server
      deeplab-jax bisect runs/a/receipt.jsonl runs/b/receipt.jsonl --json difference.json
      deeplab-jax bisect runs/a runs/b --batches-a batches_a --batches-b batches_b
    """
    from deeplab_jax.training import bisect as bisect_lib
    from deeplab_jax.training import receipt

    a, b = (receipt.read(receipt.local_run(run)) for run in (run_a, run_b))
    batches = bisect_lib.Batches(a, root, batches_a), bisect_lib.Batches(b, root, batches_b)
    result = bisect_lib.bisect(a, b, batches)
    lines = [f"A  {run_a}: {a.covered}", f"B  {run_b}: {b.covered}"]
    lines += [f"note: {note}" for note in result.notes]
    lines += ["", "differs at the start, A | B:" if result.changes else "equal at the start"]
    lines += [f"  {change}" for change in result.changes]
    first = result.difference
    if result.steps is None:
        lines += ["", "no common steps to compare"]
    elif first is None:
        lines += ["", f"EQUAL bit for bit: steps {result.steps[0]} to {result.steps[1]}"]
    else:
        lines += ["", f"FIRST DIFFERENCE, A | B: {first}"]
        if result.batch:
            lines += [f"then {result.batch}"] if result.batch != first else []
            lines += _image_lines(result.image)
        lines += outputs.cause_lines(result.causes)
    outputs.console(json_file).print(*lines, sep="\n")
    outputs.write_json(json_file, result.to_json())
    if first or result.steps is None:
        raise typer.Exit(1)


def _image_lines(image: dict[str, Any]) -> list[str]:
    names = dict.fromkeys(
        f"image {one['index']} of the epoch" + (f", {one['name']}" if one["name"] else "")
        for one in image["images"]
    )
    lines = [f"  row {image['row']} is {' | '.join(names)}"]
    if "reason" in image:
        return [*lines, f"  its pixels cannot be compared: {image['reason']}"]
    colors = " | ".join(map(str, image["colors"]))
    labels = " | ".join(map(str, image["labels"]))
    return [
        *lines,
        f"  {image['pixels']:,} of {image['of']:,} pixels differ; the first at x {image['x']}, "
        f"y {image['y']}: {colors}, label {labels}",
    ]
