"""Measures the largest differences between runs on one device and on a mesh of several devices.

"curve" cases take ten steps of a small model on generated shapes, and then compute the confusion
matrix. "gradients" cases compute the gradients of one batch for each kind of backbone, decoder and
loss, with an image height that is not divisible by the number of devices. Differences are relative
to the largest value. Exits with 1 if a difference exceeds its limit.

    python benchmarks/mesh.py                     # simulates 8 devices; ten minutes on two cores
    python benchmarks/mesh.py --json mesh.json    # resumes: measures the cases not in the file
    python benchmarks/mesh.py --json mesh.json --markdown
    JAX_PLATFORMS=cuda python benchmarks/mesh.py  # on this machine's devices; may skip some cases

Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from deeplab_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.models.architecture import architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training.state import TrainState, init_state
from deeplab_jax.training.step import gradients

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import tiny
from random_modules import random_variables

LIMITS = {"float32": 1e-5, "float64": 1e-12}  # for "curve" cases
# For gradients in float64: batch norms over few values amplify rounding; a bug gives 1e-4 or more.
GRADIENTS_LIMIT = 1e-9
STEPS = 10
# Heights that are not divisible by 2, 4 and 8 devices at output stride 16, including the smallest
# one that 8 devices support. Width and number of images are small to save time.
HEIGHTS, WIDTH, BATCH, CLASSES = (113, 130, 145), 17, 2, 5
MESHES = {
    "1 x 1": MeshConfig(data=1),
    "2 x 1": MeshConfig(data=2),
    "4 x 1": MeshConfig(data=4),
    "8 x 1": MeshConfig(data=8),
    "8 x 1, fully sharded": MeshConfig(data=8, fully_sharded=True),
    "4 x 2": MeshConfig(data=4, space=2),
    "4 x 2, fully sharded": MeshConfig(data=4, space=2, fully_sharded=True),
    "2 x 4": MeshConfig(data=2, space=4),
    "1 x 8": MeshConfig(data=1, space=8),
}
PIXELS = LossConfig(class_weights=(1, 2, 3, 1, 0.5), hard_pixel_fraction=0.5)
# Models and losses that together contain every unit, stem, backbone, head, decoder and loss.
VARIANTS: dict[str, tuple[ModelConfig, LossConfig]] = {
    "basic units": (ModelConfig("paper_resnet18"), LossConfig()),
    "bottlenecks, hardest pixels": (ModelConfig("torchvision_resnet50"), PIXELS),
    "stride on conv1, output stride 8": (
        ModelConfig("paper_resnet50", stride_place="conv1", output_stride=8),
        LossConfig("focal"),
    ),
    "pre-activation, deep stem, learned decoder": (
        ModelConfig("paper_resnet18", residual="pre", stem="deep", decoder="transposed"),
        LossConfig("dice"),
    ),
    "MobileNetV3": (ModelConfig("torchvision_mobilenet_v3_large"), LossConfig("lovasz")),
    "MobileNetV2, SAME padding": (ModelConfig("tf_mobilenet_v2"), LossConfig()),
    "cascade, output stride 8": (
        ModelConfig("paper_resnet50", cascade=3, output_stride=8),
        LossConfig(),
    ),
    "DeepLabv3+ decoder": (ModelConfig("torchvision_resnet18", decoder="plus"), LossConfig()),
    "ResNet-D, separable DeepLabv3+, aligned corners": (
        ModelConfig("smpplus_resnet18", stem="deep128", shortcut="avg_pool"),
        LossConfig(),
    ),
}


class Case(NamedTuple):
    """A comparison with one device: the "curve" of a mesh, or the "gradients" of a variant."""

    kind: str
    name: str  # a key of MESHES or VARIANTS
    dtype: str
    height: int = 0  # of the images, for gradients
    space: int = 1  # devices along the height, for gradients

    def __str__(self) -> str:
        rows = f", {self.height} rows over {self.space}" if self.height else ""
        return f"{self.kind}: {self.name}, {self.dtype}{rows}"


def all_cases() -> list[Case]:
    curves = [Case("curve", name, dtype) for dtype in LIMITS for name in list(MESHES)[1:]]
    gradient_cases = [
        Case("gradients", name, "float64", height, space)
        for name in VARIANTS
        for height, space in zip(HEIGHTS, (8, 4, 2), strict=True)
    ]
    return [case for case in curves + gradient_cases if _devices(case) <= jax.device_count()]


def _devices(case: Case) -> int:
    mesh = MESHES[case.name] if case.kind == "curve" else MeshConfig(data=1, space=case.space)
    return mesh.data * mesh.space


def measure(case: Case) -> dict[str, float]:
    """Returns differences by name; for confusion matrices, the number of pixels."""
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    if case.kind == "curve":
        one, many = _curve("1 x 1", case.dtype), _curve(case.name, case.dtype)
    else:
        one, many = (
            _gradients(case.name, case.dtype, case.height, space) for space in (1, case.space)
        )
    found = {name: difference(one[name], many[name]) for name in one if name != "confusion"}
    if "confusion" in one:
        found["confusion"] = float(np.abs(one["confusion"] - many["confusion"]).sum())
    return found


def violations(case: Case, found: dict[str, float]) -> list[str]:
    """Returns a line for each difference that exceeds its limit or is NaN."""
    limit = LIMITS[case.dtype] if case.kind == "curve" else GRADIENTS_LIMIT
    limits = dict.fromkeys(found, limit) | {"confusion": 0}
    if case.dtype == "float32":
        # A rounding error can switch a ReLU on or off, and with it its gradient.
        limits["gradient norm"] = np.inf
    return [
        f"{case}: {name} differs by {value:.1e}"
        for name, value in found.items()
        if not value <= limits[name]
    ]


def difference(one: Any, other: Any) -> float:
    """Returns the largest difference over all arrays, divided by the largest value."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    largest = max(float(np.abs(a).max()) for a, _ in pairs)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs) / largest


@functools.cache
def _curve(name: str, dtype: str) -> dict[str, Any]:
    """Returns the losses of ten steps, the final state, and its confusion matrix."""
    config = tiny.get_config()
    config.mesh = MESHES[name]
    config.model.dtype = dtype
    config.data.crop_size = (HEIGHTS[0], WIDTH)
    config.optimizer.learning_rate = 0.001  # a higher rate would amplify float32 rounding
    config.train.steps = STEPS
    config.data.shapes.num_train = 8
    config.eval.size = HEIGHTS[0]
    run = tiny.Run(config)
    state, history = run.train(STEPS)
    evaluation = Evaluator(run.model, run.dataset, config, run.mesh).evaluate(state.variables)
    assert evaluation is not None
    variables = jax.device_get(mesh_lib.replicate(state.variables, run.mesh))
    return {
        "loss": np.array([metrics["loss"] for metrics in history]),
        "gradient norm": np.array([metrics["grad_norm"] for metrics in history]),
        "parameters": variables.params,
        "running statistics": variables.batch_stats,
        "confusion": evaluation.matrix,
    }


def _gradients(name: str, dtype: str, height: int, space: int) -> dict[str, Any]:
    """Returns the gradients, running statistics and loss of a random batch."""
    fields, loss = VARIANTS[name]
    config = Config(
        model=dataclasses.replace(fields, width=0.125, dropout=0.0, dtype=dtype),
        data=DataConfig(crop_size=(height, WIDTH)),
        loss=loss,
        mesh=MeshConfig(data=1, space=space),
    )
    mesh = mesh_lib.make_mesh(config.mesh)
    overrides = dataclasses.asdict(config.model) | {"num_classes": CLASSES}
    model = FunctionalModel(architecture(overrides.pop("architecture"), **overrides))
    state = mesh_lib.replicate(init_state(config, random_variables(model)), mesh)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES + 1, (BATCH, height, WIDTH)).astype(np.uint8)
    labels[labels == CLASSES] = 255
    images = rng.integers(0, 256, (BATCH, height, WIDTH, 3)).astype(np.uint8)
    batch = mesh_lib.to_global({"image": images, "label": labels}, mesh, BATCH)

    @jax.jit
    def run(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, Any]:
        batch = {name: mesh_lib.unpad_height(x, height, mesh) for name, x in batch.items()}
        grads, statistics, losses = gradients(model, config, state, batch, mesh)
        return {"gradients": grads, "running statistics": statistics, "loss": losses}

    return jax.device_get(run(state, batch))


def read(path: pathlib.Path | None) -> dict[Case, dict[str, float]]:
    if path is None or not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {Case(**row["case"]): row["differences"] for row in rows}


def write(path: pathlib.Path, rows: dict[Case, dict[str, float]]) -> None:
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "limits": LIMITS | {"gradients": GRADIENTS_LIMIT},
        "rows": [{"case": c._asdict(), "differences": found} for c, found in rows.items()],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def markdown(result: dict[str, Any]) -> str:
    """Returns tables of the differences, and the conditions of the measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"Measured on {result['date']}: {result['devices']}, {versions}."]
    for kind in ("curve", "gradients"):
        rows = [row for row in result["rows"] if row["case"]["kind"] == kind]
        names = list(rows[0]["differences"]) if rows else []
        lines += ["", f"| {kind} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for row in rows:
            title = str(Case(**row["case"])).removeprefix(f"{kind}: ")
            lines.append(
                f"| {title} | {' | '.join(_format(row['differences'][n], n) for n in names)} |"
            )
    return "\n".join(lines)


def _format(value: float, name: str) -> str:
    return f"{value:.0f} pixels" if name == "confusion" else f"{value:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables of the file, measure nothing"
    )
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())))
        return 0
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    rows = read(options.json)
    for case in all_cases():
        if case not in rows:
            rows[case] = measure(case)
            if options.json:
                write(options.json, rows)
        spelled = (f"{name} {_format(value, name)}" for name, value in rows[case].items())
        print(f"{case}: {', '.join(spelled)}", flush=True)
    problems = [line for case, found in rows.items() for line in violations(case, found)]
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
