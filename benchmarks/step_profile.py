"""Profiles a training step on a GPU: milliseconds and bytes of its kernels, by kind.

    python -m benchmarks.step_profile                       # ResNet-101 at output stride 16
    python -m benchmarks.step_profile train --json step.json
    python -m benchmarks.step_profile --options xla_gpu_enable_triton_gemm=true --options ""

Each `--options` is a run of its own: options of XLA, separated by commas. Runs follow each other in
one process, where XLA times the candidates for a convolution only once. The bytes are those of the
operands and results of each kernel in XLA's program; what stays in the GPU's cache counts too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from typing import Any, NamedTuple

import jax

from benchmarks import start
from benchmarks.device_busy import kernel_events
from benchmarks.speed import measure
from deeplab_jax.plan.collectives import array_bytes
from deeplab_jax.utils.files import write_bytes

_WARM_STEPS, _STEPS, _TURNS, _PROFILED = 3, 10, 4, 3
_SCRATCH = re.compile(r"\bs8\[[\d,]*\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
# The first kind whose pattern is in a kernel's name; names of cuDNN and cuBLAS vary by version.
_KINDS = {
    "loss": r"^(forward|backward)_kernel",
    "convolutions": r"implicit_gemm|cudnn|nhwc|nchw",
    "products of matrices": r"nvjet|gemm|splitK",
    "transposes, copies": r"transpose|copy|memcpy|Memset|concatenate",
    "reductions": r"reduce",
    "element-wise": r"",
}


class Kernel(NamedTuple):
    """A kernel's name, and its milliseconds and number in one step."""

    name: str
    ms: float
    count: float


def profile(run: Any) -> list[Kernel]:
    """Returns the kernels of one call of `run`, from JAX's profiler."""
    ms: Counter[str] = Counter()
    count: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tracing = jax.profiler.ProfileOptions()
        tracing.host_tracer_level = tracing.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=tracing):
            for _ in range(_PROFILED):
                metrics = run()
            jax.block_until_ready(metrics)
        for event in kernel_events(pathlib.Path(folder)):
            ms[event.name] += event.duration_ns / 1e6 / _PROFILED
            count[event.name] += 1 / _PROFILED
    return [Kernel(name, ms[name], count[name]) for name in ms]


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in _KINDS.items() if re.search(pattern, kernel))


def by_kind(kernels: list[Kernel]) -> dict[str, dict[str, float]]:
    """Returns milliseconds and number of kernels of each kind in a step, the longest first."""
    ms: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for kernel in kernels:
        ms[kind_of(kernel.name)] += kernel.ms
        count[kind_of(kernel.name)] += kernel.count
    return {
        kind: {"ms": round(ms[kind], 3), "kernels": count[kind]} for kind, _ in ms.most_common()
    }


def moved_bytes(hlo: str) -> int:
    """Returns the bytes of operands and results of the kernels in a compiled program's text.

    Scratch memory (`s8`) does not count, and the bodies of loops count once.
    """
    total, sizes, in_fusion = 0, {}, False
    for line in hlo.splitlines():
        if line.endswith("{") and " -> " in line:
            in_fusion, sizes = line.startswith(("%fused", "%wrapped", "fused", "wrapped")), {}
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, operation, rest = match.groups()
        sizes[name] = _size(shape)
        if not in_fusion and operation in ("fusion", "custom-call", "copy"):
            operands = set(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
    return total


def _size(shape: str) -> int:
    return sum(array_bytes(_SCRATCH.sub("", shape)))


def measure_step(case: str, options: dict[str, Any]) -> dict[str, Any]:
    """Compiles a case of `benchmarks.start` with options of XLA, times and profiles it."""
    on_cpu = jax.default_backend() == "cpu"
    training = start.TrainingStep(case, "bfloat16", batch_size=1 if on_cpu else 16)
    lowered = training.step.lower(*training.arguments)
    begun = time.perf_counter()
    program = lowered.compile(options)
    compiled = time.perf_counter() - begun
    run = training.runner(program)
    for _ in range(_WARM_STEPS):
        metrics = run()
    times = []
    for _ in range(_TURNS):
        jax.block_until_ready(metrics)
        begun = time.perf_counter()
        for _ in range(_STEPS):
            metrics = run()
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - begun) / _STEPS * 1e3)
    kernels = profile(run)
    return {
        "case": case,
        "options": options,
        "compile_s": round(compiled, 1),
        "step_ms": round(statistics.median(times), 2),
        "turns_ms": [round(each, 2) for each in times],
        "kernel_ms": round(sum(kernel.ms for kernel in kernels), 2),
        "gigabytes": round(moved_bytes(program.as_text()) / 1e9, 2),
        "kinds": by_kind(kernels),
        "longest": [
            [kernel.name[:80], round(kernel.ms, 3), kernel.count]
            for kernel in sorted(kernels, key=lambda kernel: -kernel.ms)[:20]
        ],
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['case']} {result['options'] or ''}: {result['step_ms']} ms a step, of which "
        f"{result['kernel_ms']} in kernels; {result['gigabytes']} GB; "
        f"compiled in {result['compile_s']} s"
    ]
    lines += [
        f"  {kind:22} {part['ms']:8.3f} ms in {part['kernels']:6.0f} kernels"
        for kind, part in result["kinds"].items()
    ]
    return "\n".join(lines)


def _options(text: str) -> dict[str, Any]:
    pairs = (pair.partition("=") for pair in text.split(",") if pair)
    return {name: {"true": True, "false": False}.get(value, value) for name, _, value in pairs}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cases = ("train101", "train")
    parser.add_argument("case", nargs="?", choices=cases, default=cases[0])
    parser.add_argument("--options", action="append", metavar="NAME=VALUE,...")
    parser.add_argument("--json", type=pathlib.Path, help="file of results")
    args = parser.parse_args(arguments)
    results = []
    for text in args.options or [""]:
        results.append(measure_step(args.case, _options(text)))
        print(report(results[-1]), flush=True)
        if args.json:
            record = {"conditions": measure.conditions(), "steps": results}
            write_bytes(args.json, (json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
