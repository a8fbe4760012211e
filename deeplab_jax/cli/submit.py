"""`deeplab-jax submit`."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError, print_warning

if TYPE_CHECKING:
    import numpy as np


@options.evaluation_options
def submit(
    settings: dict[str, Any],
    checkpoint: options.Checkpoint = "",
    out: Annotated[str, options.path_option("Archive to write (.tgz).")] = "results.tgz",
    check: Annotated[
        str, options.path_option("Only check this archive, or folder with results/ in it.")
    ] = "",
    data: Annotated[
        str, options.path_option("voc, with the checkpoint's data root; or a config file.")
    ] = "voc",
    root: Annotated[str, options.path_option("Folder with VOCdevkit in it.")] = "",
    split: Annotated[
        str, typer.Option(help="test; or a split with labels, e.g. val, to get its mIoU too.")
    ] = "test",
    competition: Annotated[
        str, typer.Option(help="comp5: trained only on VOC's images; comp6: on others too.")
    ] = "comp6",
) -> None:
    """Write and check the archive that PASCAL VOC's test server takes.

    The predictions are those of `evaluate` with the same options: without them, the run's.

    Examples:
      deeplab-jax submit runs/voc --root /data/voc --output-stride 8 --flip --out results.tgz
      deeplab-jax submit runs/voc --split val --out val.tgz
      deeplab-jax submit --check results.tgz --root /data/voc
    """
    from deeplab_jax.buckets.outputs import local_output
    from deeplab_jax.evaluation import setup, voc_server

    if bool(check) == bool(checkpoint):
        raise UserError("give a checkpoint to predict with, or --check and an archive or folder")
    if check:
        _check(check, data, root)
        return
    if competition not in voc_server.COMPETITIONS:
        raise UserError(
            f"--competition must be {' or '.join(voc_server.COMPETITIONS)}, got {competition!r}"
        )
    outputs.check("--out", out, ".tgz")
    config, segmenter, evaluator, warnings = setup.prepare(
        *(checkpoint, data, settings), root=root, split=split, load_split=voc_server.load_split
    )
    if config.eval.protocol == "torchvision":
        raise UserError(
            "--protocol must be paper or native: the server takes results of each image's own "
            "size, which torchvision's protocol does not keep"
        )
    for warning in warnings:
        print_warning(warning)
    with (
        local_output(out) as (file, _),
        outputs.progress_bar("submit", evaluator.num_batches) as advance,
    ):
        matrix = voc_server.write(
            *(file, evaluator, segmenter.variables),
            competition=competition,
            split=split,
            progress=advance,
        )
    _report(out, competition, split, len(evaluator.dataset.source), matrix)


def _check(path: str, data: str, root: str) -> None:
    from deeplab_jax.evaluation import setup, voc_server

    config = setup.base_config(data, path, root).data
    results = voc_server.read(pathlib.Path(path))
    matrix = voc_server.check(results, voc_server.load_split(config, results.split))
    _report(path, results.competition, results.split, len(results.files), matrix)


def _report(path: str, competition: str, split: str, images: int, matrix: np.ndarray) -> None:
    from deeplab_jax.data.datasets.voc import SERVER
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
    outputs.console().print(*outputs.facts(rows, 14), sep="\n")
