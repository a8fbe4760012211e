"""Largest differences between runs on one device and the same runs on a mesh of several.

Curves are ten steps of a small model on generated shapes, with the confusion matrix at the end.
Gradients are of one batch through each kind of backbone, decoder and loss, with the height of the
images divided over devices that do not divide it. Differences are relative to the largest value.
Exit code 1: a limit is broken.

    python benchmarks/mesh.py                     # ten minutes on two cores: eight devices, faked
    python benchmarks/mesh.py --json mesh.json  # resumes: adds what the file lacks
    python benchmarks/mesh.py --json mesh.json --markdown
    JAX_PLATFORMS=cuda python benchmarks/mesh.py  # on the machine's own devices; some cases drop

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
from deeplab_jax.training.optimizer import make_optimizer, poly_schedule
from deeplab_jax.training.state import TrainState, start_state
from deeplab_jax.training.step import gradients

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import tiny
from random_modules import random_variables

LIMITS = {"float32": 1e-5, "float64": 1e-12}  # of curves
# Of gradients in float64: batch norms over few values amplify rounding; a fault is 1e-4 and more.
GRADIENTS_LIMIT = 1e-9
STEPS = 10
# Heights at output stride 16 that 2, 4 and 8 devices do not divide, the least that 8 devices take
# among them; of a width and a number of images that cost little.
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
# What is built, with a loss: each kind of unit, stem, backbone, head, decoder and loss is in one.
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
    "cascade, output stride 8": (
        ModelConfig("paper_resnet50", cascade=3, output_stride=8),
        LossConfig(),
    ),
    "DeepLabv3+ decoder": (ModelConfig("torchvision_resnet18", decoder="plus"), LossConfig()),
}


class Case(NamedTuple):
    """One comparison with one device: a "curve" of a mesh, or "gradients" of a variant."""

    kind: str
    name: str  # a key of MESHES or VARIANTS
    dtype: str
    height: int = 0  # of the images, and devices that it is divided over, of gradients
    space: int = 1

    def __str__(self) -> str:
        rows = f", {self.height} rows over {self.space}" if self.height else ""
        return f"{self.kind}: {self.name}, {self.dtype}{rows}"


def all_cases() -> list[Case]:
    curves = [Case("curve", name, dtype) for dtype in LIMITS for name in list(MESHES)[1:]]
    divided = [
        Case("gradients", name, "float64", height, space)
        for name in VARIANTS
        for height, space in zip(HEIGHTS, (8, 4, 2), strict=True)
    ]
    return [case for case in curves + divided if _devices(case) <= jax.device_count()]


def _devices(case: Case) -> int:
    mesh = MESHES[case.name] if case.kind == "curve" else MeshConfig(data=1, space=case.space)
    return mesh.data * mesh.space


def measure(case: Case) -> dict[str, float]:
    """Differences by name; of confusion matrices the number of pixels."""
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


def broken(case: Case, found: dict[str, float]) -> list[str]:
    """What is above its limit; NaN is."""
    limit = LIMITS[case.dtype] if case.kind == "curve" else GRADIENTS_LIMIT
    limits = dict.fromkeys(found, limit) | {"confusion": 0}
    if case.dtype == "float32":
        # Rounding moves some value across the kink of a ReLU, and its whole gradient comes or goes.
        limits["gradient norm"] = np.inf
    return [
        f"{case}: {name} differs by {value:.1e}"
        for name, value in found.items()
        if not value <= limits[name]
    ]


def difference(one: Any, other: Any) -> float:
    """Largest difference of all arrays, over the largest value."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    largest = max(float(np.abs(a).max()) for a, _ in pairs)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs) / largest


@functools.cache
def _curve(name: str, dtype: str) -> dict[str, Any]:
    """Losses of ten steps, what the state holds then, and how it predicts."""
    config = tiny.get_config()
    config.mesh = MESHES[name]
    config.model.dtype = dtype
    config.data.crop_size = (HEIGHTS[0], WIDTH)
    config.optimizer.learning_rate = 0.001  # more would amplify the rounding of float32
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
    """Gradients of a batch with arrays of its own, and what else a step makes of it."""
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
    tx = make_optimizer(config.optimizer, poly_schedule(config.optimizer, 1), model.abstract.params)
    state = mesh_lib.replicate(start_state(tx, random_variables(model), ema=False), mesh)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES + 1, (BATCH, height, WIDTH)).astype(np.uint8)
    labels[labels == CLASSES] = 255
    images = rng.integers(0, 256, (BATCH, height, WIDTH, 3)).astype(np.uint8)
    batch = mesh_lib.to_global({"image": images, "label": labels}, mesh, BATCH)

    @jax.jit
    def run(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, Any]:
        batch = {name: mesh_lib.fit_height(x, height, mesh) for name, x in batch.items()}
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
    """A table of the differences, and what they were measured under."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"Measured on {result['date']}: {result['devices']}, {versions}."]
    for kind in ("curve", "gradients"):
        rows = [row for row in result["rows"] if row["case"]["kind"] == kind]
        names = list(rows[0]["differences"]) if rows else []
        lines += ["", f"| {kind} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for row in rows:
            title = str(Case(**row["case"])).removeprefix(f"{kind}: ")
            lines.append(
                f"| {title} | {' | '.join(_spell(row['differences'][n], n) for n in names)} |"
            )
    return "\n".join(lines)


def _spell(value: float, name: str) -> str:
    return f"{value:.0f} pixels" if name == "confusion" else f"{value:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--markdown", action="store_true", help="print what the file holds")
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
        spelled = (f"{name} {_spell(value, name)}" for name, value in rows[case].items())
        print(f"{case}: {', '.join(spelled)}", flush=True)
    problems = [line for case, found in rows.items() for line in broken(case, found)]
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
