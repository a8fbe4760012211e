"""Measures where the time until the first result goes: imports, tracing, XLA's parts, first run.

    python -m benchmarks.start                         # all cases, each in a new process
    python -m benchmarks.start forward train --json start.json
    XLA_FLAGS=--xla_gpu_autotune_level=0 python -m benchmarks.start train

Nothing is read from JAX's cache on disk. The parts of XLA come from its own annotations in JAX's
profiler; parts may contain each other and run in several threads, so they do not add up.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

CASES = {
    "forward": "inference, ResNet-50 at output stride 8, 1 image of 520x693",
    "views": "evaluation, ResNet-50 at output stride 16, 16 images of 513x513, 3 scales, mirrored",
    "buckets": "three such programs for other sizes, one after the other and at the same time",
    "train": "training step, ResNet-50 at output stride 8, images of 361x481",
    "train101": "training step, ResNet-101 at output stride 16, images of 513x513",
    "init": "random variables of ResNet-50, on the device and on the host",
}
_SIZES = ((384, 512), (512, 384), (384, 640))  # of the case "buckets"
_MAX_PARTS = 60  # of XLA's parts, the longest ones
_MAX_PRINTED = 16
_LATER_RUNS = 20
_MIN_SECONDS = 0.01


class Phases:
    """Times parts of a start, and what XLA does in them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.xla: dict[str, dict[str, tuple[float, int]]] = {}

    @contextlib.contextmanager
    def measure(self, name: str, *, xla: bool = False) -> Iterator[None]:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            if xla:
                import jax

                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                options.host_tracer_level = 2
                stack.enter_context(jax.profiler.trace(folder, profiler_options=options))
            begun = time.perf_counter()
            yield
            self.seconds[name] = time.perf_counter() - begun
            stack.close()
            if xla:
                self.xla[name] = xla_parts(pathlib.Path(folder))


def xla_parts(folder: pathlib.Path) -> dict[str, tuple[float, int]]:
    """Returns the seconds and number of XLA's annotations on the host, the longest first."""
    import jax

    totals: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for path in folder.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if plane.name.startswith("/host") else ():
                for event in line.events:
                    seconds, number = totals[event.name]
                    totals[event.name] = seconds + event.duration_ns / 1e9, number + 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:_MAX_PARTS]
    return {name: total for name, total in longest if total[0] > _MIN_SECONDS}


def run_case(name: str) -> dict[str, Any]:
    """Measures one case in this process."""
    phases = Phases()
    with phases.measure("import"):
        import jax

        from deeplab_jax.models.functional import FunctionalModel
        from deeplab_jax.training import step as _
    del _
    with phases.measure("device"):
        on_cpu = jax.default_backend() == "cpu"
        jax.block_until_ready(jax.numpy.zeros(1))
    dtype = "float32" if on_cpu else "bfloat16"
    if name in ("train", "train101"):
        _train(name, phases, dtype, on_cpu)
    else:
        from deeplab_jax.models.architecture import architecture

        with phases.measure("model"):
            chosen = architecture("torchvision_resnet50", num_classes=21, dtype=dtype)
            model = FunctionalModel(chosen)
            _ = model.fused
        {"forward": _forward, "views": _views, "buckets": _buckets, "init": _init}[name](
            model, phases
        )
    device = jax.devices()[0].device_kind
    return {"case": name, "device": device, "seconds": phases.seconds, "xla": phases.xla}


def _first_runs(phases: Phases, run: Callable[[], Any]) -> None:
    import jax

    with phases.measure("first run"):
        jax.block_until_ready(run())
    begun = time.perf_counter()
    for _ in range(_LATER_RUNS):
        result = run()
    jax.block_until_ready(result)
    phases.seconds["later run"] = (time.perf_counter() - begun) / _LATER_RUNS


def _jitted(model: Any) -> Any:
    from deeplab_jax.inference.compilation import jit_inference

    return jit_inference(lambda model, *x: model.apply(*x)[0]["out"].argmax(-1), model.fused)


def _images(model: Any, size: tuple[int, int]) -> Any:
    import jax

    return jax.ShapeDtypeStruct((1, *size, 3), model.architecture.dtype)


def _forward(model: Any, phases: Phases) -> None:
    import jax
    import jax.numpy as jnp

    images = _images(model, (520, 693))
    with phases.measure("trace"):
        traced = _jitted(model).trace(model.fused.abstract, images)
    with phases.measure("lower"):
        lowered = traced.lower()
    with phases.measure("compile", xla=True):
        program = lowered.compile()
    arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (model.fused.abstract, images))
    _first_runs(phases, lambda: program(*arguments))


def _views(model: Any, phases: Phases) -> None:
    import jax
    import jax.numpy as jnp

    from deeplab_jax.inference.compilation import jit_inference
    from deeplab_jax.inference.views import predict_ids

    def ids(model: Any, variables: Any, images: Any, sizes: Any) -> Any:
        return predict_ids(model, variables, images, sizes, scales=(0.75, 1.0, 1.25), flip=True)[0]

    model = model.at_output_stride(16).fused
    images = jax.ShapeDtypeStruct((16, 513, 513, 3), jnp.float32)
    shapes = model.abstract, images, jax.ShapeDtypeStruct((16, 2), jnp.int32)
    with phases.measure("trace and lower"):
        lowered = jit_inference(ids, model).lower(*shapes)
    with phases.measure("compile", xla=True):
        program = lowered.compile()
    arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    _first_runs(phases, lambda: program(*arguments))


def _buckets(model: Any, phases: Phases) -> None:
    def compile_all(sizes: list[tuple[int, int]], pool: concurrent.futures.Executor) -> None:
        jitted = _jitted(model)

        def compile_one(size: tuple[int, int]) -> None:
            jitted.lower(model.fused.abstract, _images(model, size)).compile()

        list(pool.map(compile_one, sizes))

    with concurrent.futures.ThreadPoolExecutor(1) as pool, phases.measure("one after the other"):
        compile_all(list(_SIZES), pool)
    # Other sizes, whose programs are as large, so that nothing is in a cache.
    sizes = [(height + 64, width) for height, width in _SIZES]
    with concurrent.futures.ThreadPoolExecutor() as pool, phases.measure("at the same time"):
        compile_all(sizes, pool)


def _init(model: Any, phases: Phases) -> None:
    import jax

    with phases.measure("on the device"):
        jax.block_until_ready(jax.jit(model.init)(jax.random.key(0)))
    host = jax.devices("cpu")[0]
    options = {"xla_backend_optimization_level": 1}
    with phases.measure("on the host"), jax.default_device(host):
        variables = jax.jit(model.init, compiler_options=options)(jax.random.key(0))
        jax.block_until_ready(variables)
    with phases.measure("to the device"):
        jax.block_until_ready(jax.device_put(variables, jax.devices()[0]))


def _train(name: str, phases: Phases, dtype: str, on_cpu: bool) -> None:
    with phases.measure("model"):
        training = TrainingStep(name, dtype, batch_size=2 if on_cpu else 16)
    with phases.measure("trace"):
        traced = training.step.trace(*training.arguments)
    with phases.measure("lower"):
        lowered = traced.lower()
    with phases.measure("compile", xla=True):
        program = lowered.compile()
    _first_runs(phases, training.runner(program))


class TrainingStep:
    """The training step of a case, with random parameters and images.

    Attributes:
      step: the jitted step.
      arguments: shapes of its arguments.
    """

    def __init__(self, name: str, dtype: str, batch_size: int) -> None:
        import jax
        import jax.numpy as jnp

        from benchmarks.speed import ours
        from benchmarks.speed.cases import Case
        from deeplab_jax.config import Config, DataConfig, LossConfig, MeshConfig
        from deeplab_jax.distributed import mesh as mesh_lib
        from deeplab_jax.training.state import abstract_state
        from deeplab_jax.training.step import make_train_step

        size, backbone, stride = {
            "train": ((361, 481), "resnet50", 8),
            "train101": ((513, 513), "resnet101", 16),
        }[name]
        model = ours.model_of(Case("train", backbone, stride, batch_size, *size, dtype))
        config = Config(
            data=DataConfig(crop_size=size), loss=LossConfig(aux_weight=0.5), mesh=MeshConfig(1)
        )
        mesh = mesh_lib.make_mesh(config.mesh)
        sharding = mesh_lib.image_sharding(mesh)
        self.step: Any = make_train_step(model, config, mesh)
        shapes = {"image": (batch_size, *size, 3), "label": (batch_size, *size)}
        batch = {
            key: jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)
            for key, shape in shapes.items()
        }
        self.arguments = (abstract_state(config, model, mesh), batch)

    def runner(self, program: Any) -> Callable[[], Any]:
        """Returns a function that starts a step of a compiled program."""
        import jax
        import numpy as np

        rng = np.random.default_rng(0)

        def draw(x: Any) -> Any:
            if np.issubdtype(x.dtype, np.integer):
                values = rng.integers(0, 21, x.shape)
            else:  # scales and variances are near 1
                values = 0.02 * rng.standard_normal(x.shape, np.float32) + (x.ndim == 1)
            return jax.device_put(np.asarray(values, x.dtype), x.sharding)

        state, batch = jax.tree.map(draw, self.arguments)
        kept = [state]

        def run() -> Any:
            kept[0], metrics = program(kept[0], batch)
            return metrics

        return run


def report(result: dict[str, Any]) -> str:
    """Formats the result of a case as text."""
    lines = [f"{CASES[result['case']]}; {result['device']}"]
    lines += [f"  {name:24} {seconds:8.3f} s" for name, seconds in result["seconds"].items()]
    for phase, parts in result["xla"].items():
        lines += [f"  XLA's parts of {phase}:"]
        lines += [
            f"    {s:7.2f} s {number:6} x {name[:80]}"
            for name, (s, number) in [*parts.items()][:_MAX_PRINTED]
        ]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"    {name:10} {text}" for name, text in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start",
        description=f"{__doc__}\ncases:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[], metavar="CASE")
    parser.add_argument("--json", type=pathlib.Path, help="file of results")
    parser.add_argument(
        "--here", action="store_true", help="one case, in this process; prints JSON"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.here:
        print(json.dumps(run_case(args.cases[0])))
        return 0
    results = []
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    for case in args.cases or CASES:
        command = [sys.executable, "-m", "benchmarks.start", case, "--here"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(report(results[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
