"""Measures the seconds from the start of a training to a stated mIoU; docs/speedrun.md has rules.

    python -m benchmarks.speedrun camvid --root camvid --json record.json
    python -m benchmarks.speedrun camvid --root camvid --track weights --weights resnet18.pth
    python -m benchmarks.speedrun --table      # the table of docs/speedrun.md

Files of --json and --keep are written after each seed.

Each seed trains in a process of its own with a recipe of configs/speedrun.py, in full. The clock
runs from the creation of the process to the end of the first evaluation at or above the target.
Caches of compiled programs are empty at the start of each.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deeplab_jax import config as config_lib
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.config import Config, rules
from deeplab_jax.config import io as config_io
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import require_writable, write_bytes

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "speedrun.json"
_POLL_SECONDS = 0.02  # between looks at the metrics
# Fields that decide what the mIoU is of, and on what a model is trained; others are the recipe.
_PROTOCOL = re.compile(r"config\.(data\.(name|split|eval_split|ignore_label)$|eval\.)")
# The config of a record, for train.py.
_CONFIG = """import pathlib

from deeplab_jax.config.io import from_json


def get_config():
    return from_json(pathlib.Path(__file__).with_name("config.json"))
"""


class Track(NamedTuple):
    row: str  # of configs/speedrun.py
    target: float  # the mIoU to reach
    size: tuple[int, int, int]  # images to train on, images to evaluate on, and classes


TRACKS = {
    ("camvid", "random"): Track("camvid", 0.40, (367, 101, 11)),
    ("camvid", "weights"): Track("camvid_weights", 0.50, (367, 101, 11)),
    ("voc", "random"): Track("voc", 0.30, (10582, 1449, 21)),
    ("voc", "weights"): Track("voc_weights", 0.60, (10582, 1449, 21)),
}


def time_training(
    command: Sequence[str], workdir: pathlib.Path, target: float, **environment: str
) -> dict[str, Any]:
    """Runs a training to its end and times its evaluations, to 0.02 s.

    Args:
      command: the training, which writes `metrics.jsonl` in its workdir.
      workdir: of the training, a new folder; its output goes to `log.txt` there.
      target: mIoU to reach.
      environment: variables of the process, besides those of this one.

    Returns:
      From the creation of the process, `seconds` until the first evaluation at or above the target
      was written (None if there is none) and `total_seconds`; `step` of that evaluation; `steps`
      and `miou` of the last one.

    Raises:
      UserError: the training failed, or wrote no evaluation.
    """
    workdir.mkdir(parents=True)
    log, seconds, reached = workdir / "log.txt", None, []
    with log.open("wb") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment
        )
        try:
            has_ended = False
            while not has_ended:
                has_ended = process.poll() is not None  # looked at first, so that no line is missed
                evaluations = read_evaluations(workdir)
                now = round(time.monotonic() - begun, 2)
                reached = [step for step, miou in evaluations if miou >= target]
                seconds = now if reached and seconds is None else seconds
                time.sleep(_POLL_SECONDS)
        finally:
            process.terminate()
            process.wait()
    if process.returncode or not evaluations:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise UserError(
            f"the training failed (exit code {process.returncode}); {log} ends:\n{last}"
        )
    steps, miou = evaluations[-1]
    step = reached[0] if reached else None
    return {"seconds": seconds, "step": step, "total_seconds": now, "steps": steps, "miou": miou}


def read_evaluations(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """Returns the step and mIoU of each evaluation that a run has written."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line that is being written
            entry = json.loads(line)
            if entry.get("eval/miou") is not None:
                found.append((entry["step"], entry["eval/miou"]))
    return found


def make_records(args: argparse.Namespace, workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Trains with each seed; yields the record of the seeds so far after each, as JSON.

    Raises:
      UserError: a setting is wrong, a workdir is in use, or a training failed.
    """
    track = TRACKS[args.data, args.track]
    row = f"configs/speedrun.py:{track.row}"
    settings = [*args.set, f"data.root={args.root}"]
    if args.weights:
        settings.append(f"init.backbone={args.weights}")
    recipe = config_io.from_python(ROOT / row)
    rules.validate(config_io.override(recipe, settings))
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        folder = workdir / f"seed{seed}"
        if folder.exists():
            raise UserError(f"{folder} exists: remove it, or choose another --workdir")
        command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT / row}"]
        command += [f"--config.{setting}" for setting in (*settings, f"seed={seed}")]
        command += [f"--workdir={folder}"]
        with tempfile.TemporaryDirectory() as caches:
            # The last one is that of kernels which a GPU's driver compiles.
            cold = {"JAX_COMPILATION_CACHE_DIR": caches, "CUDA_CACHE_PATH": caches}
            times = time_training(command, folder, args.target, **({} if args.warm else cold))
        runs.append({"seed": seed} | times)
        print(", ".join(f"{name} {value}" for name, value in runs[-1].items()), flush=True)
        yield _record(args, recipe, runs, folder)


def _record(
    args: argparse.Namespace, recipe: Config, runs: list[dict[str, Any]], folder: pathlib.Path
) -> dict[str, Any]:
    start = json.loads((folder / "receipt.jsonl").open().readline())
    seconds = [run["seconds"] for run in runs]
    return {
        "data": args.data,
        "track": args.track,
        "target": args.target,
        "median_seconds": None if None in seconds else statistics.median(seconds),
        "date": time.strftime("%Y-%m-%d"),
        "device": start["devices"]["kind"],
        "devices": start["devices"]["devices"],
        "cpu_cores": os.cpu_count(),
        "xla_flags": start["devices"]["XLA_FLAGS"],
        "versions": start["versions"],
        "config": f"configs/speedrun.py:{TRACKS[args.data, args.track].row}",
        "settings": args.set,
        "weights": args.weights and pathlib.Path(args.weights).name,
        "seeds": list(runs),
        "kept": args.keep and args.keep.name,
        "deviations": deviations(args, recipe, folder, len(runs)),
    }


def deviations(
    args: argparse.Namespace, recipe: Config, run: pathlib.Path, num_seeds: int
) -> list[str]:
    """Returns why a result is no record, from its flags and from what a run wrote of its data."""
    track = TRACKS[args.data, args.track]
    reasons = {
        f"--target {args.target}, not {track.target}": args.target < track.target,
        f"{num_seeds} seeds, not 3": num_seeds < 3,
        "--warm kept compiled programs": args.warm,
        "metrics and receipts are not kept: give --keep": not args.keep,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    config = json.loads((run / "config.json").read_text())
    different = config_lib.differences(recipe, config)
    found += [f"{name} is not the recipe's" for name in different if _PROTOCOL.match(name)]
    if config["init"]["path"] or bool(config["init"]["backbone"]) != (args.track == "weights"):
        found.append(f"the start is not that of the track {args.track}")
    inputs = json.loads((run / "inputs.json").read_text())
    splits = config["data"]["split"], config["data"]["eval_split"]
    size = [inputs[f"number of images of {split}"] for split in splits]
    size.append(len(inputs[f"classes of {splits[1]}"]))
    if size != (expected := list(track.size)):
        found.append(f"images to train on, to evaluate on, and classes: {size}, not {expected}")
    return found


def keep(workdir: pathlib.Path, seeds: Sequence[int], target: pathlib.Path) -> None:
    """Copies the config, the metrics and the receipts of a record's runs into a folder."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(workdir / f"seed{seeds[0]}" / "config.json", target)
    (target / "config.py").write_text(_CONFIG)
    for seed in seeds:
        run = workdir / f"seed{seed}"
        shutil.copy(run / "metrics.jsonl", target / f"seed{seed}_metrics.jsonl")
        packed = gzip.compress((run / "receipt.jsonl").read_bytes(), mtime=0)
        (target / f"seed{seed}_receipt.jsonl.gz").write_bytes(packed)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the records as a table in Markdown, the fastest of each track first."""
    lines = [
        "| data | track | target mIoU | seconds, median (each seed) | mIoU at the end | steps "
        "| device | date | recipe |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (data, name), track in TRACKS.items():
        runs = [each for each in records if (each["data"], each["track"]) == (data, name)]
        valid = [run for run in runs if not run["deviations"] and run["median_seconds"]]
        about = f"| {data} | {name} | {100 * track.target:.0f} % |"
        for each in sorted(valid, key=lambda record: record["median_seconds"]):
            seconds = ", ".join(f"{run['seconds']:.1f}" for run in each["seeds"])
            mious = ", ".join(f"{100 * run['miou']:.1f}" for run in each["seeds"])
            recipe = " ".join(f"`{x}`" for x in (each["config"], *each["settings"], each["kept"]))
            recipe = recipe.replace("|", "\\|")  # which would end the cell
            lines.append(
                f"{about} {each['median_seconds']:.1f} ({seconds}) | {mious} % "
                f"| {each['seeds'][0]['steps']} | {each['device']} | {each['date']} | {recipe} |"
            )
        if not valid:
            lines.append(f"{about} not measured | | | | | `configs/speedrun.py:{track.row}` |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", nargs="?", choices=("camvid", "voc"))
    add("--table", action="store_true", help="print the table of records and end")
    add("--root", help="folder of the data")
    add("--track", default="random", choices=("random", "weights"))
    add("--weights", help="file of the backbone, for --track weights")
    add("--seeds", type=int, nargs="+", default=(0, 1, 2))
    add("--target", type=float, help="mIoU, 0..1; default: that of the track")
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/speedrun"))
    add("--warm", action="store_true", help="keep caches of compiled programs")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another recipe")
    add("--json", type=pathlib.Path, help="file of records, which gets this one")
    add("--keep", type=pathlib.Path, help="folder for the config, metrics and receipts")
    args = parser.parse_args(arguments)
    if not args.table and not (args.data and args.root):
        parser.error("a data set and --root are needed, or --table")
    if (args.track == "weights") != bool(args.weights):
        parser.error("--weights FILE and --track weights belong together")
    if args.target is None and not args.table:
        args.target = TRACKS[args.data, args.track].target
    if len({*args.seeds}) < len(args.seeds):
        parser.error("--seeds must differ")
    if args.target is not None and not 0 <= args.target <= 1:
        parser.error("--target is a mIoU, from 0 to 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.table:
        print(table(json.loads(RECORDS.read_text())))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the training too
    for option, folder in (("--json", args.json and args.json.parent), ("--keep", args.keep)):
        if folder:
            require_writable(folder, option, create=True)
    workdir = args.workdir / f"{args.data}-{args.track}"
    earlier = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for record in make_records(args, workdir):
        if args.keep:
            keep(workdir, [run["seed"] for run in record["seeds"]], args.keep)
        if args.json:
            write_bytes(args.json, (json.dumps([*earlier, record], indent=1) + "\n").encode())
    print(f"median of the seconds: {record['median_seconds']} (None: a seed missed the target)")
    for deviation in record["deviations"]:
        print(f"no record: {deviation}")
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
