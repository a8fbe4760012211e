"""Writes the demo: a folder of static files, for any web server."""

from __future__ import annotations

import importlib.resources
import json
import os
import pathlib
from typing import Any

from deeplab_jax.data.labels import is_background
from deeplab_jax.export import onnx
from deeplab_jax.export.demo import runtime as runtime_lib
from deeplab_jax.export.export import export
from deeplab_jax.utils.errors import UserError


def write_site(
    checkpoint: str | os.PathLike[str],
    folder: pathlib.Path,
    *,
    output: str = "ids",
    runtime: str = "",
) -> dict[str, Any]:
    """Writes a page, the model and the runtime into a folder, from where the page needs no network.

    The files are `index.html`, `model.onnx`, `model.json` (classes, colours and what else the page
    needs to know) and `runtime/`.

    Args:
      checkpoint: a model in any form that `deeplab_jax.load` takes.
      folder: an existing folder.
      output: of the model: "ids"; or "logits", with which the page reads `calibration.json` too and
        shows unsure pixels.
      runtime: see `runtime.copy_runtime`.

    Returns:
      The content of `model.json`.

    Raises:
      UserError: there is no model, its images are not RGB, or it cannot be exported; or the runtime
        is missing.
    """
    onnx.check("nhwc")
    (folder / "runtime").mkdir()
    runtime_lib.copy_runtime(folder / "runtime", runtime)
    facts = export(checkpoint, folder / "model.onnx", output=output).description
    if len(facts["mean"]) != 3:
        raise UserError(
            f"{checkpoint} takes images of {len(facts['mean'])} channels: the page has only those "
            "of RGB"
        )
    about: dict[str, Any] = {
        "name": pathlib.PurePath(checkpoint).name,
        **facts,
        "layout": "nhwc",
        "background": is_background(facts["classes"][0]),
        "input": "uint8 RGB [1, height, width, 3] of any size; the model normalizes it",
        "runtime": f"onnxruntime-web {runtime_lib.VERSION}",
    }
    (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")
    page = importlib.resources.files("deeplab_jax.export.demo") / "index.html"
    (folder / "index.html").write_bytes(page.read_bytes())
    return about
