"""`deeplab-jax submit`."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def submit(
    checkpoint: Annotated[
        str, typer.Argument(help="Workdir, checkpoint or torchvision's file.")
    ] = "",
    out: Annotated[str, typer.Option(help="Archive to write (.tgz).")] = "results.tgz",
    check: Annotated[
        str, typer.Option(help="Write nothing; check this archive, or folder that holds results/.")
    ] = "",
    data: Annotated[
        str, typer.Option(help="voc, with the root that a run on it had, or a config file.")
    ] = "voc",
    root: Annotated[str, typer.Option(help="Folder that holds VOCdevkit.")] = "",
    split: Annotated[
        str, typer.Option(help="test, or one with labels, whose files are scored: val.")
    ] = "test",
    competition: Annotated[
        str, typer.Option(help="comp5: trained on VOC's images alone; comp6: on others too.")
    ] = "comp6",
    protocol: Annotated[
        str, typer.Option(help="paper or native. Default: paper, native with --window.")
    ] = "",
    size: options.Size = None,
    output_stride: options.OutputStride = None,
    scales: options.Scales = "1",
    flip: options.Flip = False,
    window: options.Window = 0,
    overlap: options.Overlap = 0.5,
    batch_size: options.BatchSize = 8,
) -> None:
    """Write the files that PASCAL VOC's test server takes, ready to upload, and check them.

    The images are predicted as `evaluate` predicts them.

    Examples:

      deeplab-jax submit runs/voc --root /data/voc --output-stride 8 --flip --out results.tgz

      deeplab-jax submit runs/voc --split val --out val.tgz

      deeplab-jax submit --check results.tgz --root /data/voc
    """
    from deeplab_jax.evaluation import setup, voc_server

    if bool(check) == bool(checkpoint):
        raise UserError("give a checkpoint to predict with, or --check and what to check")
    if check:
        _check(check, data, root)
        return
    if competition not in voc_server.COMPETITIONS:
        raise UserError(
            f"--competition must be {' or '.join(voc_server.COMPETITIONS)}, got {competition!r}"
        )
    if protocol == "torchvision":
        raise UserError(
            "--protocol must be paper or native: the server takes results of each image's own "
            "size, which torchvision's protocol does not keep"
        )
    outputs.check("--out", out, ".tgz")
    settings = options.evaluation(
        protocol, output_stride, scales, flip, window, overlap, batch_size
    )
    ready = setup.prepare(
        *(checkpoint, data, settings),
        root=root,
        split=split,
        size=size,
        load=voc_server.load_split,
    )
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for warning in ready.warnings:
        errors.print(f"warning: {warning}", markup=False)
    with outputs.bar("submit", ready.evaluator.num_batches) as advance:
        matrix = voc_server.write(
            *(pathlib.Path(out), ready.evaluator, ready.loaded.variables, ready.dataset),
            competition=competition,
            split=split,
            progress=advance,
        )
    _say(out, competition, split, len(ready.dataset.source), matrix)


def _check(path: str, data: str, root: str) -> None:
    from deeplab_jax.config import Config, DataConfig
    from deeplab_jax.config import io as config_files
    from deeplab_jax.evaluation import voc_server

    named = Config(data=DataConfig(name=data))
    config = (config_files.from_python(data) if config_files.is_config(data) else named).data
    config.root = root or config.root
    results = voc_server.read(pathlib.Path(path))
    matrix = voc_server.check(results, voc_server.load_split(config, results.split))
    _say(path, results.competition, results.split, len(results.files), matrix)


def _say(path: str, competition: str, split: str, images: int, matrix: np.ndarray) -> None:
    from deeplab_jax.data.datasets.voc_test import SERVER
    from deeplab_jax.evaluation.confusion import scores
    from deeplab_jax.evaluation.voc_server import COMPETITIONS

    rows = {
        "results": path,
        "images": f"{images} of {split}, each with one file of its size, ids 0 to 20",
        "competition": f"{competition}: {COMPETITIONS[competition]}",
    }
    if matrix.any():
        rows["mIoU %"] = f"{100 * scores(matrix).miou:.2f}, of the files"
    if split == "test":
        rows["upload to"] = SERVER
    for name, value in rows.items():
        outputs.console("").print(f"{name:<14}{value}", markup=False)
