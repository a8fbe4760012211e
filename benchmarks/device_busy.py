"""Measures the share of an evaluation during which the device computes, and the images per second.

    python -m benchmarks.device_busy runs/voc --data voc --root VOC_ROOT

The evaluation runs twice; the second time, whose programs are compiled, is measured. The device is
busy while any of its kernels runs, by JAX's profiler; on CPU the profiler shows no device.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.evaluation import setup


def kernel_events(folder: pathlib.Path) -> Iterator[Any]:
    """Yields the events of kernels on the device in a profile of JAX."""
    for path in folder.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if plane.name.startswith("/device") else ():
                if line.name.startswith("Stream"):
                    yield from line.events


def busy_seconds(folder: pathlib.Path) -> float:
    """Returns the seconds in which at least one kernel of a profile ran on the device."""
    spans = [(int(event.start_ns), int(event.end_ns)) for event in kernel_events(folder)]
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e9


def measure(
    checkpoint: str, data: str, settings: dict[str, Any], options: dict[str, str]
) -> dict[str, Any]:
    """Returns the measurements as JSON; `options` are the root and split of the data."""
    _, segmenter, evaluator, _ = setup.prepare(checkpoint, data, settings, **options)
    evaluator.evaluate(segmenter.variables)
    with tempfile.TemporaryDirectory() as folder:
        tracing = jax.profiler.ProfileOptions()
        tracing.host_tracer_level = tracing.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=tracing):
            begun = time.perf_counter()
            evaluation = evaluator.evaluate(segmenter.variables)
            seconds = time.perf_counter() - begun
        busy = busy_seconds(pathlib.Path(folder))
    assert evaluation is not None
    return {
        "device": jax.devices()[0].device_kind,
        "images": evaluation.num_images,
        "seconds": seconds,
        "images_per_second": evaluation.num_images / seconds,
        "busy_share": busy / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_busy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="voc")
    parser.add_argument("--root", default="")
    parser.add_argument("--split", default="val")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--flip", action="store_true")
    args = parser.parse_args()
    settings = {"scales": tuple(args.scales), "flip": args.flip}
    options = {"root": args.root, "split": args.split}
    print(json.dumps(measure(args.checkpoint, args.data, settings, options)))
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
