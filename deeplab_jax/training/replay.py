"""Takes steps of a run again, from a checkpoint or the start, and compares them bit for bit."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from deeplab_jax import config as config_lib
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.training import bisect, receipt, train
from deeplab_jax.training.bisect import Batches, Comparison, Difference
from deeplab_jax.training.checkpoint import read_state
from deeplab_jax.training.receipt import (
    Receipt,
    batch_digester,
    digest_state,
    line_of,
    named_arrays,
)
from deeplab_jax.training.state import abstract_state, shardings_of
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.saved_model import step_folders


def choose_window(
    covered: Receipt, checkpoints: Sequence[int], steps: tuple[int, int] | None, *, from_start: bool
) -> tuple[int, int, int]:
    """Returns the step to start from, 0 for the initial state, and the first and last state.

    Args:
      covered: the receipt.
      checkpoints: steps of the checkpoints, in order.
      steps: first and last state; None: from the newest checkpoint with recorded steps after it.
      from_start: start from the initial state, not from a checkpoint.

    Raises:
      UserError: the receipt does not cover the steps, or no checkpoint leads to them.
    """
    known = covered.steps_with("batch")
    if not known:
        raise UserError(f"{covered.path} covers no steps: the run was stopped in its first one")
    newest = known[-1]
    kept = f"the checkpoints are at {', '.join(map(str, checkpoints)) or 'no steps'}"
    if steps is None:
        usable = [0] if from_start else [each for each in checkpoints if each < newest]
        if not usable:
            raise UserError(
                f"{covered.path} covers {covered.covered}, and {kept}: none comes before the last "
                "step. With --from-start, all steps are taken again"
            )
        steps = usable[-1], newest
    first, last = steps
    is_covered = all("batch" in covered.steps.get(step, ()) for step in range(first + 1, last + 1))
    if not 0 <= first < last or not is_covered:
        raise UserError(
            f"--steps {first}:{last} must be two of the steps that {covered.path} covers, or 0 and "
            f"one of them: {covered.covered}, where 7:9 are steps 8 and 9"
        )
    usable = [0] if from_start or not first else [each for each in checkpoints if each <= first]
    if not usable:
        raise UserError(
            f"no checkpoint at or before step {first}: {kept}. Choose later steps, or take all "
            f"{last} steps from the initial state with --from-start"
        )
    return usable[-1], first, last


def replay(
    run: str | os.PathLike[str],
    steps: tuple[int, int] | None = None,
    *,
    from_start: bool = False,
    root: str = "",
    keep_batches: str | os.PathLike[str] = "",
    log: Callable[[str], None] = print,
    track: Callable[[range], Iterable[int]] = iter,
) -> Comparison:
    """Takes steps of a run again and compares them with its receipt; stops where they differ.

    Writes nothing into the run. All of it must fit on the devices of this process.

    Args:
      run: a workdir, also in a bucket; of two stages, its folder `stage1` for the first.
      steps, from_start: see `choose_window`.
      root: where the data are now; empty: where they were.
      keep_batches: existing folder that gets the batches, as `batch_STEP.npz`; empty: none.
      log: prints a line.
      track: shows the progress of steps.

    Raises:
      UserError: the run, its receipt or its checkpoint cannot be read; or as `choose_window` and
        `train.load_parts`.
    """
    folder = receipt.local_run(run)
    recorded = receipt.read(folder)
    folder = recorded.path.parent.absolute()
    checkpoints = [int(each.name) for each in step_folders(folder / "checkpoints")]
    begin, first, last = choose_window(recorded, checkpoints, steps, from_start=from_start)
    for note in recorded.notes:
        log(note)
    start = recorded.start_of(first + 1)
    config = bisect.config_of(start, root)
    if config.init.path and (folder / config.init.path).is_dir():  # the first of two stages
        config.init.path = str(folder / config.init.path)
    parts = train.load_parts(config, lambda inputs: None, quiet=True)
    _, model, train_set, _, mesh, *_ = parts
    facts = receipt.start_facts(parts, begin)
    # Those of the config are where the run and its data are now.
    changes = [each for each in bisect.compare_starts(start, facts) if each.kind != "config"]
    for change in changes:
        log(f"differs, run | here: {change}")
    program = train.compile_step(config, model, mesh)
    abstract = abstract_state(config, model, mesh)
    if begin:
        receipt.local_run(run, begin)  # of a bucket, now with the arrays
        log(f"from checkpoint {begin}")
        state = read_state(folder / "checkpoints" / str(begin), abstract)
    else:
        log("from the initial state")
        state = train.first_state(config, model, shardings_of(abstract), log)
    digest = batch_digester(config_lib.crop_shape(config.data)[0], mesh)
    here = Receipt(recorded.path)
    here.add(facts | {"arrays": list(named_arrays(state))})

    def find_difference(step: int, values: dict[str, Any]) -> Difference | None:
        there = recorded.steps.get(step, {})
        if "state" in there:
            values |= {"state": digest_state(state, mesh)}
        if not values:
            return None
        here.add(line_of(step, jax.device_get(values)))
        return bisect.compare(step, there, here.steps[step])

    step, difference = begin, find_difference(begin, {})
    window = () if difference else track(range(begin + 1, last + 1))
    with train.train_batches(config, train_set, mesh, begin) as batches:
        for step in window:
            batch = next(batches)
            if keep_batches and step > first:
                np.savez_compressed(pathlib.Path(keep_batches) / bisect.batch_name(step), **batch)
            arrays = mesh_lib.to_global(batch, mesh, config.train.batch_size)
            digests = digest(arrays)
            state, metrics = program.result()(state, arrays)
            difference = find_difference(step, {"batch": digests} | metrics)
            if difference:
                break
    result = Comparison(changes, (begin + 1, step), len(here.steps_with("state")), difference)
    if difference:
        result.causes = bisect.likely_causes(difference, changes)
    if difference and difference.what == "batch":
        result.batch = difference
        result.image = Batches(recorded, root).image(step, difference.where[0])
    return result
