"""`deeplab-jax demo`."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from typing import Annotated

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.cli.errors import exit_on_sigterm
from deeplab_jax.utils.errors import print_warning
from deeplab_jax.utils.paths import CALIBRATION


def demo(
    checkpoint: options.Checkpoint,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0: any that is free.")
    ] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: also for other machines.")
    ] = "127.0.0.1",
    export_dir: Annotated[
        str, options.path_option("Write the page to this new folder instead, to host it anywhere.")
    ] = "",
    calibration: options.Calibration = "",
    runtime: Annotated[
        str, options.path_option("Folder of onnxruntime-web. Default: downloaded once (33 MB).")
    ] = "",
) -> None:
    """Segment images in the browser: serve a page that runs the model there.

    The model is exported to ONNX. The page takes images from files or the camera, which do not
    leave the browser, and needs no network. Needs pip install 'deeplab-jax[onnx]'.

    Examples:
      deeplab-jax demo runs/voc
      deeplab-jax demo runs/voc --export-dir public
    """
    from deeplab_jax.buckets.outputs import local_output
    from deeplab_jax.export.demo.server import make_server
    from deeplab_jax.utils.files import atomic_folder

    if export_dir:
        outputs.check("--export-dir", export_dir, kind="new")
        with local_output(export_dir) as (local, _), atomic_folder(local) as folder:
            _write(checkpoint, folder, calibration, runtime)
        print(f"{export_dir}: serve this folder by any web server, index.html is the page")
        return
    with (
        exit_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="deeplab_jax.") as scratch,
        make_server(pathlib.Path(scratch), host, port) as server,
    ):
        _write(checkpoint, pathlib.Path(scratch), calibration, runtime)
        shown = "localhost" if host in ("127.0.0.1", "0.0.0.0") else host
        print(f"http://{shown}:{server.server_port} (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _write(checkpoint: str, folder: pathlib.Path, calibration: str, runtime: str) -> None:
    """Writes the demo, with the calibration of the file or of the checkpoint's folder."""
    from deeplab_jax.export.demo.site import write_site
    from deeplab_jax.inference.calibration import read
    from deeplab_jax.weights import hub, hub_folder, saved_model

    path = hub.find_weights(checkpoint)
    if not calibration:
        model = saved_model.find_checkpoint(path) if hub_folder.is_checkpoint(path) else path
        beside = model / CALIBRATION  # as `inference.segmenter` finds it
        calibration = str(beside) if beside.is_file() else ""
    about = write_site(
        checkpoint, folder, output="logits" if calibration else "ids", runtime=runtime
    )
    if not calibration:
        return
    found = read(calibration, about["classes"])
    views = {"output_stride": about["output_stride"], "scales": [1.0], "flip": False}
    if found.views | views != found.views:
        print_warning(
            "the page predicts at scale 1, without mirrored images, at output stride "
            f"{about['output_stride']}: calibrate the model so too"
        )
    # Without the report, which names local paths.
    dataclasses.replace(found, report={}).write(folder / CALIBRATION)
