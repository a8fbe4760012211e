"""Studies which of the paper's choices matter on generated shapes, with several seeds each.

Trains the rows of configs/study.py with several seeds, and evaluates the base with other settings
too. Writes the results as JSON, draws them, and prints the tables of docs/study.md.

    python benchmarks/study.py --jobs 2               # two hours on two cores
    python benchmarks/study.py --only base,os8 --seeds 1
    python benchmarks/study.py --only 'recipe*'
    python benchmarks/study.py --set train.steps=20 --workdir runs/trial   # a quick test
    python benchmarks/study.py --recorded study.json --plot study.png

Run again with the same --workdir, it resumes. On a GPU, one run at a time is fastest.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import study_figures
from rich.console import Console
from rich.markdown import Markdown
from study_runs import Run, Scoring, Training, run_all

from deeplab_jax import data
from deeplab_jax.analysis.summary import summarize
from deeplab_jax.cli.errors import exit_on_user_error
from deeplab_jax.training.train import resolve_architecture
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_bytes, write_png
from deeplab_jax.visualization import plots
from speed import measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Row(NamedTuple):
    name: str  # of a config, or of one of `SCORINGS`
    words: str


BASE = "base"
GROUPS: dict[str, tuple[Row, ...]] = {
    "Output stride": (
        Row("os32", "32"),
        Row(BASE, "16, the base of all groups below"),
        Row("os8", "8"),
    ),
    "Multi-grid in block4": (
        Row(BASE, "(1, 1, 1), the base"),
        Row("grid121", "(1, 2, 1)"),
        Row("grid124", "(1, 2, 4)"),
    ),
    "ASPP": (
        Row("block4", "none: only block4"),
        Row("no_pooling", "rates (2, 4, 6), no image pooling"),
        Row("rates2468", "rates (2, 4, 6, 8), no image pooling"),
        Row(BASE, "rates (2, 4, 6) and image pooling, the base"),
        Row("rates123", "rates (1, 2, 3) and image pooling"),
    ),
    "Loss": (
        Row("shrunk_labels", "labels downsampled to the logits"),
        Row(BASE, "logits upsampled to the labels, the base"),
    ),
    "Batch norm": (
        Row("frozen_bn", "frozen from the start"),
        Row("bn_decay9997", "decay 0.9997, the paper's"),
        Row("batch4", "batches of 4"),
        Row("bn_of_4", "batches of 16, statistics of 4"),
        Row(BASE, "decay 0.9, batches of 16, the base"),
        Row("two_stages", "half of the steps, then half at output stride 8, frozen"),
    ),
    "Evaluation of the base's checkpoints": (
        Row(BASE, "output stride 16"),
        Row("eval_os8", "output stride 8"),
        Row("eval_scales", "output stride 8, six scales"),
        Row("eval_flip", "output stride 8, six scales, flip"),
    ),
    "The same, for images of 129 pixels": (
        Row("size129", "output stride 16"),
        Row("eval129_os8", "output stride 8"),
        Row("eval129_scales", "output stride 8, six scales"),
        Row("eval129_flip", "output stride 8, six scales, flip"),
    ),
}

# The first row of each group is the base of the others.
RECIPES: dict[str, tuple[Row, ...]] = {
    "Recipes, 700 steps": (
        Row("recipe", "SGD, poly, random scale and flip"),
        Row("recipe_cosine", "cosine schedule"),
        Row("recipe_adamw", "AdamW, cosine schedule"),
        Row("recipe_decoupled", "decoupled weight decay"),
        Row("recipe_ema", "EMA of the parameters"),
        Row("recipe_smoothing", "label smoothing of 0.1"),
        Row("recipe_photometric", "photometric distortion"),
        Row("recipe_jitter", "colour jitter of 0.5"),
        Row("recipe_blur", "blur"),
        Row("recipe_rotation", "rotation by up to 45 degrees"),
        Row("recipe_class_share", "class share of at most 0.75"),
        Row("recipe_cutmix", "CutMix"),
        Row("recipe_classmix", "ClassMix"),
        Row("recipe_copy_paste", "copy-paste"),
        Row("recipe_modern", "AdamW, cosine schedule, copy-paste"),
    ),
    "Recipes, 1400 steps": (
        Row("recipe_long", "SGD, poly, random scale and flip"),
        Row("recipe_long_copy_paste", "copy-paste"),
        Row("recipe_long_modern", "AdamW, cosine schedule, copy-paste"),
    ),
}

_OS8 = ("--output-stride", "8")
_SCALES = (*_OS8, "--scales", "0.5,0.75,1,1.25,1.5,1.75")
_FLIP = (*_SCALES, "--flip")
# Name of an evaluation -> the row whose checkpoints it uses, and its options.
SCORINGS = {
    "eval_os8": (BASE, _OS8),
    "eval_scales": (BASE, _SCALES),
    "eval_flip": (BASE, _FLIP),
    "eval129_os8": ("size129", _OS8),
    "eval129_scales": ("size129", _SCALES),
    "eval129_flip": ("size129", _FLIP),
}


class Claim(NamedTuple):
    """A claim of the paper: one choice is better than another."""

    words: str
    better: str  # row
    worse: str
    paper: tuple[float, float]  # mIoU of both in arXiv 1706.05587, %
    tables: tuple[int, int]  # of the paper that contain them


CLAIMS = (
    Claim("output stride 16 over 32", BASE, "os32", (73.88, 70.06), (1, 1)),
    Claim("output stride 8 over 16", "os8", BASE, (75.18, 73.88), (1, 1)),
    Claim("multi-grid (1, 2, 1) over none", "grid121", BASE, (75.93, 75.36), (5, 5)),
    Claim("multi-grid (1, 2, 4) over (1, 2, 1)", "grid124", "grid121", (76.58, 75.93), (5, 5)),
    Claim("ASPP over only block4", "no_pooling", "block4", (75.36, 68.39), (5, 2)),
    Claim("three rates over four", "no_pooling", "rates2468", (76.58, 76.46), (5, 5)),
    Claim("image pooling over none", BASE, "no_pooling", (77.21, 76.58), (5, 5)),
    Claim(
        "upsampled logits over downsampled labels", BASE, "shrunk_labels", (77.21, 76.01), (8, 8)
    ),
    Claim("batch norm trained over frozen", BASE, "frozen_bn", (77.21, 75.95), (8, 8)),
    Claim("batches of 16 over 4", BASE, "batch4", (77.21, 64.43), (9, 9)),
    Claim("evaluated at output stride 8 over 16", "eval_os8", BASE, (78.51, 77.21), (6, 6)),
    Claim("the same, 129 pixels", "eval129_os8", "size129", (78.51, 77.21), (6, 6)),
    Claim("six scales over one", "eval_scales", "eval_os8", (79.45, 78.51), (6, 6)),
    Claim("the same, 129 pixels", "eval129_scales", "eval129_os8", (79.45, 78.51), (6, 6)),
    Claim("flip over no flip", "eval_flip", "eval_scales", (79.77, 79.45), (6, 6)),
    Claim("the same, 129 pixels", "eval129_flip", "eval129_scales", (79.77, 79.45), (6, 6)),
)

Record = dict[str, Any]


def trainings(
    workdir: pathlib.Path, seeds: int, settings: Sequence[str], only: Sequence[str]
) -> list[Training]:
    """Returns all seeds of all configs, ordered by seed."""
    return [
        Training(name, seed, tuple(settings), workdir / name / f"seed{seed}")
        for seed in range(seeds)
        for name in _names()
        if name not in SCORINGS and (not only or name in only)
    ]


def _names() -> list[str]:
    """Returns all rows, each once."""
    groups = (*GROUPS.values(), *RECIPES.values())
    return list(dict.fromkeys(row.name for rows in groups for row in rows))


def scorings(trained: Sequence[Training], only: Sequence[str]) -> list[Scoring]:
    return [
        Scoring(name, training, options)
        for training in trained
        for name, (of, options) in SCORINGS.items()
        if of == training.name and (not only or name in only)
    ]


def make_record(runs: Sequence[Run], settings: Sequence[str]) -> Record:
    """Returns the mIoU of each row, in the order of the seeds, and the GFLOP of one image."""
    miou: dict[str, list[float]] = {}
    gflop: dict[str, float] = {}
    for run in runs:
        found = run.miou()
        assert found is not None  # because `run_all` has finished
        miou.setdefault(run.name, []).append(found)
        if isinstance(run, Training) and run.name not in gflop:
            config = run.last_stage()
            shapes = data.load(config.data, config.data.eval_split)
            size = config.data.crop_size[0]
            macs = summarize(resolve_architecture(config, shapes), size).all.macs
            gflop[run.name] = round(2 * macs / 1e9, 4)
    return {
        "conditions": measure.conditions(),
        "settings": list(settings),
        "gflop_an_image": gflop,
        "miou": miou,
    }


# --- Tables --------------------------------------------------------------------------------------


def tables(record: Record) -> str:
    """Returns Markdown tables of each row, of the paper's claims and of the recipes."""
    parts = [list(part(record)) for part in (_rows, _claims, _recipes)]
    return "\n\n".join("\n".join(part) for part in parts if len(part) > 2) + "\n"


def _rows(record: Record) -> Iterator[str]:
    miou, gflop = record["miou"], record["gflop_an_image"]
    yield "| | config | mIoU, % | range | GFLOP per image |"
    yield "|---|---|---:|---:|---:|"
    for title, rows in GROUPS.items():
        known = [row for row in rows if row.name in miou]
        if not known:
            continue
        yield f"| **{title}** | | | | |"
        for row in known:
            values = [100 * value for value in miou[row.name]]
            config = "" if row.name in SCORINGS else f"`{row.name}`"
            cost = f"{gflop[row.name]:.3f}" if row.name in gflop else ""
            mean = f"{statistics.mean(values):.1f}"
            yield f"| {row.words} | {config} | {mean} | {spread(values)} | {cost} |"


def _claims(record: Record) -> Iterator[str]:
    yield "| claim of the paper | table | points in the paper | points here | by seed | seen here |"
    yield "|---|---|---:|---:|---|---|"
    for claim in CLAIMS:
        if {claim.better, claim.worse} <= record["miou"].keys():
            gains = differences(record, claim.better, claim.worse)
            tables = ", ".join(str(number) for number in dict.fromkeys(claim.tables))
            yield (
                f"| {claim.words} | {tables} | {claim.paper[0] - claim.paper[1]:+.2f} | "
                f"{statistics.mean(gains):+.1f} | {by_seed(gains)} | {verdict(gains)} |"
            )


def _recipes(record: Record) -> Iterator[str]:
    yield "| | config | mIoU, % | range | points over the base | by seed | better here |"
    yield "|---|---|---:|---:|---:|---|---|"
    for title, (base, *others) in RECIPES.items():
        known = [row for row in (base, *others) if {row.name, base.name} <= record["miou"].keys()]
        if known:
            yield f"| **{title}** | | | | | | |"
        for row in known:
            values = [100 * value for value in record["miou"][row.name]]
            gains = differences(record, row.name, base.name)
            gain = f"{statistics.mean(gains):+.1f} | {by_seed(gains)} | {verdict(gains)}"
            yield (
                f"| {row.words}{', the base' * (row is base)} | `{row.name}` | "
                f"{statistics.mean(values):.1f} | {spread(values)} | "
                f"{' | | ' if row is base else gain} |"
            )


def differences(record: Record, better: str, worse: str) -> list[float]:
    """Returns the difference in mIoU between two rows, in points, for each seed."""
    pairs = zip(record["miou"][better], record["miou"][worse], strict=True)
    return [100 * (one - other) for one, other in pairs]


def by_seed(gains: Sequence[float]) -> str:
    return ", ".join(f"{gain:+.1f}" for gain in gains)


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def verdict(gains: Sequence[float]) -> str:
    """Returns whether all seeds agree on a claim."""
    if all(gain > 0 for gain in gains):
        return "yes"
    return "the opposite" if all(gain < 0 for gain in gains) else "no: seeds disagree"


# --- Command -------------------------------------------------------------------------------------


def main() -> None:
    arguments = _parse()
    known, patterns = _names(), [name for name in arguments.only.split(",") if name]
    if unknown := [pattern for pattern in patterns if not fnmatch.filter(known, pattern)]:
        raise UserError(f"--only: no row {', '.join(unknown)}; rows: {', '.join(known)}")
    only = [name for pattern in patterns for name in fnmatch.filter(known, pattern)]
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise UserError("--seeds and --jobs must be 1 or more")
    trained = trainings(arguments.workdir, arguments.seeds, arguments.settings, only)
    if arguments.recorded:
        if not arguments.recorded.is_file():
            raise UserError(f"--recorded: there is no file {arguments.recorded}")
        record = json.loads(arguments.recorded.read_text())
    else:
        scored = scorings(trained, only)
        run_all(trained, arguments.jobs)
        run_all(scored, arguments.jobs)
        record = make_record([*trained, *scored], arguments.settings)
        if arguments.json:
            write_bytes(arguments.json, (json.dumps(record, indent=1) + "\n").encode())
    if arguments.plot:
        plots.save(arguments.plot, plot(record))
    if arguments.examples:
        first = {run.name: run for run in trained if run.seed == 0}
        chosen = [first[name] for name in ("os32", BASE, "os8") if name in first]
        write_png(arguments.examples, study_figures.examples(chosen))
    if arguments.markdown:
        print(tables(record))
    else:
        Console().print(Markdown(tables(record)))


def plot(record: Record) -> Figure:
    miou = record["miou"]
    groups, bases = {}, {}
    for title, rows in (GROUPS | RECIPES).items():
        groups[title] = [(row.words, miou.get(row.name, [])) for row in rows]
        bases[title] = miou.get(rows[0].name if title in RECIPES else BASE, [])
    return study_figures.seeds_figure(groups, bases)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = pathlib.Path
    parser.add_argument(
        "--workdir", type=path, default=path("runs/study"), help="folder of all runs"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of each config")
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of parallel runs, which share the cores"
    )
    parser.add_argument(
        "--only", default="", help="rows, as in base,os8,eval_os8 or recipe*; default: all"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="override in all configs, as in train.steps=20; repeatable",
    )
    parser.add_argument("--json", type=path, help="file to write all numbers to")
    parser.add_argument(
        "--plot", type=path, help="file to draw all seeds of all rows to (.png, .svg or .pdf)"
    )
    parser.add_argument("--examples", type=path, help="file to draw predictions to (.png)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown text")
    parser.add_argument(
        "--recorded", type=path, help="print the tables of a file that --json wrote, train nothing"
    )
    return parser.parse_args()


if __name__ == "__main__":
    try:
        with exit_on_user_error():
            main()
    except KeyboardInterrupt:
        print("stopped; run again to resume", file=sys.stderr)
        sys.exit(130)
