"""Compares start, prediction, evaluation and input with another commit, in turns.

    make bench-start                                    # against the commit before
    python -m benchmarks.against v0.2 --turns 5 --json against.json

A ratio is the other commit's time divided by this tree's, the median over the turns; above 1 this
tree is faster. CPU time, of all processes together, depends less on what else the machine does.
Both trees use this environment's packages and one small model, which the other commit trains for
two steps. Compiled programs are cached on disk, except in the first start.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_IMAGES = 60
_TRAIN = """
from deeplab_jax.training.train import train
from configs.shapes import get_config
config = get_config()
config.train.steps, config.optimizer.warmup_steps, config.train.eval_every = 2, 0, 0
train(config, {workdir!r})
"""
_INPUT = """
from deeplab_jax import data
from deeplab_jax.data import pipeline
from configs.shapes import get_config
config = get_config().data
config.num_workers, config.crop_size = 1, (513,)
dataset = data.load(config, config.split)
options = dict(batch_size=16, seed=0, start_step=0)
with pipeline.train_batches(dataset, config, **options) as batches:
    for _ in range(20):
        next(batches)
"""


def rows(workdir: pathlib.Path, images: pathlib.Path, out: pathlib.Path) -> dict[str, list[str]]:
    """Returns the command of each row, to be run in a tree."""
    predict = ["-m", "deeplab_jax.cli", "predict", str(workdir), "--out", str(out)]
    one = str(images / "000.jpg")
    return {
        "first start: predict one image": [*predict, one],
        "start: predict one image": [*predict, one],
        f"predict {NUM_IMAGES} images of 375x500": [*predict, str(images)],
        "evaluate": ["-m", "deeplab_jax.cli", "evaluate", str(workdir)],
        "input: 20 batches of 16x513x513, 1 worker": ["-c", _INPUT],
    }


def run(tree: pathlib.Path, command: list[str], cache: pathlib.Path) -> tuple[float, float]:
    """Runs Python in a tree; returns wall-clock and CPU seconds."""
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(command)[:200]}\n{done.stderr}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(other: pathlib.Path, scratch: pathlib.Path, turns: int) -> list[dict[str, Any]]:
    """Runs each row in both trees, in turns."""
    trees = {"theirs": other, "ours": ROOT}
    caches = {name: scratch / f"cache_{name}" for name in trees}
    images, workdir = scratch / "images", scratch / "run"
    images.mkdir()
    for index in range(NUM_IMAGES):
        noise = np.random.default_rng(index).integers(0, 256, (12, 16, 3), np.uint8)
        picture = cv2.resize(noise, (500, 375), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(images / f"{index:03d}.jpg"), picture)
    run(other, ["-c", _TRAIN.format(workdir=str(workdir))], caches["theirs"])
    results = []
    for name, command in rows(workdir, images, scratch / "out").items():
        times: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
        for _ in range(turns):
            for side, tree in trees.items():
                if name.startswith("first"):
                    shutil.rmtree(caches[side], ignore_errors=True)
                times[side].append(run(tree, command, caches[side]))
        wall, cpu = zip(*times["ours"], strict=True)
        their_wall, their_cpu = zip(*times["theirs"], strict=True)
        ratio = statistics.median(b / a for a, b in zip(wall, their_wall, strict=True))
        cpu_ratio = statistics.median(b / a for a, b in zip(cpu, their_cpu, strict=True))
        results.append(
            {
                "name": name,
                "seconds": statistics.median(wall),
                "theirs_seconds": statistics.median(their_wall),
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
            }
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("commit", nargs="?", default="HEAD~1", help="default: the commit before")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="file of results")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        other = scratch / "other"
        other.mkdir()
        git = ["git", "-C", str(ROOT), "archive", args.commit]
        archive = subprocess.run(git, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "x", "-C", str(other)], check=True, input=archive.stdout)
        results = compare(other, scratch, args.turns)
    table = Table("", "this tree, s", f"{args.commit}, s", "ratio", "of CPU time")
    for row in results:
        numbers = (row[name] for name in ("seconds", "theirs_seconds", "ratio", "cpu_ratio"))
        table.add_row(row["name"], *(f"{number:.2f}" for number in numbers))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"commit": args.commit, "rows": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
