"""Executes the notebooks from top to bottom and stores their outputs.

python notebooks/execute.py [NAME ...]

`segment_a_photo` downloads a published model, or takes the one that DEEPLAB_MODEL names.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
VOLATILE = "volatile"  # tag of a cell whose output has times, and is not stored
_COLORS = 256  # of a stored picture, which is a third as large as with all

# Beside a PyTorch without CUDA, `import torchvision` fails until this has been done.
_START = "from speed.theirs import import_torchvision; import_torchvision()"


def execute(name: str, scratch: pathlib.Path, env: Mapping[str, str]) -> Any:
    """Executes a notebook in a new kernel, and returns it with its outputs.

    Args:
      name: of the notebook.
      scratch: a new or empty folder, which stands for the root of the clone.
      env: variables that are set for the kernel, beside those of this process.

    Raises:
      RuntimeError: a cell failed; the message has the cell and its traceback.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    workdir = scratch / "notebooks"
    workdir.mkdir(parents=True)
    (scratch / "docs").symlink_to(ROOT / "docs")
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    arguments = [f"--IPKernelApp.exec_lines={_START}"] if name == "from_torchvision" else []
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=arguments,
        timeout=1200,
        record_timing=False,
    )
    try:
        client.execute(cwd=str(workdir), env={**os.environ, "PYTHONPATH": path, **env})
    except CellExecutionError as error:
        message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without colours
        raise RuntimeError(f"{name}: {message}") from None
    return notebook


def digest(notebook: Any) -> str:
    """Returns a digest of the code of a notebook's cells."""
    sources = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def tidy(notebook: Any) -> None:
    """Removes what differs between executions, and makes pictures smaller."""
    language = {"name": "python"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": language, "executed_code": digest(notebook)}
    )
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if VOLATILE in cell.metadata.get("tags", ()):
            cell.outputs = []
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _shrink(data["image/png"])
                data.pop("image/jpeg", None)


def _shrink(encoded: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    stream = io.BytesIO()
    opaque.convert("RGB").quantize(_COLORS).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def main(names: list[str]) -> None:
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            notebook = execute(name, pathlib.Path(scratch), {})
        tidy(notebook)
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
