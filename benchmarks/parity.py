"""Measures the largest differences between this package's models and torchvision's.

Each case is a torchvision model with random weights, batch norm statistics and affine parameters,
converted to this package, and a batch of random images. A difference is the largest over all values
of a map, divided by the largest value. Matrix products use the highest precision. Small cases come
first, and each result is written to the file at once, so that the command can be stopped and
resumes when it is run again. Exits with 1 if a difference exceeds its limit.

    python benchmarks/parity.py --quick                    # small images: two minutes
    python benchmarks/parity.py --json parity.json         # all: half an hour on two cores; resumes
    python benchmarks/parity.py --json parity.json --markdown   # prints the recorded tables
    JAX_PLATFORMS=cuda python benchmarks/parity.py --json parity_gpu.json

Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich import progress
from rich.console import Console
from rich.table import Table

from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.models.architecture import Architecture, architecture
from deeplab_jax.models.deeplab import DeepLabV3, build_model
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.models.layers import ShapeRngs
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.weights import families

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import torch_reference
from torch_reference import torch

# torchvision's names, and the approximate cost relative to the first, which orders the cases.
MODELS = {
    "deeplabv3_mobilenet_v3_large": 1,
    "deeplabv3_resnet50": 17,
    "deeplabv3_resnet101": 25,
}
LIMITS = {"float32": 1e-4, "float64": 1e-9}
SIZES = ((33, 65), (129, 257), (224, 224), (513, 385), (520, 520))  # height, width
BATCHES = (1, 3)
STAGES_SIZE = (129, 257)
QUICK_SIZES = SIZES[:1]
PACKAGES = ("flax", "jax", "jaxlib", "numpy", "torch", "torchvision")

Differences = dict[str, float]  # by name of the map


class Case(NamedTuple):
    """One measurement.

    Attributes:
      kind: "logits" of both heads, or "stages": the outputs of each part of the model.
      model: a key of `MODELS`.
      dtype: of the computation, a key of `LIMITS`.
      height, width: of the images.
      batch: number of images.
    """

    kind: str
    model: str
    dtype: str
    height: int
    width: int
    batch: int

    @property
    def cost(self) -> float:
        pixels = self.batch * self.height * self.width
        return pixels * MODELS[self.model] * (4 if self.dtype == "float64" else 1)

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.height}x{self.width}"
        return f"{self.kind} of {self.model}, {self.dtype}, {shape}"


def all_cases(quick: bool) -> list[Case]:
    """Returns all cases, the cheapest first."""
    cases = [
        Case("logits", model, dtype, height, width, batch)
        for model, dtype in itertools.product(MODELS, LIMITS)
        for (height, width), batch in itertools.product(QUICK_SIZES if quick else SIZES, BATCHES)
    ]
    cases += [
        Case("stages", model, dtype, *STAGES_SIZE, 1)
        for model, dtype in itertools.product(MODELS, LIMITS)
    ]
    return sorted(cases, key=lambda case: case.cost)


# Measuring


def measure(case: Case) -> Differences:
    """Returns the difference of each map."""
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    reference = reference_model(case.model, case.dtype)
    images = np.random.default_rng(0).normal(size=(case.batch, case.height, case.width, 3))
    images = images.astype(case.dtype)
    run = logits if case.kind == "logits" else stages
    ours, theirs = run(reference, our_architecture(case), images)
    jax.clear_caches()  # the next case has other programs
    return {name: difference(ours[name], theirs[name]) for name in theirs}


@functools.cache
def _float32_model(name: str) -> Any:
    return torch_reference.segmentation_model(name, aux=True)


def reference_model(name: str, dtype: str) -> Any:
    """Returns torchvision's model; its weights are the same numbers in both dtypes."""
    return _float32_model(name).to(getattr(torch, dtype))


def our_architecture(case: Case) -> Architecture:
    name = case.model.replace("deeplabv3", "torchvision")
    return architecture(name, num_classes=21, dtype=case.dtype)


def converted(reference: Any, model: FunctionalModel) -> Variables:
    arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return families.to_model(arrays, model).variables


def to_torch(images: np.ndarray) -> Any:
    return torch.from_numpy(np.moveaxis(images, 3, 1).copy())


def logits(
    reference: Any, chosen: Architecture, images: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the logits of both heads at the images' size: this package's, torchvision's."""
    model = FunctionalModel(chosen)
    ours, _ = jax.jit(model.apply)(converted(reference, model), images)
    with torch.no_grad():
        return ours, dict(reference(to_torch(images)))


def stages(
    reference: Any, chosen: Architecture, images: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the outputs of each part of the model, in order: this package's, torchvision's."""
    graph, state = nnx.split(module_of(converted(reference, FunctionalModel(chosen)), chosen))

    @jax.jit
    def run(state: Any, images: Any) -> dict[str, Any]:
        model: Any = nnx.merge(graph, state)
        features = model.backbone(images)
        out, aspp = features[model.backbone.out_feature], model.classifier.aspp
        branches = {f"ASPP branch {i}": branch(out) for i, branch in enumerate(aspp.branches)}
        heads = {name: getattr(model, name)(features) for name in ("classifier", "aux_classifier")}
        return features | branches | {"ASPP": aspp(out)} | heads

    with outputs_of(parts_of(reference)) as theirs, torch.no_grad():
        reference(to_torch(images))
    return run(state, images), theirs


def module_of(variables: Variables, chosen: Architecture) -> DeepLabV3:
    """Returns the model in inference mode with these variables."""
    model = nnx.eval_shape(lambda: build_model(chosen, rngs=ShapeRngs(0)))
    model.eval()
    arrays = variables.params | variables.batch_stats
    kept = nnx.state(model, (nnx.Param, nnx.BatchStat))
    filled = {
        path: type(variable)(jax.numpy.asarray(arrays[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(kept)
    }
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def parts_of(reference: Any) -> dict[str, Any]:
    """Returns torchvision's modules by the names of the stages, in order."""
    backbone = reference.backbone
    if "maxpool" in backbone:
        features = {"stem": backbone.maxpool}
        features |= {name: backbone[name] for name in ("layer1", "layer2", "layer3", "layer4")}
    else:
        stem, *blocks, last = backbone.values()
        numbered = {f"block{number}": block for number, block in enumerate(blocks, start=1)}
        features = {"stem": stem, **numbered, "last": last}
    aspp = reference.classifier[0]
    branches = {f"ASPP branch {index}": branch for index, branch in enumerate(aspp.convs)}
    heads = {"classifier": reference.classifier, "aux_classifier": reference.aux_classifier}
    return features | branches | {"ASPP": aspp} | heads


@contextlib.contextmanager
def outputs_of(modules: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the outputs of torch modules, filled when they run, in the order of `modules`."""
    outputs = dict.fromkeys(modules)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output.clone())

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    yield outputs
    for handle in handles:
        handle.remove()


def difference(ours: Any, theirs: Any) -> float:
    """Returns the largest difference of maps `[n, h, w, c]` and `[n, c, h, w]`, relative."""
    expected = np.moveaxis(theirs.numpy(), 1, 3)
    found = np.asarray(ours)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(
            f"expected {expected.shape} {expected.dtype}, got {found.shape} {found.dtype}"
        )
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Results


def conditions(machine: str) -> dict[str, Any]:
    """Returns everything that the results may depend on, except the code."""
    return {
        "machine": machine,
        "device": jax.devices()[0].device_kind,
        "matmul_precision": "highest",
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def read(path: pathlib.Path | None) -> dict[str, Any]:
    """Reads a file of results; returns an empty dictionary if there is none yet."""
    if path is None or not path.exists():
        return {}
    try:
        result = json.loads(path.read_text())
        rows_of(result)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a file of this command's results ({error!r})") from error
    return result


def rows_of(result: dict[str, Any]) -> dict[Case, Differences]:
    return {
        Case(**{field: row[field] for field in Case._fields}): row["differences"]
        for row in result.get("rows", [])
    }


def write(path: pathlib.Path, header: dict[str, Any], rows: dict[Case, Differences]) -> None:
    """Writes the results atomically."""
    listed = [case._asdict() | {"differences": found} for case, found in rows.items()]
    result = {"date": time.strftime("%Y-%m-%d")} | header | {"limits": LIMITS, "rows": listed}
    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())


def violations(rows: dict[Case, Differences]) -> list[str]:
    """Returns a line for each difference that exceeds its limit or is NaN."""
    return [
        f"{case}: {name} differs by {value:.1e}; the limit is {LIMITS[case.dtype]:.0e}"
        for case, found in rows.items()
        for name, value in found.items()
        if not value <= LIMITS[case.dtype]
    ]


class Grid(NamedTuple):
    """A table of differences."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def grids(rows: dict[Case, Differences]) -> list[Grid]:
    """Returns tables of logits for each dtype, and of stages for each kind of backbone."""
    short = {model: model.removeprefix("deeplabv3_") for model in MODELS}
    tables = []
    for dtype, limit in LIMITS.items():
        lines = []
        for (height, width), batch in itertools.product(SIZES, BATCHES):
            wanted = [Case("logits", model, dtype, height, width, batch) for model in MODELS]
            found = [rows.get(case) for case in wanted]
            cells = [f"{f['out']:.1e} / {f['aux']:.1e}" if f else "not run" for f in found]
            lines.append((f"{batch}x{height}x{width}", *cells))
        worst = [max(f.values()) for c, f in rows.items() if (c.kind, c.dtype) == ("logits", dtype)]
        largest = f"{max(worst):.1e}" if worst else "not run"
        title = f"Logits, {dtype}: out / aux (largest {largest}, limit {limit:.0e})"
        tables.append(Grid(title, ("images", *short.values()), lines))
    for family in ("resnet", "mobilenet"):
        cases = [case for case in rows if case.kind == "stages" and family in case.model]
        cases.sort(key=lambda case: (MODELS[case.model], case.dtype))
        if cases:
            lines = [
                (name, *(f"{rows[case][name]:.1e}" for case in cases)) for name in rows[cases[0]]
            ]
            heads = (f"{short[case.model]}, {case.dtype}" for case in cases)
            title = "Stages, image 1x{}x{}".format(*STAGES_SIZE)
            tables.append(Grid(title, ("stage", *heads), lines))
    return tables


def markdown(result: dict[str, Any]) -> str:
    """Returns the tables of a file of results, and the conditions of the measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [f"Measured on {result['date']}: {result['machine']}, {versions}."]
    for grid in grids(rows_of(result)):
        head = f"| {' | '.join(grid.columns)} |\n|{'---|' * len(grid.columns)}"
        body = "\n".join(f"| {' | '.join(row)} |" for row in grid.rows)
        parts.append(f"**{grid.title}**\n\n{head}\n{body}")
    return "\n\n".join(parts)


def show(console: Console, rows: dict[Case, Differences]) -> None:
    for grid in grids(rows):
        table = Table(*grid.columns, title=grid.title)
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def run(
    cases: list[Case],
    rows: dict[Case, Differences],
    keep: Callable[[dict[Case, Differences]], None],
    console: Console,
) -> None:
    """Measures the cases missing in `rows`, adds them, and calls `keep(rows)` after each."""
    missing = [case for case in cases if case not in rows]
    with progress.Progress(
        progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"), console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(cases), completed=len(cases) - len(missing))
        for case in missing:
            bar.update(task, description=str(case))
            start = time.perf_counter()
            rows[case] = measure(case)
            keep(rows)
            worst, seconds = max(rows[case].values()), time.perf_counter() - start
            console.print(f"{case}: {worst:.1e} ({seconds:.0f} s)")
            bar.advance(task)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file of results to write and resume")
    parser.add_argument(
        "--quick", action="store_true", help="stages, and logits only for images of 33x65"
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print the tables of the file as Markdown, measure nothing",
    )
    parser.add_argument(
        "--machine", default=f"{os.cpu_count()} cores", help="description of this machine"
    )
    args = parser.parse_args(arguments)
    if args.markdown and not (args.json and args.json.exists()):
        parser.error("--markdown needs a file of results: --json FILE")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    result = read(args.json)
    if args.markdown:
        print(markdown(result))
        return 0
    jax.config.update("jax_default_matmul_precision", "highest")
    header = conditions(args.machine)
    for field, value in header.items():
        if result and result.get(field) != value:
            raise UserError(
                f"{args.json} was measured with {field} {result.get(field)}, here it is {value}: "
                "choose another file, or remove this one to measure again"
            )
    rows = rows_of(result)

    def keep(rows: dict[Case, Differences]) -> None:
        if args.json:
            write(args.json, header, rows)

    console = Console()
    run(all_cases(args.quick), rows, keep, console)
    show(console, rows)
    return exit_code(violations(rows), console)


def exit_code(problems: list[str], console: Console) -> int:
    """Prints problems, and returns 1 if there are any."""
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    return 1 if problems else 0


def run_command(main: Callable[[], int]) -> None:
    """Runs a benchmark as a command, which Ctrl-C ends without a traceback."""
    try:
        with exit_on_user_error():
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_command(main)
