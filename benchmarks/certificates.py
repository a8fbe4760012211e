"""Certifies that converted weights give the logits of the models that they are from.

Each case is a model of another package with random weights, batch norm statistics and affine
parameters. Its file is converted as `deeplab-jax convert` does, and the outputs of all parts of
both models are compared, in float32 and float64, for batches of images of odd and even sizes. A
difference is the largest over all values of a map, divided by the largest value. The converted
model is then written in the original's format, which must be the original's state dict, bit for
bit. Exits with 1 if it is not, or if a difference exceeds its limit.

    python -m benchmarks.certificates                      # all, to results/ and docs/weights.md
    python -m benchmarks.certificates --family smp timm    # these; the file keeps the others
    python -m benchmarks.certificates --quick              # one batch a case; writes no file
    python -m benchmarks.certificates --quick --only "R-18" --json r18.json
    python -m benchmarks.certificates --record             # names for tests/weights/recorded/

Needs the originals; one that is not installed is left out. mmsegmentation and its two packages ask
for opencv-python, which would overwrite opencv-python-headless, so they are installed without their
needs:

    pip install -e '.[test,certify]'
    pip install --no-deps onedl-mmsegmentation==1.4.2 mmcv-lite==2.2.0 mmengine==0.10.7
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from rich import progress
from rich.console import Console
from rich.table import Table

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.weights import convert, families, hub_folder, torch_file
from deeplab_jax.weights.convert import Reading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import originals
import parity
from originals import Case, Original

from torch_reference import bits

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "certificates.json"
DOCS = ROOT / "docs" / "weights.md"
MARKERS = "<!-- certificates: written by `python -m benchmarks.certificates` -->", "<!-- end -->"
RECORDED = ROOT / "tests" / "weights" / "recorded"
LIMITS = parity.LIMITS
# Images, height, width; rounded up to the sizes that an original accepts. Strided layers see odd
# and even sizes, which some pad differently. The features of the last are 38 or more wide at output
# stride 16, so that rates up to 36 make a difference.
SHAPES = ((2, 65, 90), (1, 34, 593))
QUICK_SHAPES = SHAPES[-1:]
# Cases whose names and shapes tests use, without the originals.
_RECORDED = {
    "torchvision_resnet50": "torchvision: deeplabv3_resnet50",
    "torchvision_mobilenet_v3_large": "torchvision: deeplabv3_mobilenet_v3_large",
    "mmseg_r50_v1c": "mmseg: R-50 V1c d8",
    "mmseg_r18_v1c": "mmseg: R-18 V1c d8",
    "mmseg_r50b": "mmseg: R-50 d8 (r50b)",
    "smp_resnet18": "smp: DeepLabV3 resnet18",
    "smpplus_resnet50": "smp: DeepLabV3Plus resnet50, classes 21",
    "timm_resnet18": "timm: resnet18, output stride 32",
    "timm_resnet50d": "timm: resnet50d, output stride 32",
    "timm_resnet50s": "timm: resnet50s, output stride 32",
    "vainf_resnet50": "vainf: deeplabv3_resnet50, output stride 16",
    "vainfplus_resnet50": "vainf: deeplabv3plus_resnet50, output stride 16",
    "hf_mobilenet_v2": "hf: MobileNetV2 1.0, output stride 16",
}

NOT_WRITTEN = "not written"  # the family is read only

Row = dict[str, Any]


# Measuring


def certify(case: Case, shapes: Iterable[tuple[int, int, int]], **narrow: Any) -> Row:
    """Converts an original and compares all its parts.

    Args:
      case: the original.
      shapes: number, height and width of the images of each batch.
      **narrow: arguments of the original's maker, which replace the case's.

    Returns:
      "family", "case", "batches", "versions", "date"; for each dtype the largest difference of each
      part; "round_trip", "exact" or what differs.
    """
    shapes = [(n, *(-(-side // case.multiple) * case.multiple for side in hw)) for n, *hw in shapes]
    original = case.build(**narrow)
    with tempfile.TemporaryDirectory() as folder:
        path = original.save(original.module, pathlib.Path(folder))
        architecture, variables = converted(case, path)
        round_trip = written_again(case, original, path, pathlib.Path(folder))
    row: Row = {
        "family": case.family,
        "case": case.name,
        "batches": ["x".join(map(str, shape)) for shape in shapes],
        "versions": versions(case.family),
        "date": time.strftime("%Y-%m-%d"),
    }
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(*shape, case.in_channels)).astype("float32") for shape in shapes]
    for dtype in LIMITS:
        with jax.enable_x64(dtype == "float64"):
            row[dtype] = worst(original, architecture, variables, batches, dtype)
        jax.clear_caches()  # the next case has other programs
    return row | {"round_trip": round_trip}


def converted(case: Case, path: pathlib.Path) -> tuple[Architecture, Variables]:
    """Returns the architecture and the float32 variables that the file is converted to."""
    if case.family == "timm":
        return _backbone(case, path)
    saved = convert.read_model(path, Reading(case.family, settings(case)))
    return saved.architecture, saved.variables


def _backbone(case: Case, path: pathlib.Path) -> tuple[Architecture, Variables]:
    """Returns a model with the file's backbone, as `config.init.backbone` gives; heads are zero."""
    found = families.recognise(hub_folder.read_file_or_folder(path).arrays, backbone_only=True)
    architecture = found.architecture(case.settings)
    model = FunctionalModel.of(architecture)
    zeros = jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), model.abstract)
    read, _ = found.to_model(model, backbone_only=True)
    return architecture, Variables(*(all_ | some for all_, some in zip(zeros, read, strict=True)))


def settings(case: Case) -> list[str]:
    """Returns a case's settings as they are given on the command line."""
    return [f"model.{field}={value}" for field, value in case.settings.items()]


def written_again(case: Case, original: Original, path: pathlib.Path, folder: pathlib.Path) -> str:
    """Converts a file to a checkpoint and back; returns "exact", or how the result differs."""
    back = folder / "back.pth"
    if not families.FAMILIES[case.family].writes:
        return NOT_WRITTEN
    if case.family == "timm":  # a backbone alone is no checkpoint
        architecture, variables = _backbone(case, path)
        torch_file.write(back, families.from_model(variables, architecture, case.family))
    else:
        options: dict[str, Any] = {"family": case.family, "settings": settings(case)}
        convert.convert(path, folder / "checkpoint", **options)
        convert.convert(folder / "checkpoint", back, family=case.family)
    found = torch.load(back, weights_only=True)
    expected = original.module.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name in expected else 'not in the original'}"
        if bits(found[name]) != bits(expected[name]):
            return f"{name} differs"
    original.module.load_state_dict(found, strict=True)
    return "exact"


def worst(
    original: Original,
    architecture: Architecture,
    variables: Variables,
    batches: Iterable[np.ndarray],
    dtype: str,
) -> parity.Differences:
    """Returns the largest difference of each part over the batches; NaN if there is one."""
    architecture = dataclasses.replace(architecture, dtype=dtype)
    variables = jax.tree.map(lambda array: array.astype(dtype), variables)
    original.module.to(getattr(torch, dtype))
    found = [differences(original, architecture, variables, b.astype(dtype)) for b in batches]
    return {name: float(np.max([each[name] for each in found])) for name in found[0]}


def differences(
    original: Original, architecture: Architecture, variables: Variables, images: np.ndarray
) -> parity.Differences:
    """Returns the difference of each part, in the order of the computation, and of the logits."""
    with torch.no_grad(), parity.outputs_of(original.stages) as theirs:
        logits = original.logits(parity.to_torch(images))
    expected = theirs | logits
    ours = outputs(architecture, variables, images, tuple(expected))
    return {name: parity.difference(ours[name], each) for name, each in expected.items()}


def outputs(
    architecture: Architecture, variables: Variables, images: np.ndarray, wanted: Iterable[str]
) -> dict[str, jax.Array]:
    """Returns outputs of parts of a model, or logits "out" and "aux" of the images' size."""
    graph, state = nnx.split(parity.module_of(variables, architecture))

    @jax.jit
    def run(state: Any, images: Any) -> dict[str, Any]:
        model: Any = nnx.merge(graph, state)
        features = model.backbone(images)
        found, head = dict(features), model.classifier
        x = features[model.backbone.out_feature]
        for name in ("aspp", "head_conv"):
            if (part := getattr(head, name)) is not None:
                x = found[name] = part(x)
        if head.decoder is not None:
            x = found["decoder"] = head.decoder(x, features[model.backbone.low_level_feature])
        found["classifier"] = head.logits(x)
        if model.aux_classifier is not None:
            found["aux_classifier"] = model.aux_classifier(features)
        found |= model(images)
        return {name: found[name] for name in wanted}

    return run(state, images)


# Results


def versions(family: str) -> dict[str, str]:
    """Returns the versions of the packages that a certificate is about."""
    packages = (originals.PACKAGES[family], "torch", "jax", "flax")
    return {package: importlib.metadata.version(package) for package in packages}


def problems(row: Row) -> list[str]:
    """Returns a line for each part that differs by more than its limit, first the first."""
    title = f"{row['family']}: {row['case']}"
    lines = [
        f"{title}: {part} differs by {value:.1e} in {dtype}; the limit is {limit:.0e}"
        for dtype, limit in LIMITS.items()
        for part, value in row[dtype].items()
        if not value <= limit
    ]
    if row["round_trip"] not in ("exact", NOT_WRITTEN):
        lines.append(f"{title}: written in the original's format, {row['round_trip']}")
    return lines


def read(path: pathlib.Path) -> list[Row]:
    """Reads a file of results; returns no rows if there is none yet.

    Raises:
      UserError: it is another file.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            problems(row)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a file of this command's results ({error!r})") from error
    return rows


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Returns the rows in the order of the cases; a new one replaces an old one."""
    order = [(case.family, case.name) for case in originals.CASES]
    rows = {(row["family"], row["case"]): row for row in (*old, *new)}
    return [rows[key] for key in order if key in rows]


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes the results atomically."""
    text = json.dumps({"limits": LIMITS, "rows": rows}, indent=1)
    write_bytes(path, (text + "\n").encode())


def markdown(rows: Sequence[Row]) -> str:
    """Returns a table of certificates for each family."""
    parts = []
    for family, title in originals.TITLES.items():
        of_family = [row for row in rows if row["family"] == family]
        if not of_family:
            continue
        dates = sorted({row["date"] for row in of_family})
        packages = ", ".join(
            f"{name} {version}" for name, version in of_family[-1]["versions"].items()
        )
        lines = [
            f"**{title}** ({packages}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))})\n",
            "| model | float64 | float32 | written again |",
            "|---|---|---|---|",
        ]
        for row in of_family:
            cells = (row["case"], _worst(row, "float64"), _worst(row, "float32"), row["round_trip"])
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _worst(row: Row, dtype: str) -> str:
    return f"{np.max(list(row[dtype].values())):.1e}"  # NaN if there is one


def write_docs(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Replaces the text between the markers in the documentation."""
    begin, end = map(re.escape, MARKERS)
    text, found = re.subn(
        rf"({begin}\n).*?({end})",
        lambda match: f"{match[1]}\n{markdown(rows)}\n\n{match[2]}",
        path.read_text(),
        flags=re.DOTALL,
    )
    if not found:
        raise UserError(f"{path} has no lines {MARKERS[0]!r} and {MARKERS[1]!r} for the table")
    write_bytes(path, text.encode())


# Recorded names


def record(folder: pathlib.Path, cases: Iterable[Case]) -> list[pathlib.Path]:
    """Writes names, shapes and configs of originals, for tests that run without them."""
    folder.mkdir(parents=True, exist_ok=True)
    by_title = {title: name for name, title in _RECORDED.items()}
    written = []
    for case in cases:
        if (name := by_title.get(str(case))) is None:
            continue
        original, package = case.build(), originals.PACKAGES[case.family]
        with tempfile.TemporaryDirectory() as saved:
            path = original.save(original.module, pathlib.Path(saved)) / "config.json"
            config = json.loads(path.read_text()) if path.exists() else {}
        about = {
            "family": case.family,
            "case": case.name,
            "made_with": f"{package} {importlib.metadata.version(package)}",
            "config": config,
        }
        shapes = {key: list(value.shape) for key, value in original.module.state_dict().items()}
        lines = ",\n".join(f'  "{key}": {json.dumps(shape)}' for key, shape in shapes.items())
        content = f'{json.dumps(about)[:-1]},\n "shapes": {{\n{lines}\n }}}}\n'.encode()
        written.append(folder / f"{name}.json")
        write_bytes(written[-1], content)
    return written


# The command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.certificates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--family", nargs="+", choices=list(originals.TITLES), help="families to certify"
    )
    parser.add_argument(
        "--only", type=re.compile, metavar="REGEX", help="cases in whose name it is found"
    )
    parser.add_argument("--quick", action="store_true", help="one batch of images a case")
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        help=f"file of results, whose other rows are kept; without --quick: {RESULTS.name} of "
        "benchmarks/results, and the tables in docs/weights.md",
    )
    parser.add_argument(
        "--record", action="store_true", help="write the names for tests, certify nothing"
    )
    args = parser.parse_args(arguments)
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    if not args.quick and args.json is None:
        args.json = RESULTS
    return args


def selected(args: argparse.Namespace, console: Console) -> list[Case]:
    """Returns the cases to certify, and says which originals are not installed.

    Raises:
      UserError: no case is left, or a family that was asked for is not installed.
    """
    absent = {}
    for family in args.family or originals.TITLES:
        try:
            originals.imported(family)
        except ImportError as error:
            absent[family] = f"{originals.PACKAGES[family]} cannot be imported ({error})"
    if absent and args.family:
        raise UserError(f"{'; '.join(absent.values())}: see --help on how to install it")
    for reason in absent.values():
        console.print(f"left out: {reason}", style="yellow", highlight=False)
    cases = [
        case
        for case in originals.CASES
        if case.family in (args.family or originals.TITLES)
        and case.family not in absent
        and (not args.only or args.only.search(str(case)))
    ]
    if not cases:
        known = "; ".join(map(str, originals.CASES))
        raise UserError(f"no case is selected. There are: {known}")
    return cases


def run(cases: Sequence[Case], args: argparse.Namespace, console: Console) -> list[Row]:
    """Certifies the cases; writes the file of results after each."""
    shapes = QUICK_SHAPES if args.quick else SHAPES
    old = read(args.json) if args.json else []
    rows: list[Row] = []
    with progress.Progress(
        progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"), console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=str(case))
            start = time.perf_counter()
            row = certify(case, shapes)
            rows.append(row)
            if args.json:
                write(args.json, merged(old, rows))
            seconds = time.perf_counter() - start
            console.print(
                f"{case}: float64 {_worst(row, 'float64')}, float32 {_worst(row, 'float32')}, "
                f"written again: {row['round_trip']} ({seconds:.0f} s)",
                highlight=False,
            )
            bar.advance(task)
    return rows


def show(console: Console, rows: Sequence[Row]) -> None:
    table = Table("family", "model", "float64", "float32", "written again")
    for row in rows:
        cells = row["family"], row["case"], _worst(row, "float64"), _worst(row, "float32")
        table.add_row(*cells, row["round_trip"])
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    console = Console()
    cases = selected(args, console)
    if args.record:
        for path in record(RECORDED, cases):
            console.print(f"wrote {path}", highlight=False)
        return 0
    jax.config.update("jax_default_matmul_precision", "highest")
    # Cases with the same architecture have the same programs.
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
    rows = run(cases, args, console)
    show(console, rows)
    if args.json == RESULTS:
        write_docs(DOCS, read(RESULTS))
    return parity.exit_code([problem for row in rows for problem in problems(row)], console)


if __name__ == "__main__":
    parity.run_command(main)
